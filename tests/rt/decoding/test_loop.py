from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Inject, StepOutput
from dflash_rt.backends.scripted import Drafter, ScriptedBackend, Target, follow
from dflash_rt.decoding.loop import Decoded, decode
from dflash_rt.decoding.policy import WidthPolicy
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.errors import BackendError, NumericalError
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.proposal import DraftSampling
from dflash_rt.sampling.sampler import Sampler

PROMPT = [100, 101, 102]
TEXT = [*PROMPT, *range(103, 160)]  # what the target says, the prompt included


def sequence(prompt: list[int] = PROMPT) -> Sequence:
    return Sequence(np.array(prompt, dtype=np.int64))


def drafter_right_for(*counts: int) -> Drafter:
    """Continues TEXT rightly for ``counts[i]`` tokens in the i-th step, then wrongly."""
    remaining = list(counts)

    def draft(prefix: tuple[int, ...], count: int) -> list[int]:
        right = remaining.pop(0)
        return [TEXT[len(prefix) + i] if i < right else -7 for i in range(count)]

    return draft


def run(
    backend: ScriptedBackend,
    state: Sequence | None = None,
    *,
    max_new_tokens: int = 20,
    width: int | WidthPolicy = 4,
    prefill_chunk: int = 512,
    stop: tuple[int, ...] = (),
) -> list[Decoded]:
    return list(
        decode(
            backend,
            sequence() if state is None else state,
            max_new_tokens=max_new_tokens,
            verify_len=width,
            prefill_chunk=prefill_chunk,
            stop_token_ids=frozenset(stop),
        )
    )


def tokens_of(items: list[Decoded]) -> list[int]:
    return [token for item in items for token in item.token_ids]


def test_none_some_and_all_accepted() -> None:
    state = sequence()
    backend = ScriptedBackend(follow(TEXT), drafter_right_for(0, 2, 3, 1, 0), block_size=4)
    items = run(backend, state, max_new_tokens=12)
    assert items == [
        Decoded((103,), 0, None),
        Decoded((104,), 0, None),
        Decoded((105, 106, 107), 2, None),
        Decoded((108, 109, 110, 111), 3, None),
        Decoded((112, 113), 1, None),
        Decoded((114,), 0, "length"),
    ]
    assert state.accepted_per_step == [0, 2, 3, 1, 0]
    assert state.new_tokens == tokens_of(items)


def test_plain_decoding_never_drafts_or_injects() -> None:
    def draft(prefix: tuple[int, ...], count: int) -> list[int]:
        raise AssertionError("drafted")

    class Watched(ScriptedBackend):
        def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
            assert not inject
            return super().prefill(token_ids, start, inject=inject)

        def step(
            self,
            anchors: IntArray,
            start: IntArray,
            *,
            verify_len: int,
            inject: Inject | None,
            sampling: DraftSampling | None = None,
        ) -> StepOutput:
            assert (verify_len, inject) == (1, None)
            return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)

    items = run(Watched(follow(TEXT), draft), width=1, max_new_tokens=3)
    assert items == [Decoded((103,), 0, None), Decoded((104,), 0, None), Decoded((105,), 0, "length")]


@pytest.mark.parametrize(
    ("stop", "kept", "drafted"),
    [
        (104, (104,), 1),
        (105, (104, 105), 2),
        (106, (104, 105, 106), 3),  # the last draft
        (107, (104, 105, 106, 107), 3),  # the bonus
    ],
)
def test_stop_token_inside_a_block(stop: int, kept: tuple[int, ...], drafted: int) -> None:
    state = sequence()
    items = run(ScriptedBackend(follow(TEXT)), state, stop=(stop, 150))
    assert items == [Decoded((103,), 0, None), Decoded(kept, drafted, "stop")]
    assert state.accepted_per_step == [3]  # the target confirmed all of them, stop or not


