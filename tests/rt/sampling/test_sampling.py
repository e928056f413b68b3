"""The sampler, and whole requests that sample; the proof of the distribution is in test_distribution.py."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dflash_rt.arrays import FloatArray
from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.errors import BackendError, SamplingError
from dflash_rt.generator import Generator
from dflash_rt.request import ModelLimits
from dflash_rt.sampling.distribution import Distribution
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.random_numbers import Noise
from dflash_rt.sampling.sampler import Sampler
from tests.rt.scripted_generator import END, limits, prompts

HOT = SamplingParams(temperature=1.0)


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
        assert tokens_of(storyteller(num_draft_tokens=width - 1), sampling) == expected
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
        backend.step(np.array([2]), np.array([2]), verify_len=3, inject=None)
        assert backend.logits().shape == (1, 3, 3)
        return backend

    started().step(
        np.array([0]), np.array([4]), verify_len=1, inject=None
    )  # one draft kept, the next replaced
    started().step(np.array([1]), np.array([5]), verify_len=1, inject=None)  # all kept: any token may follow
    for anchor, start, what in ((1, 4, "anchor"), (0, 2, "start"), (0, 6, "start")):
        with pytest.raises(BackendError, match=f"{what} of a step"):
            started().step(np.array([anchor]), np.array([start]), verify_len=1, inject=None)
    with pytest.raises(BackendError, match="protocol is broken: logits"):
        ScriptedBackend(lambda prefix: 0).logits()
