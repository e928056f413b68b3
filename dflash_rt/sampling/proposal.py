"""How a drafter samples its proposals, and the distributions that it sampled from."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_rt.arrays import FloatArray, IntArray

__all__ = ["DraftSampling", "Proposal"]


@dataclass(frozen=True)
class DraftSampling:
    """Parameters for a drafter that samples its proposals. Other drafters ignore them.

    ``temperature`` is float32 ``[batch]``, above 0. ``uniforms`` is float32 ``[batch, drafts]``, in
    ``[0, 1)``: one random number for each draft, used nowhere else.
    """

    temperature: FloatArray
    uniforms: FloatArray


@dataclass(frozen=True)
class Proposal:
    """The distributions that drafts were sampled from. The backend doesn't reuse these arrays.

    ``candidates`` is int64 ``[batch, drafts, k]``, distinct tokens in each row. ``probabilities`` is float32
    of the same shape; each row sums to 1. All other tokens have probability 0, given the drafts before them.
    """

    candidates: IntArray
    probabilities: FloatArray
