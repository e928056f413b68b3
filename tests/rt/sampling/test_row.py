"""Sampling from one row of logits, and the random numbers that it takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from dflash_rt.arrays import FloatArray
from dflash_rt.sampling.distribution import GROUP, Distribution, distribution, penalised, token_logprob
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.random_numbers import Noise, Uniforms

# --- one row ----------------------------------------------------------------------------------------------


def random_row(seed: int, size: int, spread: float, ties: bool) -> FloatArray:
    row = np.random.default_rng(seed).normal(0, spread, size)
    return (np.round(row) if ties else row).astype(np.float32)


ROWS = st.builds(
    random_row,
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 5, 100, 256, 257, 1000]),
    st.sampled_from([0.1, 1.0, 4.0, 30.0]),
    st.booleans(),
)


def by_transformers(logits: FloatArray, params: SamplingParams) -> npt.NDArray[np.float64]:
    ids, scores = torch.zeros((1, 0), dtype=torch.int64), torch.from_numpy(logits)[None].double()
    scores = logits_process.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = logits_process.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = logits_process.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = logits_process.MinPLogitsWarper(params.min_p)(ids, scores)
    probabilities: npt.NDArray[np.float64] = scores.softmax(-1)[0].numpy()
    return probabilities


@settings(deadline=None, max_examples=300)
@given(
    logits=ROWS.filter(lambda row: len(set(row.tolist())) == len(row)),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.31, 0.001]),
    min_p=st.sampled_from([0.0, 0.013, 0.3, 1.0]),
)
def test_a_row_is_that_of_transformers(
    logits: FloatArray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = distribution(logits, params).probabilities(logits.size)
    theirs = by_transformers(logits, params)
    if ((ours > 1e-30) != (theirs > 1e-30)).any():  # only rounding at the edge of the nucleus may do this
        before = SamplingParams(temperature=temperature, top_k=top_k)
        reached = np.sort(by_transformers(logits, before))[::-1].cumsum()
        assert abs(reached - top_p).min() < 1e-6
        assert abs((ours > 1e-30).sum() - (theirs > 1e-30).sum()) == 1
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def test_ties_at_the_edge() -> None:
    row = np.zeros(600, np.float32)
    nucleus = distribution(row, SamplingParams(temperature=1.0, top_p=0.5))
    assert nucleus.ids is not None
    assert nucleus.ids.tolist() == list(range(300))  # the fewest, lower ids first
    some = distribution(row, SamplingParams(temperature=1.0, top_k=2))
    assert some.ids is not None
    assert some.ids.size == 600  # as probable as the second
    row[[7, 500]] = 1
    both = distribution(row, SamplingParams(temperature=1.0, top_p=0.0))
    assert both.ids is not None
    assert both.ids.tolist() == [7]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-9, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
def test_extreme_numbers(temperature: float, scale: float) -> None:
    row = np.array([-3, 2.5, 3, -1, 0], np.float32) * np.float32(scale)
    for changes in ({}, {"top_p": 0.5}, {"top_p": 1e-12}, {"min_p": 1.0}, {"top_k": 2}):
        p = distribution(row, SamplingParams(temperature=temperature, **changes))  # type: ignore[arg-type]
        assert np.isfinite(p.weights).all()
        assert p.weights.max() == 1
        tokens = {p.pick(Noise(seed).at(0, 5)) for seed in range(20)}
        assert tokens <= set(range(5))
        if temperature < 1e-8 and scale >= 1:
            assert tokens == {2}


@settings(deadline=None, max_examples=200)
@given(
    size=st.integers(1, 1000),
    empty=st.integers(0, 900),  # tokens before the first with a weight
    share=st.sampled_from([0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_pick_by_definition(size: int, empty: int, share: float, seed: int) -> None:
    """A race of groups by the sums of their weights, then one of the winner's tokens."""
    random = np.random.default_rng(seed)
    weights = random.choice([1e-44, 1e-8, 0.25, 1.0], size) * (random.random(size) < share)
    weights[: min(empty, size - 1)] = 0
    weights[-1] = 1
    noise = Noise(seed).at(3, len(weights))
    dense = np.array(weights, np.float32)
    groups = [dense[first : first + GROUP].astype(np.float64) for first in range(0, dense.size, GROUP)]
    between = noise[GROUP:] if len(groups) > 1 else np.ones(1)
    assert len(between) == len(groups)
    with np.errstate(divide="ignore"):
        group = int(np.argmin(between / [part.sum() for part in groups]))
        member = int(np.argmin(noise[:GROUP][: groups[group].size] / groups[group]))
    ids = np.flatnonzero(dense)
    assert Distribution(dense).pick(noise) == group * GROUP + member
    assert Distribution(dense[ids], ids).pick(noise) == group * GROUP + member
    assert dense[group * GROUP + member] > 0


