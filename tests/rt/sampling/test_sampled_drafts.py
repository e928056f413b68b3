"""Drafts that are sampled themselves, as DFlash 2's are: the joint distribution of tokens stays the target's.

The same proof as test_distribution.py, which has the models, the exact distribution and the test
statistic. The drafter samples from the three best tokens of another model, at the request's temperature.
There are fewer than 40 chi-square tests here that a correct sampler fails by chance, with probability LEVEL
each: below 4e-5 together. The same part of them is slow.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Inject, StepOutput
from dflash_rt.errors import NumericalError
from dflash_rt.sampling.distribution import Distribution
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.proposal import DraftSampling, Proposal
from dflash_rt.sampling.random_numbers import Uniforms
from dflash_rt.sampling.rejection import residual, verify_sampled
from dflash_rt.sampling.sampler import Sampler
from tests.rt.sampling.test_distribution import (
    FAST,
    FEW,
    LENGTH,
    LEVEL,
    PROMPT,
    RUNS,
    SETTINGS,
    VOCAB,
    Counts,
    Floats,
    TableBackend,
    Tokens,
    count,
    decoded,
    exact,
    few_and_all,
    noises,
    our_distribution,
    p_value,
    pick_all,
    requests,
    table,
    target,
)

CANDIDATES = 3
Indices = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float32]


def proposal(prefix: Tokens, temperature: float) -> tuple[Indices, Probabilities]:
    """Candidates, best first, and q: another model's softmax over them."""
    logits = table(1)[prefix[len(PROMPT) :][: LENGTH - 1]]
    candidates = np.argsort(-logits)[:CANDIDATES]
    weights = np.exp((logits[candidates] - logits.max()) / np.float32(temperature))
    return candidates, (weights / weights.sum()).astype(np.float32)


def sample(q: Probabilities, numbers: Floats) -> Indices:
    """The graph's rule: the first place whose running sum is above the number."""
    sums = q.cumsum(dtype=np.float64)
    return np.minimum(np.searchsorted(sums, numbers * sums[-1], side="right"), CANDIDATES - 1)


class SamplingBackend(TableBackend):
    """Samples its drafts when it is told how; see :class:`TableBackend`."""

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        assert sampling is not None
        assert sampling.uniforms.shape == (1, verify_len - 1)
        assert sampling.uniforms.dtype == sampling.temperature.dtype == np.float32
        output = (*self._output[: int(start[0]) - len(PROMPT)], int(anchors[0]))
        rows, candidates, probabilities = [target(PROMPT + output)], [], []
        for number in sampling.uniforms[0]:
            tokens, q = proposal(PROMPT + output, float(sampling.temperature[0]))
            output = (*output, int(tokens[sample(q, np.array([number]))[0]]))
            candidates.append(tokens)
            probabilities.append(q)
            rows.append(target(PROMPT + output))
        self._output, self._now = output, np.array([rows])
        drafted = np.array([output[len(output) - verify_len + 1 :]], np.int64).reshape(1, verify_len - 1)
        return StepOutput(
            drafted,
            np.zeros((1, verify_len), np.int64),
            Proposal(np.array([candidates]), np.array([probabilities], np.float32)),
        )


@pytest.mark.parametrize("wrong", [[np.nan, np.nan, np.nan], [1, np.nan, 0], [0, 0, 0], [np.inf, 0, 0]])
def test_probabilities_that_are_none_are_refused(wrong: list[float]) -> None:
    p = Distribution(np.array([0, 0, 0, 1], np.float32))
    candidates, q = np.array([3, 0, 1]), np.array(wrong, np.float32)
    with pytest.raises(NumericalError, match="invalid probabilities"):
        verify_sampled(p, 3, candidates, q, accept=0.5, noise=np.ones(4))
    with pytest.raises(NumericalError, match="invalid probabilities"):
        residual(p, candidates, q)


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-45, 1e-300])
def test_the_coldest_temperatures_take_the_best_token(temperature: float) -> None:
    """Whether the drafter proposed it or another one, with q as cold as p."""
    params = SamplingParams(temperature=temperature, seed=3)
    logits = np.array([[0.0, 60.0, -60.0, 90.0]] * 2, np.float32)
    candidates = np.array([[[3, 1, 0]]])
    for draft in (3, 1):
        q = np.array([[candidates[0, 0] == draft]], np.float32)
        tokens = Sampler(params, np.array([0])).choose(logits, [draft], Proposal(candidates, q))
        assert tokens == ([3, 3] if draft == 3 else [3])
        sampling = Sampler(params, np.array([0])).draft_sampling(1)
        assert sampling is not None
        assert np.isfinite(sampling.temperature).all()


