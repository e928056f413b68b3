"""From the logits of one row to a token: pure functions on numpy arrays.

A row costs time in proportion to the vocabulary. So most work is single passes over float32, and only the few
tokens that remain are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.sampling.params import SamplingParams, TokenLogprob

__all__ = ["GROUP", "Distribution", "distribution", "noise_size", "penalised", "race", "token_logprob"]

GROUP = 256
"""Tokens with neighbouring ids that :meth:`Distribution.pick` takes together."""

_BLOCK = 256
_STEEPEST = 1e38  # 1 / temperature, kept finite in float32: 0 times it is still 0


@dataclass(frozen=True, eq=False)
class Distribution:
    """Probabilities of tokens, not normalised.

    Attributes:
        weights: float32 ``[kept]``, at least one of them positive; a token's probability is its weight
            divided by the sum.
        ids: int64 ``[kept]``, ascending: the tokens of the weights; ``None`` for the whole vocabulary.
    """

    weights: FloatArray
    ids: IntArray | None = None

    def pick(self, noise: npt.NDArray[np.float64]) -> int:
        """The token that ``noise`` chooses: a group of ``GROUP`` tokens first, then one of its tokens.

        ``noise`` is float64 ``[noise_size(vocab)]``, independent and exponential with mean 1: a number for
        each place in a group, then one for each group. Both choices are races (:func:`race`): a group wins
        with the probability of all its tokens, and a token with its share of the group, so each token is
        chosen with its probability. A token's numbers don't depend on the weights, so weights that differ by
        rounding choose another token only with a chance as small as that difference. With a cumulative
        distribution each boundary would move with all weights before it.

        A token without weight is never chosen.
        """
        within, between = noise[:GROUP], noise[GROUP:]
        if between.size == 0:  # the vocabulary is one group
            index = int(race(self.weights, within if self.ids is None else within[self.ids]))
            return index if self.ids is None else int(self.ids[index])
        if self.ids is None:
            sums = np.add.reduceat(self.weights, np.arange(0, self.weights.size, GROUP))
            first = GROUP * int(race(sums, between))
            members = self.weights[first : first + GROUP]
            return first + int(race(members, within[: members.size]))
        groups = self.ids // GROUP
        firsts = np.flatnonzero(np.diff(groups, prepend=-1))
        sums = np.add.reduceat(self.weights, firsts)
        chosen = int(race(sums, between[groups[firsts]]))
        first, last = np.append(firsts, groups.size)[chosen : chosen + 2]
        ids = self.ids[first:last]
        return int(ids[race(self.weights[first:last], within[ids % GROUP])])

    def probabilities(self, vocab_size: int) -> npt.NDArray[np.float64]:
        """Normalised, float64 ``[vocab_size]``."""
        dense: npt.NDArray[np.float64] = np.zeros(vocab_size)
        dense[slice(None) if self.ids is None else self.ids] = self.weights
        dense /= dense.sum()
        return dense


def noise_size(vocab_size: int) -> int:
    """How many numbers :meth:`Distribution.pick` takes."""
    groups = -(-vocab_size // GROUP)
    return vocab_size if groups == 1 else GROUP + groups


def race(weights: npt.NDArray[np.floating[Any]], noise: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Index of the smallest ``noise / weights`` on the last axis.

    With independent exponential ``noise`` of mean 1, ``noise / weight`` is exponential with the rate
    ``weight``, and the first of such arrivals is each index with the probability weight / sum of weights.
    That is the Gumbel-max trick without its logarithms (C. Maddison et al., A* Sampling, NeurIPS 2014).
    An index of weight 0 never wins.
    """
    arrivals = np.full(np.broadcast_shapes(weights.shape, noise.shape), np.inf)
    np.divide(noise, weights, out=arrivals, where=weights > 0)
    winners: npt.NDArray[np.intp] = arrivals.argmin(-1)
    return winners


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
    # All tokens lighter than (mass to cut) / vocab weigh less than that mass together, so all of them are cut
    # before sorting. Few remain unless the distribution is flat. The 0.999 covers rounding.
    heavy = weights[weights >= 0.999 * (1 - top_p) * total / weights.size]
    heavy[::-1].sort()  # values alone: sorting indices takes twenty times as long
    last = _first_reaching(heavy, top_p * total)
    lightest = heavy[last]
    kept = np.flatnonzero(weights >= lightest)
    surplus = kept.size - (last + 1)
    if surplus > 0:  # ties with the lightest one
        ties = np.flatnonzero(weights == lightest)
        kept = np.setdiff1d(kept, ties[ties.size - surplus :], assume_unique=True)
    return kept


def _first_reaching(weights: FloatArray, target: float) -> int:
    """First index whose running sum reaches ``target``; if rounding prevents that, the last with weight."""
    blocks = _block_sums(weights)
    block = min(int(blocks.searchsorted(target)), blocks.size - 1)
    before = blocks[block - 1] if block else 0.0
    begin = block * _BLOCK
    inside = weights[begin : begin + _BLOCK]
    index = int(inside.cumsum(dtype=np.float64).searchsorted(target - before))
    if index == inside.size:
        index = int(np.flatnonzero(inside)[-1])
    return begin + index


def _block_sums(weights: FloatArray) -> npt.NDArray[np.float64]:
    """Running sums at the end of each block. Running sums of single weights would dominate a row's time."""
    sums: npt.NDArray[np.float64] = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)).cumsum(
        dtype=np.float64
    )
    return sums
