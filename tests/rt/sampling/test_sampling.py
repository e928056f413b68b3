"""Sampling from one row, the sampler, and whole requests; the proof of the distribution is in
test_sampling_distribution.py."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from dflash_rt.arrays import FloatArray
from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.bundle.manifest import SamplingDefaults
from dflash_rt.errors import BackendError, SamplingError
from dflash_rt.generator import Generator
from dflash_rt.request import ModelLimits
from dflash_rt.sampling.distribution import GROUP, Distribution, distribution, penalised, token_logprob
from dflash_rt.sampling.params import RANGES, SamplingParams
from dflash_rt.sampling.random_numbers import Noise, Uniforms
from dflash_rt.sampling.sampler import Sampler
from tests.rt.scripted_generator import END, limits, prompts

HOT = SamplingParams(temperature=1.0)


# --- parameters -------------------------------------------------------------------------------------------


def test_the_defaults_are_greedy() -> None:
    params = SamplingParams()
    assert (params.temperature, params.needs_logits, params.has_penalties) == (0, False, False)
    assert params.seeded() is params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in RANGES
            for value in (float("nan"), float("inf"), -3, "1", None, True, 1j)
        ),
        ("temperature", 100.5),
        ("top_p", 1.01),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("top_k", -1),
        ("top_k", 3.0),
        ("top_k", None),
        ("top_k", True),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("seed", False),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", 1.0),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"{name} is wrong\n  found: .*\n  expected: .*\n  what to do: "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_numbers_of_any_kind_are_numbers(number: Any) -> None:
    assert SamplingParams(temperature=number, top_p=number, seed=np.int64(3)).needs_logits


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 4}, False),
        ({"logprobs": 0}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"temperature": 1e-9}, True),
    ],
)
def test_what_needs_logits(changes: dict[str, Any], needs: bool) -> None:
    assert SamplingParams(**changes).needs_logits is needs


def test_a_manifest_may_say_what_parameters_may() -> None:
    for name, annotation in SamplingDefaults.__annotations__.items():
        for value in (SamplingParams.__dataclass_fields__[name].default, *RANGES.get(name, (0,))):
            assert SamplingParams(**{name: value})
        if name in RANGES:
            assert "Range({}, {})".format(*RANGES[name]) in annotation


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


# --- the sampler ------------------------------------------------------------------------------------------


class Rows:
    """Logits that tell which rows were looked at."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows, self.seen = np.array(rows, np.float32), list[int]()

    def __getitem__(self, row: int) -> FloatArray:
        self.seen.append(row)
        return self.rows[row]  # type: ignore[no-any-return]


def test_rows_behind_a_rejected_draft_are_not_looked_at() -> None:
    rows: Any = Rows([[0, 9, 0], [0, 0, 9], [9, 0, 0], [0, 9, 0]])
    sampler = Sampler(SamplingParams(logprobs=0), np.array([0]))
    assert sampler.choose(rows, [1, 1, 0]) == [1, 2]
    assert rows.seen == [0, 1]
    assert len(sampler.logprobs) == 2
    assert sampler.choose(rows, [1, 2, 0]) == [1, 2, 0, 1]


def test_each_position_has_its_own_number() -> None:
    flat = np.zeros((4, 1000), np.float32)
    even = Distribution(np.ones(1000, np.float32))
    expected = [even.pick(Noise(3).at(position, 1000)) for position in range(8)]
    assert len(set(expected)) > 5
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3), np.array([0]))
    found = sampler.choose(flat[:1])
    found += sampler.choose(flat, expected[1:4])  # all stand, and the bonus
    found += sampler.choose(flat, [expected[5], -1, -1])
    found += sampler.choose(flat[:1])
    assert found == expected


def test_greedy_with_penalties_counts_the_block_s_own_tokens() -> None:
    row = [2.0, 1.5, 1.2]
    sampler = Sampler(SamplingParams(presence_penalty=1.0), np.array([0, 1, 2]))
    assert sampler.choose(np.array([row] * 4, np.float32), [0, 1, 2]) == [0, 1, 2, 0]
    sampler = Sampler(SamplingParams(frequency_penalty=0.4), np.array([0]))
    assert sampler.choose(np.array([row] * 4, np.float32), [0, 0, 1]) == [0, 0, 1, 0]
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), np.array([0]))
    assert sampler.choose(np.array([row] * 3, np.float32), [1, 0]) == [1, 0, 0]


def test_a_draft_of_probability_one_always_stands_and_one_of_zero_never() -> None:
    certain = np.array([[-1e30, 0, -1e30]] * 4, np.float32)
    for seed in range(200):
        params = SamplingParams(temperature=1.0, seed=seed)
        assert Sampler(params, np.array([0])).choose(certain, [1, 1, 1]) == [1, 1, 1, 1]
        assert Sampler(params, np.array([0])).choose(certain, [0, 1, 1]) == [1]
        only = SamplingParams(temperature=1.0, seed=seed, top_k=1)
        assert Sampler(only, np.array([0])).choose(np.array([[1, 2, 0]] * 2, np.float32), [0]) == [1]


