"""Acceptance of a draft that was itself sampled, from a distribution over a few candidates."""

from __future__ import annotations

import numpy as np

from dflash_rt.backends.base import FloatArray, IntArray
from dflash_rt.distribution import Distribution

__all__ = ["verify_sampled"]


def verify_sampled(
    p: Distribution,
    drafted: int,
    candidates: IntArray,
    probabilities: FloatArray,
    *,
    accept: float,
    pick: float,
) -> tuple[int, bool]:
    """The token at the place of a draft, and whether it is the draft.

    The draft x was sampled from q: ``probabilities`` float32 ``[k]`` of ``candidates`` int64 ``[k]``, all
    different; other tokens have none. It stands with probability min(1, p(x) / q(x)), which ``accept``
    decides; otherwise the token comes from max(0, p - q), normalised, at ``pick``. Both numbers are in
    ``[0, 1)`` and independent of x and of one another. The token then has the distribution p exactly
    (Y. Leviathan et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023, appendix A.1).
    """
    q = probabilities.astype(np.float64)
    q /= q.sum()  # what the drafter's own sum in float32 left over
    weights = p.weights.astype(np.float64)
    weights /= weights.sum()
    places = candidates if p.ids is None else np.searchsorted(p.ids, candidates)
    kept = np.ones(len(places), bool)
    if p.ids is not None:  # a candidate that p excludes has no place in it
        kept = p.ids[np.minimum(places, len(p.ids) - 1)] == candidates
    index = int(np.flatnonzero(candidates == drafted)[0])
    probability = float(weights[places[index]]) if kept[index] else 0.0
    if accept * q[index] < probability:
        return drafted, True
    weights[places[kept]] -= q[kept]
    np.maximum(weights, 0, out=weights)
    if weights.sum() == 0:  # p equals q but for rounding
        return p.pick(pick), False
    return Distribution(weights.astype(np.float32), p.ids).pick(pick), False