@cache
def stream(number: int, runs: int) -> Floats:
    """Another stream of random numbers for the same seeds, float64 ``[runs, 4]``."""
    return np.array([[u[0], u[1], u[2], u[3]] for u in (Uniforms(seed, number) for seed in range(runs))])


Choose = Callable[[Distribution, int, Indices, Probabilities, Floats, Floats], Counts]
"""p, draft, candidates, q, verdicts' and choices' numbers of each run -> token of each run."""


def ours(
    p: Distribution, draft: int, candidates: Indices, q: Probabilities, accept: Floats, noise: Floats
) -> Counts:
    """``verify_sampled`` of each run. Its verdict is monotone: a few calls find where it changes."""

    def rejected(number: float) -> bool:
        return not verify_sampled(p, draft, candidates, q, accept=number, noise=noise[0])[1]

    ordered = np.sort(accept).tolist()
    standing = bisect.bisect_left(ordered, True, key=rejected)
    stands = accept < (ordered[standing] if standing < len(ordered) else 1.0)
    return np.where(stands, draft, pick_all(residual(p, candidates, q), noise))


def walk(params: SamplingParams, runs: int, choose: Choose = ours, verdicts: int = 2) -> Counts:
    """Outputs of the first seeds when every place but the first is drafted, int64 ``[runs, 4]``."""
    noise, drafts, accepts = noises(runs), stream(1, runs), stream(verdicts, runs)
    drafts = np.floor(drafts * 2.0**24) * 2.0**-24  # as float32 has them
    tokens = np.zeros(drafts.shape, np.int64)
    groups: dict[Tokens, npt.NDArray[np.intp]] = {(): np.arange(len(drafts))}
    for position in range(LENGTH):
        longer = {}
        for output, these in groups.items():
            p = our_distribution(params, output)
            mixed = noise[these, position]
            chosen = pick_all(p, mixed)
            if position > 0:  # the prefill's token is never drafted
                candidates, q = proposal(PROMPT + output, params.temperature)
                places = sample(q, drafts[these, position])
                for place, draft in enumerate(candidates.tolist()):
                    mine = places == place
                    if mine.any():
                        accept = accepts[these, position][mine]
                        chosen[mine] = choose(p, draft, candidates, q, accept, mixed[mine])
            tokens[these, position] = chosen
            for token in np.unique(chosen):
                longer[(*output, int(token))] = these[chosen == token]
        groups = longer
    return tokens


@pytest.mark.parametrize(("name", "runs"), few_and_all(*FAST))
def test_the_joint_distribution_is_the_targets(name: str, runs: int) -> None:
    params = SETTINGS[name]
    tokens = walk(params, runs)
    assert p_value(count(tokens), exact(params)) > LEVEL
    # A block of 5 drafts every place but the first, so that whole requests are the same walk.
    found = requests(params, 300, width=5, backend=SamplingBackend())
    assert (found == tokens[:300]).all()