# --- whole requests ---------------------------------------------------------------------------------------

SIZE = 258


def story(prefix: tuple[int, ...]) -> FloatArray:
    """Logits that depend on the whole prefix; the text of it ends now and then."""
    random = np.random.default_rng(zlib.crc32(repr(prefix).encode()))
    row = random.normal(0, 1.0, SIZE)
    row[random.integers(97, 107, 6)] += 4.0
    row[END] = 1.0
    return row.astype(np.float32)


def storyteller(**changes: Any) -> Generator:
    known: ModelLimits = limits(stop_token_ids=frozenset({END}), **changes)
    backend = ScriptedBackend.with_logits(
        story, block_size=known.block_size, prefill_chunk=known.prefill_chunk, max_rows=known.max_seq_len
    )
    return Generator.from_parts(known, backend, prompts())


PROMPT = list(range(40, 60))
SAMPLINGS = {
    "temperature": {"temperature": 0.8},
    "everything": {
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logprobs": 2,
    },
    "greedy with penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
}


def tokens_of(generator: Generator, sampling: SamplingParams, **options: Any) -> tuple[int, ...]:
    with generator:
        return generator.generate(PROMPT, max_new_tokens=40, sampling=sampling, **options).token_ids


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_same_seed_same_tokens_at_every_width_and_chunking(name: str, seed: int) -> None:
    sampling = SamplingParams(**SAMPLINGS[name], seed=seed)  # type: ignore[arg-type]
    expected = tokens_of(storyteller(), sampling, speculative=False)
    for width in (1, 2, 3, 5):
        assert tokens_of(storyteller(draft_width=width), sampling) == expected
    for chunk in (1, 7, 64):
        assert tokens_of(storyteller(prefill_chunk=chunk), sampling) == expected


def test_other_seeds_other_tokens() -> None:
    seeded = [SamplingParams(temperature=0.8, seed=seed) for seed in range(10)]
    assert len({tokens_of(storyteller(), sampling) for sampling in seeded}) == 10


def test_drafts_are_accepted_in_part_when_sampling() -> None:
    with storyteller() as generator:
        stats = [
            generator.generate(
                PROMPT, max_new_tokens=40, sampling=SamplingParams(temperature=0.4, seed=seed)
            ).stats
            for seed in range(8)
        ]
    accepted = {count for each in stats for count in each.accepted_per_step}
    assert accepted == {0, 1, 2, 3, 4}


def test_a_drawn_seed_is_reported_and_gives_the_same_again() -> None:
    with storyteller() as generator:
        first = generator.generate(PROMPT, max_new_tokens=40, sampling=HOT)
        second = generator.generate(PROMPT, max_new_tokens=40, sampling=HOT)
        assert first.seed is not None
        assert first.seed != second.seed
        assert first.seed < 2**53
        again = SamplingParams(temperature=1.0, seed=first.seed)
        assert generator.generate(PROMPT, max_new_tokens=40, sampling=again).token_ids == first.token_ids
        assert generator.generate(PROMPT, max_new_tokens=4, sampling=SamplingParams(seed=3)).seed is None


def interruptions(generator: Generator) -> Iterator[None]:
    """Other requests before ours: stopped, cut, cancelled, greedy, and one that was refused."""
    sampling = SamplingParams(temperature=1.1, seed=9)
    stopped = generator.generate(PROMPT, sampling=sampling, stop=["a", "b", "c", "d", "e"], max_new_tokens=80)
    assert stopped.finish_reason == "stop"
    yield
    with generator.stream(PROMPT, sampling=HOT) as stream:
        next(stream)
        next(stream)
    yield
    generator.generate(PROMPT, max_new_tokens=3)
    yield
    with pytest.raises(SamplingError):
        generator.generate(PROMPT, sampling={"temperature": 1})  # type: ignore[arg-type]
    yield


def test_nothing_shifts_later_requests() -> None:
    sampling = SamplingParams(temperature=0.8, seed=5)
    expected = tokens_of(storyteller(), sampling)
    with storyteller() as generator:
        for _ in interruptions(generator):
            assert generator.generate(PROMPT, max_new_tokens=40, sampling=sampling).token_ids == expected


def test_threads_don_t_shift_each_other() -> None:
    seeds = range(8)
    expected = [tokens_of(storyteller(), SamplingParams(temperature=0.8, seed=seed)) for seed in seeds]
    found: dict[int, tuple[int, ...]] = {}
    with storyteller() as generator:

        def run(seed: int) -> None:
            sampling = SamplingParams(temperature=0.8, seed=seed)
            found[seed] = generator.generate(PROMPT, max_new_tokens=40, sampling=sampling).token_ids

        threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[seed] for seed in seeds] == expected