def test_stop_token_as_the_first_token_needs_no_step() -> None:
    backend = ScriptedBackend(follow(TEXT))
    assert run(backend, stop=(103,)) == [Decoded((103,), 0, "stop")]
    assert backend.calls == 1


def test_a_rejected_draft_never_stops() -> None:
    backend = ScriptedBackend(follow(TEXT), drafter_right_for(0, 0))
    assert tokens_of(run(backend, stop=(-7,), max_new_tokens=3)) == [103, 104, 105]


def test_stop_wins_over_length_on_the_last_token() -> None:
    backend = ScriptedBackend(follow(TEXT))
    assert run(backend, stop=(105,), max_new_tokens=3)[-1] == Decoded((104, 105), 2, "stop")
    assert run(backend, stop=(106,), max_new_tokens=3)[-1] == Decoded((104, 105), 2, "length")


@pytest.mark.parametrize("limit", range(1, 12))
def test_length_limit_anywhere_in_a_block(limit: int) -> None:
    items = run(ScriptedBackend(follow(TEXT)), max_new_tokens=limit)
    assert tokens_of(items) == TEXT[3 : 3 + limit]
    assert [item.finish_reason for item in items] == [None] * (len(items) - 1) + ["length"]
    assert all(item.token_ids for item in items)


def test_one_new_token_needs_no_step() -> None:
    backend = ScriptedBackend(follow(TEXT))
    assert run(backend, max_new_tokens=1) == [Decoded((103,), 0, "length")]
    assert backend.calls == 1


@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7])])
def test_prefill_in_chunks(chunk: int, sizes: list[int]) -> None:
    seen: list[int] = []

    class Watched(ScriptedBackend):
        def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
            seen.append(token_ids.shape[1])
            return super().prefill(token_ids, start, inject=inject)

    backend = Watched(follow(TEXT), prefill_chunk=chunk)
    assert tokens_of(run(backend, sequence(TEXT[:7]), prefill_chunk=chunk, max_new_tokens=9)) == TEXT[7:16]
    assert seen == sizes


def test_room_is_asked_for_as_the_sequence_grows() -> None:
    asked: list[int] = []

    class Watched(ScriptedBackend):
        def reserve(self, rows: int) -> None:
            asked.append(rows)
            super().reserve(rows)

    run(Watched(follow(TEXT), max_rows=22), max_new_tokens=20, prefill_chunk=2)
    assert asked == [2, 3, 3, 7, 11, 15, 19]  # two chunks, then what is committed before each step


@pytest.mark.parametrize("after", range(5))
def test_the_caller_may_leave_after_any_item(after: int) -> None:
    class Watched(ScriptedBackend):
        def clear(self) -> None:
            raise AssertionError("nothing is broken, and a clear takes time")

    backend = Watched(follow(TEXT))
    items = decode(backend, sequence(), max_new_tokens=20, verify_len=4, prefill_chunk=2)
    for _ in range(after):
        next(items)
    items.close()
    assert tokens_of(run(backend, max_new_tokens=9)) == TEXT[3:12]


@pytest.mark.parametrize("failing_call", range(5))
@pytest.mark.parametrize("error", [NumericalError("not finite"), MemoryError("full"), KeyboardInterrupt()])
def test_an_error_clears_the_backend_and_passes_on(failing_call: int, error: BaseException) -> None:
    backend = ScriptedBackend(follow(TEXT), raise_at={failing_call: error})
    items: list[Decoded] = []
    with pytest.raises(type(error)) as caught:
        items.extend(decode(backend, sequence(), max_new_tokens=20, verify_len=4, prefill_chunk=2))
    assert caught.value is error
    assert tokens_of(run(backend, max_new_tokens=9)) == TEXT[3:12]  # refused by the backend without a clear


def test_nothing_of_a_failed_step_is_emitted() -> None:
    backend = ScriptedBackend(follow(TEXT), raise_at={2: NumericalError("not finite")})
    items = decode(backend, sequence(), max_new_tokens=20, verify_len=4, prefill_chunk=512)
    state = [next(items), next(items)]
    with pytest.raises(NumericalError):
        next(items)
    assert tokens_of(state) == TEXT[3:8]


