"""Acceptance of a draft that was sampled from a distribution over a few candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.errors import NumericalError
from dflash_rt.sampling.distribution import Distribution

__all__ = ["residual", "verify_sampled"]


def verify_sampled(
    p: Distribution,
    drafted: int,
    candidates: IntArray,
    probabilities: FloatArray,
    *,
    accept: float,
    noise: npt.NDArray[np.float64],
) -> tuple[int, bool]:
    """The token at a draft's position, and whether it is the draft.

    The draft x was sampled from q: ``probabilities`` float32 ``[k]`` of ``candidates`` int64 ``[k]``, all
    different; other tokens have probability 0. It stands with probability min(1, p(x) / q(x)), decided by
    ``accept`` in ``[0, 1)``; otherwise ``noise`` (:meth:`Distribution.pick`) chooses from :func:`residual`.
    Both are independent of x and of one another. The token then has the distribution p exactly (Y. Leviathan
    et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023, appendix A.1).

    Raises NumericalError if ``probabilities`` aren't finite or are all 0.
    """
    weights, places, kept, q = _matched(p, candidates, probabilities)
    index = int(np.flatnonzero(candidates == drafted)[0])
    probability = float(weights[places[index]]) if kept[index] else 0.0
    if accept * q[index] < probability:
        return drafted, True
    return residual(p, candidates, probabilities).pick(noise), False


def residual(p: Distribution, candidates: IntArray, probabilities: FloatArray) -> Distribution:
    """max(0, p - q), the distribution after a rejected draft; q as in :func:`verify_sampled`."""
    weights, places, kept, q = _matched(p, candidates, probabilities)
    weights[places[kept]] -= q[kept]
    np.maximum(weights, 0, out=weights)
    if weights.sum() == 0:  # p equals q but for rounding
        return p
    return Distribution(weights.astype(np.float32), p.ids)


def _matched(
    p: Distribution, candidates: IntArray, probabilities: FloatArray
) -> tuple[npt.NDArray[np.float64], IntArray, npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """p normalised, each candidate's index in it, whether p holds the candidate at all, and q normalised."""
    q = probabilities.astype(np.float64)
    total = q.sum()
    if not 0 < total < np.inf:  # true for NaN too, which no comparison below would notice
        raise NumericalError(
            "the drafter gave invalid probabilities",
            found=f"a sum of {total} over {q.size} candidates",
            expected="finite probabilities whose sum is 1",
            remedy="check the bundle with `dflash-export inspect`; if it is whole, report this",
        )
    q /= total  # the drafter's float32 sum is only close to 1
    weights = p.weights.astype(np.float64)
    weights /= weights.sum()
    places = candidates if p.ids is None else np.searchsorted(p.ids, candidates)
    kept = np.ones(len(places), bool)
    if p.ids is not None:  # p may exclude a candidate
        kept = p.ids[np.minimum(places, len(p.ids) - 1)] == candidates
    return weights, places, kept, q
