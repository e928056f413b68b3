"""Drafts that were sampled: how they were to be, and from what they were."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_rt.arrays import FloatArray, IntArray

__all__ = ["DraftSampling", "Proposal"]


@dataclass(frozen=True)
class DraftSampling:
    """How a drafter that can sample its proposals is to do so; a drafter that can't ignores it.

    ``temperature`` is float32 ``[batch]``, above 0. ``uniforms`` is float32 ``[batch, width - 1]``, in
    ``[0, 1)``: one number for each draft, which nothing else depends on.
    """

    temperature: FloatArray
    uniforms: FloatArray


@dataclass(frozen=True)
class Proposal:
    """The distributions that drafts were sampled from. Both arrays are the caller's to keep.

    ``candidates`` is int64 ``[batch, width - 1, k]``, different tokens in each row; ``probabilities`` float32
    of the same shape, each row's sum 1. Other tokens have probability 0, given the drafts before them.
    """

    candidates: IntArray
    probabilities: FloatArray