def test_the_backend_sees_arrays_it_may_keep() -> None:
    """Several slots later: every array has the batch axis, and none is changed after it was handed over."""
    seen: list[tuple[IntArray, list[int]]] = []

    class Keeper(ScriptedBackend):
        def step(
            self,
            anchors: IntArray,
            start: IntArray,
            *,
            verify_len: int,
            inject: Inject | None,
            sampling: DraftSampling | None = None,
        ) -> StepOutput:
            for array in (anchors, start, *([inject.start] if inject else [])):
                assert (array.shape, array.dtype) == ((1,), np.int64)
                seen.append((array, array.tolist()))
            return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)

    run(Keeper(follow(TEXT)))
    assert len(seen) > 10
    assert all(array.tolist() == values for array, values in seen)


@dataclass(frozen=True)
class Game:
    """A random pair over a tiny vocabulary: every token depends on the whole prefix."""

    seed: int
    vocabulary: int
    skill: int  # of 8 draft tokens, about how many are right

    def _hash(self, kind: str, prefix: tuple[int, ...]) -> int:
        return zlib.crc32(repr((kind, self.seed, prefix)).encode())

    def target(self, prefix: tuple[int, ...]) -> int:
        return self._hash("target", prefix) % self.vocabulary

    def drafter(self, prefix: tuple[int, ...], count: int) -> list[int]:
        drafted: list[int] = []
        for _ in range(count):
            right = self._hash("skill", prefix) % 8 < self.skill
            token = self.target(prefix) if right else self._hash("guess", prefix) % self.vocabulary
            drafted.append(token)
            prefix = (*prefix, token)
        return drafted


def oracle_tokens(target: Target, prompt: list[int], limit: int, stop: tuple[int, ...]) -> list[int]:
    out: list[int] = []
    while len(out) < limit and not (out and out[-1] in stop):
        out.append(target((*prompt, *out)))
    return out


def oracle_accepted(
    target: Target, draft: Drafter, prompt: list[int], new: list[int], width: int
) -> list[int]:
    """Counts for the steps that it takes to say ``new``, found from token positions alone."""
    counts, said = [], 1
    while said < len(new):
        prefix = (*prompt, *new[:said])
        truth: list[int] = []
        for _ in range(width - 1):
            truth.append(target((*prefix, *truth)))
        drafted = list(draft(prefix, width - 1))
        counts.append(max(n for n in range(width) if drafted[:n] == truth[:n]))
        said += counts[-1] + 1
    return counts


GAMES = st.builds(Game, st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 8))


@settings(deadline=None, max_examples=200)
@given(
    game=GAMES,
    prompt_rows=st.integers(1, 25),
    chunk=st.integers(1, 12),
    block_size=st.integers(2, 9),
    spare_width=st.integers(0, 3),
    limit=st.integers(1, 30),
    stop=st.sampled_from([(), (0,), (3,), (1, 2)]),
)
def test_drafted_equals_plain_equals_the_target(
    *,
    game: Game,
    prompt_rows: int,
    chunk: int,
    block_size: int,
    spare_width: int,
    limit: int,
    stop: tuple[int, ...],
) -> None:
    prompt = [position % game.vocabulary for position in range(prompt_rows)]
    width = max(2, block_size - spare_width)  # a draft may be narrower than the drafter's block
    expected = oracle_tokens(game.target, prompt, limit, stop)
    backend = ScriptedBackend(
        game.target, game.drafter, block_size=block_size, prefill_chunk=chunk, max_rows=prompt_rows + limit
    )
    drafted, plain = sequence(prompt), sequence(prompt)
    options = {"max_new_tokens": limit, "prefill_chunk": chunk, "stop": stop}
    items = run(backend, drafted, width=width, **options)  # type: ignore[arg-type]
    plain_items = run(backend, plain, width=1, **options)  # type: ignore[arg-type]

    assert tokens_of(items) == drafted.new_tokens == expected
    assert tokens_of(plain_items) == plain.new_tokens == expected
    assert drafted.accepted_per_step == oracle_accepted(game.target, game.drafter, prompt, expected, width)
    assert [item.drafted for item in items[:-1]] == [0, *drafted.accepted_per_step[: len(items) - 2]][
        : len(items) - 1
    ]
    reason = "stop" if expected[-1] in stop else "length"
    assert [item.finish_reason for item in items] == [None] * (len(items) - 1) + [reason]


