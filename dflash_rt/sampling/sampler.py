"""Chooses the tokens of one request from the target's logits, drafted or not.

The rule. Every output position t has random numbers u(t), a function of the seed and of t alone. Let p be
the target's distribution after the request's penalties and filters. The token at t is y = F(p, u(t)), the
choice of ``Distribution.pick``. A draft x stands if and only if x == y.

Why that is the accept-or-resample rule of speculative sampling. The drafter proposes x by argmax, without
looking at u(t). So a draft is accepted with probability P(y == x) = p(x), and after a rejection y has the
distribution P(y | y != x) = p(y) / (1 - p(x)): p without x, renormalised. After the last accepted draft the
next row's y is the bonus, from p itself. No choice depends on whether there was a draft, so a seed gives the
same text however many tokens are drafted, as far as the logits are the same.

A drafter may also sample its proposals and report their distribution q (DFlash 2 does). Then a draft x stands
with probability min(1, p(x) / q(x)), and after a rejection u(t) chooses the token from max(0, p - q). More
drafts stand than by the first rule. Drafts and verdicts have random numbers d(t) and a(t), also functions of
the seed and of t. No emitted token depends on those of positions behind a rejection, so the next pass may use
them again. Tokens have the same distribution, but a seed's tokens depend on which positions were drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.sampling.distribution import Distribution, distribution, penalised, token_logprob
from dflash_rt.sampling.greedy import accept_in_order
from dflash_rt.sampling.params import SamplingParams, TokenLogprob
from dflash_rt.sampling.proposal import DraftSampling, Proposal
from dflash_rt.sampling.random_numbers import Noise, Uniforms
from dflash_rt.sampling.rejection import verify_sampled

__all__ = ["Sampler"]

_DRAFTS, _VERDICTS = 1, 2  # streams of numbers


class _Counts:
    """Distinct token ids in order of appearance, and how often each came."""

    def __init__(self, ids: IntArray) -> None:
        self.ids = ids
        self.counts = np.ones(ids.size, np.float32)
        self._slots = {int(token): slot for slot, token in enumerate(ids)}

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, self.ids.size)
        if slot == self.ids.size:
            self.ids = np.append(self.ids, token)
            self.counts = np.append(self.counts, np.float32(0))
        self.counts[slot] += 1


class Sampler:
    """A request's random numbers, the token counts of its penalties, and its logprobs.

    ``params`` has a seed if its temperature is above 0 (:meth:`SamplingParams.seeded`). ``prompt`` is int64
    ``[rows]``. Every chosen token counts as emitted, so a row is chosen only after the drafts before it were
    accepted.

    Attributes:
        logprobs: one item for each token chosen so far, if the parameters ask for them.
    """

    def __init__(self, params: SamplingParams, prompt: IntArray) -> None:
        self.logprobs: list[TokenLogprob] = []
        self._params = params
        seed = int(params.seed or 0)
        self._noise = Noise(seed)
        self._draft_uniforms, self._verdict_uniforms = Uniforms(seed, _DRAFTS), Uniforms(seed, _VERDICTS)
        self._position = 0
        # Only penalties read these counts, so other requests keep none.
        self._seen = _Counts(np.unique(prompt[: prompt.size if params.has_penalties else 0]))
        self._output = _Counts(np.empty(0, np.int64))

    def draft_sampling(self, count: int) -> DraftSampling | None:
        """How the next ``count`` drafts are sampled; ``None`` at temperature 0, where none is."""
        if self._params.temperature == 0:
            return None
        numbers = [self._draft_uniforms[self._position + ahead] for ahead in range(count)]
        # Cut to float32's 24 bits, not rounded, since 1.0 lies outside [0, 1).
        uniforms = np.floor(np.array([numbers]) * 2.0**24) * 2.0**-24
        temperature = np.array([self._params.temperature], np.float32)
        return DraftSampling(temperature, uniforms.astype(np.float32))

    def choose(
        self, logits: FloatArray, drafted: Sequence[int] = (), proposal: Proposal | None = None
    ) -> list[int]:
        """The tokens of a step: the accepted drafts, and one after them.

        ``logits`` is float32 ``[len(drafted) + 1, vocab]``, the target's after each row; it isn't changed,
        and rows behind the first rejected draft aren't read. With ``proposal`` the drafts were sampled by
        :meth:`draft_sampling`.
        """
        if proposal is None:
            return accept_in_order(drafted, lambda row: self._choose_one(logits[row]))
        tokens: list[int] = []
        for row, draft in enumerate(drafted):
            token, stands = verify_sampled(
                self._distribution(logits[row]),
                draft,
                proposal.candidates[0, row],
                proposal.probabilities[0, row],
                accept=self._verdict_uniforms[self._position],
                noise=self._noise.at(self._position, logits.shape[1]),
            )
            tokens.append(self._emit(logits[row], token))
            if not stands:
                return tokens
        return [*tokens, self._choose_one(logits[len(drafted)])]

    def _choose_one(self, logits: FloatArray) -> int:
        """The target's choice of the next token."""
        if self._params.temperature == 0:
            return self._emit(logits, int(self._scores(logits).argmax()))
        noise = self._noise.at(self._position, logits.size)
        return self._emit(logits, self._distribution(logits).pick(noise))

    def _distribution(self, logits: FloatArray) -> Distribution:
        return distribution(self._scores(logits), self._params)

    def _scores(self, logits: FloatArray) -> FloatArray:
        if not self._params.has_penalties:
            return logits
        output = self._output
        return penalised(logits, self._params, seen=self._seen.ids, output=output.ids, counts=output.counts)

    def _emit(self, logits: FloatArray, token: int) -> int:
        params = self._params
        if params.logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, params.logprobs))
        if params.has_penalties:
            self._seen.add(token)
            self._output.add(token)
        self._position += 1
        return token
