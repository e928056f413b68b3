"""From the logits of one row to a token: pure functions on numpy arrays.

The work for each row grows with the vocabulary, so what can be is one pass over float32, and only the few
tokens that survive are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dflash_rt.backends.base import FloatArray, IntArray
from dflash_rt.sampling import SamplingParams, TokenLogprob

__all__ = ["Distribution", "distribution", "penalised", "token_logprob"]

_BLOCK = 256
_STEEPEST = 1e38  # 1 / temperature, kept finite in float32: 0 times it is still 0


@dataclass(frozen=True, eq=False)
class Distribution:
    """Probabilities of tokens, not normalised.

    Attributes:
        weights: float32 ``[kept]``, at least one of them positive; a token's probability is its weight
            divided by the sum.
        ids: int64 ``[kept]``, ascending: whose weights they are; ``None`` when it is the whole vocabulary.
    """

    weights: FloatArray
    ids: IntArray | None = None

    def pick(self, uniform: float) -> int:
        """The token at ``uniform``, in ``[0, 1)``, of the cumulative distribution in the order of ids.

        That is the first token whose weight together with those before it is above ``uniform`` times the
        sum. A token without weight is never picked; a larger ``uniform`` never gives a smaller id.
        """
        index = _first_above(self.weights, uniform)
        return index if self.ids is None else int(self.ids[index])

    def probabilities(self, vocab_size: int) -> npt.NDArray[np.float64]:
        """Normalised, float64 ``[vocab_size]``."""
        dense: npt.NDArray[np.float64] = np.zeros(vocab_size)
        dense[slice(None) if self.ids is None else self.ids] = self.weights
        dense /= dense.sum()
        return dense


def penalised(
    logits: FloatArray, params: SamplingParams, *, seen: IntArray, output: IntArray, counts: FloatArray
) -> FloatArray:
    """A copy of ``logits``, float32 ``[vocab]``, with the three penalties.

    ``seen`` is int64, the distinct tokens of prompt and output; ``output`` those of the output alone, with
    float32 ``counts`` of the same length that tell how often each came. The repetition penalty is that of
    transformers (arXiv 1909.05858), the other two are those of OpenAI's API.
    """
    scores: FloatArray = logits.copy()
    if params.repetition_penalty != 1:
        values = scores[seen]
        factors = np.where(values < 0, params.repetition_penalty, 1 / params.repetition_penalty)
        scores[seen] = values * factors.astype(np.float32)
    scores[output] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def distribution(logits: FloatArray, params: SamplingParams) -> Distribution:
    """Temperature, then ``top_k``, ``top_p`` and ``min_p``: the order of transformers' ``generate``.

    ``logits`` is float32 ``[vocab]``, finite, after penalties. ``params.temperature`` is above 0.
    """
    ids: IntArray | None = None
    peak = logits.max()
    if 0 < params.top_k < logits.size:
        rank = logits.size - params.top_k
        ids = np.flatnonzero(logits >= np.partition(logits, rank)[rank])  # ties with the k-th stay
        logits = logits[ids]
    with np.errstate(over="ignore", under="ignore"):  # far below the peak a weight is 0
        weights = logits - peak
        weights *= np.float32(min(1.0 / params.temperature, _STEEPEST))
        np.exp(weights, out=weights)
    if params.top_p < 1:
        weights, ids = _kept(weights, ids, _nucleus(weights, params.top_p))
    if params.min_p > 0:  # the largest weight is 1
        weights, ids = _kept(weights, ids, np.flatnonzero(weights >= params.min_p))
    return Distribution(weights, ids)


def token_logprob(logits: FloatArray, token: int, top: int) -> TokenLogprob:
    """Log-softmax of one row, float32 ``[vocab]``, at ``token`` and at the ``top`` best tokens.

    Of two equally probable tokens the one with the lower id comes first.
    """
    shifted = logits - logits.max()
    with np.errstate(under="ignore"):
        log_total = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    best: IntArray = np.empty(0, np.int64)
    if top > 0:
        rank = max(logits.size - top, 0)
        candidates = np.flatnonzero(logits >= np.partition(logits, rank)[rank])
        best = candidates[np.argsort(-logits[candidates], kind="stable")[:top]]
    return TokenLogprob(
        token,
        float(shifted[token]) - log_total,
        tuple((int(i), float(shifted[i]) - log_total) for i in best),
    )


def _kept(weights: FloatArray, ids: IntArray | None, indices: IntArray) -> tuple[FloatArray, IntArray]:
    return weights[indices], indices if ids is None else ids[indices]


def _nucleus(weights: FloatArray, top_p: float) -> IntArray:
    """Indices, ascending, of the fewest heaviest tokens that reach ``top_p`` of the sum, at least one.

    Of two equal ones the lower id is taken first.
    """
    total = float(weights.sum(dtype=np.float64))
    # Tokens below an n-th of the mass that is to be cut weigh less than it together: they are cut, all of
    # them. What is left to sort is short, unless the distribution is flat. The 0.999 covers rounding.
    heavy = weights[weights >= 0.999 * (1 - top_p) * total / weights.size]
    heavy[::-1].sort()  # values alone: sorting indices takes twenty times as long
    last = _first_reaching(heavy, top_p * total, "left")
    lightest = heavy[last]
    kept = np.flatnonzero(weights >= lightest)
    surplus = kept.size - (last + 1)
    if surplus > 0:  # ties with the lightest one
        ties = np.flatnonzero(weights == lightest)
        kept = np.setdiff1d(kept, ties[ties.size - surplus :], assume_unique=True)
    return kept


def _first_above(weights: FloatArray, uniform: float) -> int:
    """The first index whose running sum is above ``uniform`` times the whole sum."""
    if weights.size <= _BLOCK:
        sums = weights.cumsum(dtype=np.float64)
        return int(sums.searchsorted(uniform * sums[-1], side="right"))
    return _first_reaching(weights, uniform * _block_sums(weights)[-1], "right")


def _first_reaching(weights: FloatArray, target: float, side: Literal["left", "right"]) -> int:
    """The first index whose running sum is at least (``left``) or above (``right``) ``target``.

    If rounding hides it, the last index that has weight.
    """
    blocks = _block_sums(weights)
    block = min(int(blocks.searchsorted(target, side=side)), blocks.size - 1)
    before = blocks[block - 1] if block else 0.0
    begin = block * _BLOCK
    inside = weights[begin : begin + _BLOCK]
    index = int(inside.cumsum(dtype=np.float64).searchsorted(target - before, side=side))
    if index == inside.size:
        index = int(np.flatnonzero(inside)[-1])
    return begin + index


def _block_sums(weights: FloatArray) -> npt.NDArray[np.float64]:
    """Running sums at the end of each block; one over single weights would take most of the time of a row."""
    sums: npt.NDArray[np.float64] = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)).cumsum(
        dtype=np.float64
    )
    return sums