@settings(deadline=None, max_examples=60)
@given(game=GAMES, prompts=st.lists(st.integers(1, 12), min_size=2, max_size=4), cut=st.integers(0, 4))
def test_old_rows_never_leak_into_a_new_sequence(game: Game, prompts: list[int], cut: int) -> None:
    backend = ScriptedBackend(game.target, game.drafter, block_size=5)
    for number, rows in enumerate(prompts):
        prompt = [(number + position) % game.vocabulary for position in range(rows)]
        items = decode(backend, sequence(prompt), max_new_tokens=12, verify_len=5, prefill_chunk=4)
        seen = list(islice(items, cut)) if number % 2 else list(items)
        assert tokens_of(seen) == oracle_tokens(game.target, prompt, 12, ())[: len(tokens_of(seen))]


@dataclass
class Told:
    """A policy that is told its widths, again and again."""

    widths: list[int]
    widest: int
    chosen: int = 0

    def choose(self) -> int:
        self.chosen += 1
        return self.widths[(self.chosen - 1) % len(self.widths)]

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        assert width == self.widths[(self.chosen - 1) % len(self.widths)]
        assert 0 <= accepted < width


WIDTHS = st.lists(st.sampled_from([1, 1, 1, 2, 3, 4, 5, 6]), min_size=1, max_size=25)


@settings(deadline=None, max_examples=200)
@given(
    game=GAMES,
    prompt_rows=st.integers(1, 12),
    chunk=st.integers(1, 12),
    widths=WIDTHS,
    limit=st.integers(1, 60),
)
def test_any_sequence_of_widths_gives_the_same_tokens(
    game: Game, prompt_rows: int, chunk: int, widths: list[int], limit: int
) -> None:
    """The backend refuses drafts over rows whose features were forgotten, and features it no longer keeps."""
    prompt = [position % game.vocabulary for position in range(prompt_rows)]
    backend = ScriptedBackend(
        game.target, game.drafter, block_size=6, prefill_chunk=chunk, max_rows=prompt_rows + limit
    )
    state = sequence(prompt)
    items = run(backend, state, width=Told(widths, 6), prefill_chunk=chunk, max_new_tokens=limit)
    expected = oracle_tokens(game.target, prompt, limit, ())
    assert tokens_of(items) == state.new_tokens == expected
    steps = len(state.accepted_per_step)
    assert state.verify_len_per_step == [widths[step % len(widths)] for step in range(steps)]
    said = 1
    for width, accepted in zip(state.verify_len_per_step, state.accepted_per_step, strict=True):
        before, here = [*prompt, *expected[: said - 1]], expected[said - 1 : said + 1]
        one = oracle_accepted(game.target, game.drafter, before, here, width)
        if said + width <= len(expected):  # the oracle sees no further than the text
            assert accepted == one[0]
        said += accepted + 1


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99), widths=WIDTHS, chunk=st.integers(1, 8), temperature=st.sampled_from([0.5, 1.0])
)
def test_any_sequence_of_widths_samples_the_same_text(
    seed: int, widths: list[int], chunk: int, temperature: float
) -> None:
    def logits(prefix: tuple[int, ...]) -> list[float]:
        return [zlib.crc32(repr((seed, prefix, token)).encode()) % 1000 / 250 for token in range(7)]

    def drafter(prefix: tuple[int, ...], count: int) -> list[int]:
        return [(sum(prefix) + i) % 7 for i in range(count)]

    params = SamplingParams(temperature=temperature, top_p=0.9, presence_penalty=0.3, seed=seed)

    def text(width: int | WidthPolicy) -> list[int]:
        state = sequence([1, 2, 3])
        backend = ScriptedBackend.with_logits(logits, drafter, block_size=6, prefill_chunk=chunk)
        sampler = Sampler(params, state.prompt)
        items = decode(
            backend, state, max_new_tokens=30, verify_len=width, prefill_chunk=chunk, sampler=sampler
        )
        return tokens_of(list(items))

    assert text(Told(widths, 6)) == text(1)