def test_pick_has_the_distribution() -> None:
    """60,000 choices of 600 tokens in three groups; a false alarm has the chance 1e-6."""
    weights = np.random.default_rng(0).exponential(size=600).astype(np.float32) ** 2
    weights[::7] = 0
    p, runs = Distribution(weights), 60_000
    tokens = [p.pick(Noise(seed).at(0, 600)) for seed in range(runs)]
    found, wanted = np.bincount(tokens, minlength=600), runs * p.probabilities(600)
    assert (found[wanted == 0] == 0).all()
    common = wanted >= 10
    found, wanted = (
        np.append(found[common], found[~common].sum()),
        np.append(wanted[common], wanted[~common].sum()),
    )
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(found) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)) > 1e-6


def test_rounding_hardly_ever_changes_a_choice() -> None:
    """Many tokens of a millionth each: the cumulative distribution's boundaries would lie within rounding."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 1, 49152).astype(np.float32)
    nearly = logits + random.normal(0, 2e-6, logits.size).astype(np.float32)
    params = SamplingParams(temperature=1.5)
    one, other = distribution(logits, params), distribution(nearly, params)
    noises = [Noise(seed).at(0, logits.size) for seed in range(2000)]
    assert sum(one.pick(noise) != other.pick(noise) for noise in noises) == 0


def test_pick_names_tokens_by_id() -> None:
    p = Distribution(np.array([1, 3], np.float32), np.array([4, 9]))
    noise = np.ones(10)
    assert p.pick(noise) == 9
    noise[4] = 0.3
    assert p.pick(noise) == 4


@settings(deadline=None, max_examples=100)
@given(
    logits=ROWS,
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    output=st.lists(st.integers(0, 9), max_size=9),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
)
def test_penalties_by_definition(
    *,
    logits: FloatArray,
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    prompt, output = [t % logits.size for t in prompt], [t % logits.size for t in output]
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logprobs=0
    )
    scores = torch.from_numpy(logits)[None].double()
    scores = logits_process.RepetitionPenaltyLogitsProcessor(repetition)(
        torch.tensor([prompt + output]), scores
    )
    expected = scores[0].numpy().copy()
    for token in set(output):
        expected[token] -= frequency * output.count(token) + presence
    ids, counts = np.unique(np.array(output, np.int64), return_counts=True)
    before = logits.copy()
    ours = penalised(
        logits, params, seen=np.unique(prompt + output), output=ids, counts=counts.astype(np.float32)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert (logits == before).all()


@settings(deadline=None, max_examples=100)
@given(logits=ROWS, token=st.integers(0, 1000), top=st.integers(0, 20))
def test_logprobs_of_a_row(logits: FloatArray, token: int, top: int) -> None:
    token %= logits.size
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    item = token_logprob(logits, token, top)
    assert item.token_id == token
    assert item.logprob == pytest.approx(expected[token], abs=1e-4, rel=1e-6)
    best = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:top]
    assert [i for i, _ in item.top] == best
    assert [p for _, p in item.top] == pytest.approx(expected[best].tolist(), abs=1e-4, rel=1e-6)


# --- random numbers ---------------------------------------------------------------------------------------


def test_uniforms_belong_to_positions() -> None:
    numbers, again = Uniforms(7, 1), Uniforms(7, 1)
    later = again[200]
    assert [numbers[i] for i in range(300)] == [again[i] for i in range(300)]
    assert later == numbers[200]
    others = (Uniforms(8, 1), Uniforms(7, 2))
    assert len({each[i] for each in (numbers, *others) for i in range(300)}) == 900
    assert all(0 <= numbers[i] < 1 for i in range(300))


def test_noise_belongs_to_positions() -> None:
    for vocab, size in ((5, 5), (256, 256), (257, 258), (49152, 448)):
        rows = np.concatenate([Noise(7).at(position, vocab) for position in (3, 0, 1, 2)])
        assert rows.size == 4 * size
        assert len(set(rows.tolist())) == rows.size
        assert (Noise(7).at(3, vocab) == rows[:size]).all()
        assert (Noise(8).at(3, vocab) != rows[:size]).all()
    assert np.concatenate([Noise(seed).at(0, 1000) for seed in range(500)]).mean() == pytest.approx(
        1, abs=0.02
    )


def test_numbers_are_those_that_were_promised() -> None:
    """Saved seeds must give the same text tomorrow."""
    words = np.random.Philox(key=[7, 1]).random_raw(70)
    assert [Uniforms(7, 1)[i] for i in (0, 69)] == [(int(words[i]) >> 11) / 2**53 for i in (0, 69)]
    assert 0 <= Uniforms(2**64 - 1, 1)[0] < 1
    words = np.random.Philox(key=[7, 0]).random_raw(3 * 112 * 4)  # 448 numbers take 112 values of the counter
    uniform = (words[2 * 448 :] >> np.uint64(11)) / 2**53
    assert Noise(7).at(2, 49152).tolist() == (-np.log1p(-uniform)).tolist()
    assert Noise(0).at(0, 5)[0] == -np.log1p(-0.011546754286331562)
    assert np.isfinite(Noise(2**64 - 1).at(2**31, 49152)).all()