def test_a_stop_cuts_logprobs_with_the_tokens() -> None:
    sampling = SamplingParams(temperature=0.3, seed=5, logprobs=1)
    with storyteller() as generator:
        for stop in "abcdefghij":
            stream = generator.stream(PROMPT, sampling=sampling, stop=[stop], max_new_tokens=60)
            chunks = list(stream)
            result = stream.result
            assert result.logprobs is not None
            assert [item.token_id for item in result.logprobs] == list(result.token_ids)
            for chunk in chunks:
                assert chunk.logprobs is not None
                assert [item.token_id for item in chunk.logprobs] == list(chunk.token_ids)


def test_logprobs_are_of_the_model_s_own_logits() -> None:
    for params in (
        SamplingParams(logprobs=3),
        SamplingParams(logprobs=3, temperature=2.0, top_k=9, repetition_penalty=1.5, seed=2),
    ):
        with storyteller() as generator:
            result = generator.generate(PROMPT, sampling=params, max_new_tokens=20)
        assert result.logprobs is not None
        assert len(result.logprobs) == len(result.token_ids)
        prefix = tuple(PROMPT)
        for item in result.logprobs:
            expected = torch.from_numpy(story(prefix)).double().log_softmax(-1)
            assert item.logprob == pytest.approx(float(expected[item.token_id]), abs=1e-4)
            best = expected.topk(3)
            assert [token for token, _ in item.top] == best.indices.tolist()
            assert [p for _, p in item.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            prefix += (item.token_id,)


def test_asking_for_logprobs_changes_no_token() -> None:
    with storyteller() as generator:
        plain = generator.generate(PROMPT, max_new_tokens=30)
        told = generator.generate(PROMPT, max_new_tokens=30, sampling=SamplingParams(logprobs=0))
        assert plain.logprobs is None
        assert told.token_ids == plain.token_ids
        assert told.stats.accepted_per_step == plain.stats.accepted_per_step
        assert [item.top for item in told.logprobs or ()] == [()] * 30


def test_a_request_without_sampling_gets_the_bundle_s() -> None:
    default = SamplingParams(temperature=0.8, top_k=7)
    with storyteller(sampling=default) as generator:
        result = generator.generate(PROMPT, max_new_tokens=20)
        assert result.seed is not None
        greedy = generator.generate(PROMPT, max_new_tokens=20, sampling=SamplingParams())
        assert greedy.seed is None
    said = SamplingParams(temperature=0.8, top_k=7, seed=result.seed)
    assert tokens_of(storyteller(), said)[:20] == result.token_ids
    assert tokens_of(storyteller(), SamplingParams())[:20] == greedy.token_ids


def test_greedy_requests_never_ask_for_logits() -> None:
    class Deaf(ScriptedBackend):
        def logits(self) -> FloatArray:
            raise AssertionError("asked for logits")

    backend = Deaf.with_logits(story, block_size=5)
    with Generator.from_parts(limits(), backend) as generator:
        assert len(generator.generate(PROMPT, max_new_tokens=9).token_ids) == 9


def test_results_are_json() -> None:
    with storyteller() as generator:
        result = generator.generate(
            PROMPT, max_new_tokens=3, sampling=SamplingParams(temperature=1.0, logprobs=2)
        )
    assert result.logprobs is not None
    text = json.dumps([[item.token_id, item.logprob, item.top] for item in result.logprobs])
    assert len(json.loads(text)) == 3


# --- the scripted backend's own checks --------------------------------------------------------------------


def test_the_fake_refuses_what_no_sampler_does() -> None:
    def started() -> ScriptedBackend:
        backend = ScriptedBackend.with_logits(lambda prefix: [0.0, 2.0, 1.0], lambda p, n: [1] * n)
        backend.reserve(20)
        backend.prefill(np.array([[0, 0]]), np.array([0]), inject=True)
        assert backend.logits().shape == (1, 1, 3)
        backend.step(np.array([2]), np.array([2]), width=3, inject=None)
        assert backend.logits().shape == (1, 3, 3)
        return backend

    started().step(np.array([0]), np.array([4]), width=1, inject=None)  # one draft kept, the next replaced
    started().step(np.array([1]), np.array([5]), width=1, inject=None)  # all kept: any token may follow
    for anchor, start, what in ((1, 4, "anchor"), (0, 2, "start"), (0, 6, "start")):
        with pytest.raises(BackendError, match=f"{what} of a step"):
            started().step(np.array([anchor]), np.array([start]), width=1, inject=None)
    with pytest.raises(BackendError, match="protocol is broken: logits"):
        ScriptedBackend(lambda prefix: 0).logits()