class Injections(ScriptedBackend):
    """Notes each step's width and how many rows it injected first."""

    def __init__(self, **options: int) -> None:
        super().__init__(follow(TEXT), **options)
        self.steps: list[tuple[int, int]] = []

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        self.steps.append((verify_len, inject.rows if inject else 0))
        return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)


def test_plain_steps_inject_nothing_until_a_step_drafts_again() -> None:
    backend = Injections(block_size=4, prefill_chunk=16)
    run(backend, width=Told([4, 1, 1, 1, 2, 3], 4), max_new_tokens=1 + 4 + 3 + 2 + 3, prefill_chunk=16)
    assert backend.steps == [(4, 0), (1, 0), (1, 0), (1, 0), (2, 7), (3, 2)]  # 7: a block and 3 plain rows


def test_plain_steps_inject_before_features_would_be_lost() -> None:
    backend = Injections(block_size=4, prefill_chunk=6)
    run(backend, width=Told([*[1] * 20, 4], 4), max_new_tokens=25, prefill_chunk=6)
    injected = [(number, rows) for number, (_, rows) in enumerate(backend.steps) if rows]
    assert injected == [(6, 6), (12, 6), (18, 6), (20, 2)]  # once in as many steps as the backend keeps rows


def test_features_wait_behind_a_block_that_was_rejected() -> None:
    """The pass of a rejected block ends behind the rows that follow it; they overwrite it one by one."""
    backend = ScriptedBackend(follow(TEXT), drafter_right_for(0, 0, 3, 3), block_size=4, prefill_chunk=8)
    items = run(backend, width=Told([4, 1, 2, 1, 1, 4], 4), max_new_tokens=12, prefill_chunk=8)
    assert tokens_of(items) == TEXT[3:15]


def test_protocol_errors_of_the_loop_would_be_seen() -> None:
    """The property tests above lean on the fake: break the loop's rule once, on purpose, and it is caught."""

    class Forgetful(Sequence):
        def commit_step(self, accepted: int, width: int, *, injected: bool) -> None:
            super().commit_step(accepted, width, injected=injected)
            self.injected = self.fed

    with pytest.raises(BackendError, match="inject the last verify pass"):
        run(ScriptedBackend(follow(TEXT)), Forgetful(np.array(PROMPT, dtype=np.int64)))


def test_a_policy_is_told_how_long_each_step_took_without_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(ScriptedBackend):
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def step(
            self,
            anchors: IntArray,
            start: IntArray,
            *,
            verify_len: int,
            inject: Inject | None,
            sampling: DraftSampling | None = None,
        ) -> StepOutput:
            self.now += verify_len
            return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)

    @dataclass
    class Noting:
        told: list[tuple[int, int, float | None]]
        widest: int = 4

        def choose(self) -> int:
            return 1 + len(self.told) % 3

        def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
            self.told.append((width, accepted, seconds))

    backend, policy = Clock(follow(TEXT)), Noting([])
    monkeypatch.setattr("dflash_rt.decoding.loop.time", backend)
    for _ in decode(backend, sequence(), max_new_tokens=8, verify_len=policy, prefill_chunk=8):
        backend.now += 100  # the caller takes its time
    assert policy.told == [(1, 0, 1.0), (2, 1, 2.0), (3, 2, 3.0), (1, 0, 1.0)]