@pytest.mark.parametrize("runs", [FEW // 10, pytest.param(RUNS // 10, marks=pytest.mark.slow)])
def test_whole_requests_with_a_bonus_have_it_too(runs: int) -> None:
    params = SETTINGS["T=1.0 none"]  # at width 3 the fourth token may be a bonus
    tokens = requests(params, runs, width=3, backend=SamplingBackend())
    assert p_value(count(tokens), exact(params)) > LEVEL


def from_p(
    p: Distribution, draft: int, candidates: Indices, q: Probabilities, accept: Floats, noise: Floats
) -> Counts:
    """A wrong residual: what was rejected gets a second chance."""
    stands = accept * q[candidates == draft] < p.probabilities(VOCAB)[draft]
    return np.where(stands, draft, pick_all(p, noise))


def without_q(
    p: Distribution, draft: int, candidates: Indices, q: Probabilities, accept: Floats, noise: Floats
) -> Counts:
    """The rule for drafts that weren't sampled: accepted with p(x), and the residual without x."""
    dense = p.probabilities(VOCAB)
    rest = np.where(np.arange(VOCAB) == draft, 0, dense).astype(np.float32)
    again = pick_all(Distribution(rest), noise) if rest.any() else np.full(len(noise), draft)
    return np.where(accept < dense[draft], draft, again)


# --- widths that change from step to step ---


@dataclass
class Told:
    """A policy that is told its widths, again and again."""

    widths: list[int]
    widest: int = 5
    chosen: int = 0

    def choose(self) -> int:
        self.chosen += 1
        return self.widths[(self.chosen - 1) % len(self.widths)]

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        pass


@dataclass
class Following(Told):
    """As wide as the last step was lucky: what comes depends on what was sampled before."""

    widths: list[int] = field(default_factory=lambda: [3])

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        self.widths = [accepted + 2 if accepted + 1 < width else 1 + width % 3]


PATTERNS: dict[str, Callable[[int], Told]] = {
    "narrow, plain, wide": lambda seed: Told([2, 1, 3]),
    "plain, then wide": lambda seed: Told([1, 5]),
    "any": lambda seed: Told(np.random.default_rng([seed, 9]).integers(1, 6, LENGTH).tolist()),
    "by what was accepted": lambda seed: Following(),
}
FORCED = [
    ("narrow, plain, wide", "T=1.0 none"),
    ("plain, then wide", "T=0.5 top-p"),
    ("any", "all at once"),
    ("by what was accepted", "T=1.0 none"),
]
FORCED_RUNS = 4_000


def forced(pattern: str, name: str) -> float:
    """The p-value of requests whose widths are forced step by step."""
    params = SETTINGS[name]
    tokens = decoded(params, FORCED_RUNS, PATTERNS[pattern], SamplingBackend())
    return p_value(count(tokens), exact(params))


@pytest.mark.parametrize(("pattern", "name"), FORCED)
def test_forced_widths_keep_the_distribution(pattern: str, name: str) -> None:
    assert forced(pattern, name) > LEVEL


def second_chance(
    p: Distribution, drafted: int, candidates: IntArray, q: Probabilities, *, accept: float, noise: Floats
) -> tuple[int, bool]:
    """A wrong rule: after a rejection the token comes from p itself."""
    token, stands = verify_sampled(p, drafted, candidates, q, accept=accept, noise=noise)
    return (token if stands else p.pick(noise)), stands


@pytest.mark.parametrize(("pattern", "name"), [FORCED[0], FORCED[2]])
def test_a_wrong_rule_at_forced_widths_fails(
    pattern: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_rt.sampling.sampler.verify_sampled", second_chance)
    assert forced(pattern, name) < LEVEL


@pytest.mark.parametrize("name", ["T=1.0 none", "T=0.5 top-k", "T=1.5 penalties", "all at once"])
@pytest.mark.parametrize("runs", [FEW, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_wrong_rules_fail(name: str, runs: int) -> None:
    params = SETTINGS[name]
    assert p_value(count(walk(params, runs, from_p)), exact(params)) < LEVEL
    # A verdict that knows the number that the draft came from.
    assert p_value(count(walk(params, runs, verdicts=1)), exact(params)) < LEVEL


@pytest.mark.parametrize("runs", [FEW, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_the_rule_for_drafts_that_were_not_sampled_is_exact_but_accepts_less(runs: int) -> None:
    params = SETTINGS["T=1.0 none"]
    assert p_value(count(walk(params, runs, without_q)), exact(params)) > LEVEL
    outputs: tuple[Tokens, ...] = ((0,), (1, 2), (3,), (4, 4))
    accepted, less = (
        np.array([_acceptance(params, choose, output) for output in outputs]) for choose in (ours, without_q)
    )
    overlaps = []
    for output in outputs:
        candidates, q = proposal(PROMPT + output, params.temperature)
        dense = our_distribution(params, output).probabilities(VOCAB)
        overlaps.append(np.minimum(dense[candidates], q).sum())
    np.testing.assert_allclose(accepted, overlaps, atol=0.02)  # nothing can accept more
    assert (accepted > less).all()


def _acceptance(params: SamplingParams, choose: Choose, output: Tokens) -> float:
    """Probability that a draft is the token, over many numbers."""
    p = our_distribution(params, output)
    candidates, q = proposal(PROMPT + output, params.temperature)
    accept = (np.arange(3600) + 0.5) / 3600
    noise = np.random.default_rng(0).exponential(size=(accept.size, VOCAB))
    shares = [
        float((choose(p, draft, candidates, q, accept, noise) == draft).mean())
        for draft in candidates.tolist()
    ]
    return float(np.dot(shares, q))


@settings(deadline=None, max_examples=60)
@given(
    p=st.lists(st.integers(0, 8), min_size=VOCAB, max_size=VOCAB).filter(any),
    q=st.lists(st.integers(0, 8), min_size=CANDIDATES, max_size=CANDIDATES).filter(any),
    candidates=st.permutations(range(VOCAB)),
    truncated=st.booleans(),
)
def test_each_token_has_its_probability(
    p: list[int], q: list[int], candidates: list[int], truncated: bool
) -> None:
    """Acceptance and residual added up exactly: sum over x of q(x) * P(token | x) is p."""
    weights = np.array(p, np.float32)
    ids = np.flatnonzero(weights) if truncated else None
    target_p = Distribution(weights if ids is None else weights[ids], ids)
    chosen, probabilities = np.array(candidates[:CANDIDATES]), np.array(q, np.float32) / sum(q)
    dense, proposed = target_p.probabilities(VOCAB), np.zeros(VOCAB)
    proposed[chosen] = probabilities
    found = np.zeros(VOCAB)
    rest = np.maximum(dense - proposed, 0)
    noise = np.random.default_rng(0).exponential(size=VOCAB)
    for draft in chosen[probabilities > 0].tolist():
        stands = min(1.0, dense[draft] / proposed[draft])
        for number, expected in ((stands * 0.999, True), (stands * 1.001 + 1e-12, False)):
            if number < 1:
                token, accepted = verify_sampled(
                    target_p, draft, chosen, probabilities, accept=number, noise=noise
                )
                assert accepted == (expected and bool(stands > 0))
                assert accepted or token == residual(target_p, chosen, probabilities).pick(noise)
        found[draft] += proposed[draft] * stands
        if stands < 1 - 1e-6:
            again = residual(target_p, chosen, probabilities).probabilities(VOCAB)
            np.testing.assert_allclose(again, rest / rest.sum(), atol=1e-6)
            found += proposed[draft] * (1 - stands) * again
    np.testing.assert_allclose(found, dense, atol=1e-6)


def test_numbers_belong_to_a_place_and_a_purpose() -> None:
    sampler = Sampler(SamplingParams(temperature=0.7, seed=11), np.array(PROMPT))
    first = sampler.draft_sampling(4)
    again = sampler.draft_sampling(2)
    assert first is not None
    assert again is not None
    assert first.uniforms[0, :2].tolist() == again.uniforms[0].tolist()
    assert first.temperature.tolist() == [np.float32(0.7)]
    drafts, verdicts = Uniforms(11, 1)[0], Uniforms(11, 2)[0]
    assert drafts != verdicts
    assert 0 <= drafts - first.uniforms[0, 0] < 2**-24
    sampler.choose(np.zeros((1, VOCAB), np.float32))
    moved = sampler.draft_sampling(3)
    assert moved is not None
    assert moved.uniforms[0].tolist() == first.uniforms[0, 1:].tolist()
    assert Sampler(SamplingParams(), np.array(PROMPT)).draft_sampling(3) is None
