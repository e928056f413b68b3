"""The width that adapts: its maths, its accounts, and what it does to requests."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Inject, StepOutput
from dflash_rt.backends.scripted import Drafter, ScriptedBackend, follow
from dflash_rt.decoding.policy import FixedWidth, WidthPolicy
from dflash_rt.errors import RequestError
from dflash_rt.generator import Generator
from dflash_rt.request import ModelLimits
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.proposal import DraftSampling
from dflash_rt.speculation.width import (
    _ALLOWANCE,
    _ALLOWANCE_RATE,
    _CURIOSITY,
    _MOST_ALLOWANCE,
    AcceptanceHistory,
    AdaptiveWidth,
)
from dflash_rt.speculation.width_correction import RunningCosts, StepCosts
from dflash_rt.stream import GenerationResult

COSTS = StepCosts((0.010, 0.014, 0.015, 0.016, 0.017))


def policy(costs: StepCosts = COSTS, history: AcceptanceHistory | None = None) -> AdaptiveWidth:
    return AdaptiveWidth(RunningCosts(costs), history or AcceptanceHistory(costs.widest))


def play(
    widths: WidthPolicy, accept: Callable[[], int], steps: int, *, told: StepCosts | None = None
) -> list[tuple[int, int]]:
    """Widths and accepted drafts of ``steps`` steps; ``accept`` says how many a whole block would get.

    With ``told`` the policy is told that steps took as long.
    """
    done = []
    for _ in range(steps):
        width = widths.choose()
        accepted = min(accept(), width - 1)
        widths.observe(width, accepted, None if told is None else told.seconds[width - 1])
        done.append((width, accepted))
    return done


def seconds(steps: list[tuple[int, int]], costs: StepCosts = COSTS) -> float:
    return sum(costs.seconds[width - 1] for width, _ in steps)


def tokens(steps: list[tuple[int, int]]) -> int:
    return sum(accepted + 1 for _, accepted in steps)


# The maths


def test_fixed_width() -> None:
    assert play(FixedWidth(3), lambda: 9, 4) == [(3, 2)] * 4


def test_costs_are_relative_to_a_plain_step() -> None:
    assert StepCosts((2.0, 3.0)).relative == (1.0, 1.5)


@pytest.mark.parametrize("bad", [(), (0.0,), (1.0, -1.0), (1.0, float("nan")), (float("inf"),)])
def test_wrong_costs_are_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="the costs of steps are wrong"):
        StepCosts(bad)


def test_expected_tokens_by_hand() -> None:
    widths = policy()
    assert widths.expected_tokens == [1, 1.5, 1.75, 1.875, 1.9375]  # before anything was seen: one in two
    widths.observe(3, 1)  # draft 1 confirmed, draft 2 not, drafts 3 and 4 never made
    # History: (1 + 2 * 0.5) / (1 + 2) and (0 + 1) / (1 + 2). Request: the same again with a weight of 3.
    first, second = (1 + 3 * 2 / 3) / (1 + 3), (0 + 3 * 1 / 3) / (1 + 3)
    assert widths.expected_tokens[1:3] == pytest.approx([1 + first, 1 + first + first * second])
    assert widths.expected_tokens[3] - widths.expected_tokens[2] == pytest.approx(first * second * 0.5)


def test_a_draft_behind_a_rejected_one_counts_as_not_tried() -> None:
    short, long = policy(), policy()
    short.observe(2, 0)
    long.observe(5, 0)
    assert short.expected_tokens == long.expected_tokens


@pytest.mark.parametrize(
    ("costs", "width"),
    [((1.0, 1.01, 1.02, 1.03), 4), ((1.0, 1.2, 1.5, 1.8), 2), ((1.0, 1.6, 2.2, 2.4), 1)],
)
def test_the_first_width_follows_from_the_costs(costs: tuple[float, ...], width: int) -> None:
    assert policy(StepCosts(costs)).choose() == width


def test_the_best_width_is_found() -> None:
    """Two drafts are always right, the third never: 3 tokens for 15 ms beat 1 for 10 and 3 for 16.

    The step that is a little wider is tried often, because it costs little to know.
    """
    steps = play(policy(), lambda: 2, 300)[50:]
    assert sum(width == 3 for width, _ in steps) > 0.8 * len(steps)
    assert tokens(steps) / seconds(steps) > 0.985 * 3 / COSTS.seconds[2]


@pytest.mark.parametrize(
    "shares",
    [(0.9, 0.9, 0.9, 0.9), (0.7, 0.6, 0.4, 0.2), (0.5, 0.3, 0.1, 0.0), (0.3, 0.3, 0.3, 0.3), (0.0,) * 4],
)
def test_nearly_as_fast_as_the_best_fixed_width(shares: tuple[float, ...]) -> None:
    """Requests of 100 steps on one history. Seeded, so that this is the same run every time."""

    def accept() -> int:
        return next((i for i, share in enumerate(shares) if random_.random() >= share), 4)

    def rate(make: Callable[[], WidthPolicy]) -> float:
        random_.seed(1)
        steps = [step for _ in range(20) for step in play(make(), accept, 100, told=COSTS)]
        return tokens(steps) / seconds(steps)

    random_ = random.Random()
    costs, history = RunningCosts(COSTS), AcceptanceHistory(5)
    best = max(rate(lambda width=width: FixedWidth(width)) for width in range(1, 6))  # type: ignore[misc]
    assert rate(lambda: AdaptiveWidth(costs, history)) > 0.9 * best


# The accounts


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.floats(0.01, 1.0), max_size=7),
    accepted=st.lists(st.integers(0, 8), min_size=1, max_size=60),
    seen=st.lists(st.integers(0, 7), max_size=20),
)
def test_never_much_slower_than_plain_decoding(
    rows: list[float], accepted: list[int], seen: list[int]
) -> None:
    """Whatever the costs, the drafter and the history: the promise at the top of width.py, at every step."""
    costs = [1.0]
    for more in rows:
        costs.append(costs[-1] + more)
    measured, history = StepCosts(tuple(costs)), AcceptanceHistory(len(costs))
    for count in seen:
        history.add(min(count + 1, len(costs) - 1), min(count, len(costs) - 1))
    history.curiosity = 10.0
    widths = policy(measured, history)
    done: list[tuple[int, int]] = []
    for count in accepted:
        done += play(widths, lambda count=count: count, 1)  # type: ignore[misc]
        plain = tokens(done)
        start = max(_ALLOWANCE, min(costs[-1] - 1, _MOST_ALLOWANCE))
        assert seconds(done, measured) <= plain + start + _ALLOWANCE_RATE * plain + 1e-6


def test_an_answer_whose_first_drafts_fail_tries_again() -> None:
    """Where wide blocks were best so far. The first loss leaves room for another one."""
    measured = StepCosts((1.0, 1.40, 1.46, 1.60, 1.70, 1.80, 2.05))
    history = AcceptanceHistory(measured.widest)
    for _ in range(100):
        history.add(6, 5)
    costs = RunningCosts(measured)
    for width in range(2, 8):
        for _ in range(30):
            costs.add(1, 1.0)
            costs.add(width, measured.seconds[width - 1])
    widths = AdaptiveWidth(costs, history)
    assert [width > 1 for width, _ in play(widths, lambda: 0, 3)] == [True, True, False]
    assert widths.allowance >= 0
    paid = play(AdaptiveWidth(costs, history), lambda: 5, 3)
    assert paid[0][0] < 4 < paid[1][0] == paid[2][0]  # wide blocks come once a narrow one has paid


def test_a_wide_step_that_costs_little_more_than_a_narrow_one_is_taken_at_once() -> None:
    costs = StepCosts((1.0, 1.78, 1.79, 1.80, 1.81))
    history = AcceptanceHistory(costs.widest)
    for _ in range(100):
        history.add(4, 4)
    assert policy(costs, history).choose() == 5


def test_drafting_that_never_helps_is_switched_off_and_probed() -> None:
    history = AcceptanceHistory(5)
    lost = []
    for _ in range(30):
        steps = play(policy(history=history), lambda: 0, 100)
        lost.append(seconds(steps) / (100 * COSTS.seconds[0]) - 1)
    drafted = [width for width, _ in steps if width > 1]
    assert 1 <= len(drafted) <= 3  # probes: seldom, for 0.5% of the time
    assert lost[-1] <= 1.1 * _CURIOSITY + 0.005  # a request may begin with what others saved
    assert max(lost) <= _ALLOWANCE / 100 + _ALLOWANCE_RATE


def test_drafting_comes_back_when_it_helps_again() -> None:
    widths = policy()
    play(widths, lambda: 0, 400)
    steps = play(widths, lambda: 4, 400)
    assert {width for width, _ in steps[-100:]} == {5}


def test_a_request_starts_from_what_others_saw() -> None:
    history = AcceptanceHistory(5)
    play(policy(history=history), lambda: 4, 100)
    first, second = play(policy(history=history), lambda: 4, 2)
    assert first[0] > 1
    assert second[0] == 5
    for _ in range(60):  # none of them loses much before it stops drafting, so none of them tells much
        play(policy(history=history), lambda: 0, 100)
    history.curiosity = 0.0
    assert policy(history=history).choose() == 1


def test_one_width_leaves_no_choice() -> None:
    assert play(policy(StepCosts((0.5,))), lambda: 3, 5) == [(1, 0)] * 5


# Requests

TEXT = list(range(1, 150))
LIMITS: dict[str, Any] = {"vocab_size": 200, "max_seq_len": 120, "prefill_chunk": 8, "block_size": 5}


def right_for(count: int) -> Drafter:
    """The first ``count`` drafts of every block are right, the others wrong."""
    return lambda prefix, n: [TEXT[len(prefix) + i] if i < count else 0 for i in range(n)]


class Paced(ScriptedBackend):
    """Steps take what they cost, on a clock of their own."""

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
        self.now += COSTS.seconds[verify_len - 1]
        return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)


def generator(drafter: Drafter, patch: pytest.MonkeyPatch, **changes: Any) -> Generator:
    limits = ModelLimits(**{**LIMITS, "num_draft_tokens": 4, "adaptive": True, **changes})
    backend = Paced(follow(TEXT), drafter, block_size=5, prefill_chunk=8, max_rows=120)
    patch.setattr("dflash_rt.decoding.loop.time", backend)
    costs = StepCosts(COSTS.seconds[: limits.num_draft_tokens + 1]) if limits.adaptive else None
    return Generator.from_parts(limits, backend, step_costs=costs)


def answer(opened: Generator, **options: Any) -> GenerationResult:
    return opened.generate(TEXT[:3], max_new_tokens=100, **options)


@pytest.mark.parametrize(("right", "width"), [(0, 1), (1, 2), (2, 3), (4, 5)])
def test_steps_take_the_width_that_the_drafter_is_worth(
    right: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with generator(right_for(right), monkeypatch) as opened:
        for _ in range(5):
            result = answer(opened)
    stats = result.stats
    assert result.token_ids == tuple(TEXT[3:103])
    assert max(stats.steps_by_draft_tokens, key=stats.steps_by_draft_tokens.__getitem__) == width - 1
    assert sum(stats.steps_by_draft_tokens.values()) == stats.steps
    assert stats.num_draft_tokens == 4
    if right == 0:
        assert stats.steps_by_draft_tokens[0] >= 96
    else:
        assert stats.accepted_by_position[: right + 1] == (*stats.drafted_by_position[:right], 0)[:4]


def test_plain_requests_and_fixed_widths_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with generator(right_for(4), monkeypatch) as opened:
        assert answer(opened, speculative=False).stats.steps_by_draft_tokens == {0: 99}
        assert opened.step_costs == COSTS
    with generator(right_for(4), monkeypatch, adaptive=False, num_draft_tokens=2) as opened:
        stats = answer(opened).stats
        assert stats.steps_by_draft_tokens == {2: 33}
        assert stats.drafted_by_position == stats.accepted_by_position == (33, 33)
        assert opened.step_costs is None


def test_stats_tell_the_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    with generator(right_for(2), monkeypatch) as opened:
        told = answer(opened).stats.as_dict()
    by_drafts: Any = told["steps_by_draft_tokens"]
    assert sum(by_drafts.values()) == told["steps"] == len(told["drafted_per_step"])  # type: ignore[arg-type]
    assert all(isinstance(drafts, str) for drafts in by_drafts)


def test_a_seed_gives_the_same_text_while_widths_adapt() -> None:
    def logits(prefix: tuple[int, ...]) -> list[float]:
        return [((token * 7 + len(prefix) * 3 + sum(prefix[-3:])) % 11) / 3 for token in range(40)]

    def drafter(prefix: tuple[int, ...], count: int) -> list[int]:
        return [int((sum(prefix) + i) % 40) for i in range(count)]

    limits = ModelLimits(**{**LIMITS, "vocab_size": 40, "num_draft_tokens": 4, "adaptive": True})
    backend = ScriptedBackend.with_logits(logits, drafter, block_size=5, prefill_chunk=8)
    flat = StepCosts((1.0, 1.01, 1.02, 1.03, 1.04))  # worth drafting even if one in thirty is right
    sampling = SamplingParams(temperature=0.9, seed=11)
    with Generator.from_parts(limits, backend, step_costs=flat) as opened:
        plain = opened.generate([1, 2], max_new_tokens=60, sampling=sampling, speculative=False)
        adapted = [opened.generate([1, 2], max_new_tokens=60, sampling=sampling) for _ in range(3)]
    assert {result.token_ids for result in adapted} == {plain.token_ids}
    assert len({drafts for result in adapted for drafts in result.stats.drafted_per_step}) > 1


def test_widths_do_not_adapt_where_the_text_of_a_seed_depends_on_them() -> None:
    def logits(prefix: tuple[int, ...]) -> list[float]:
        return [float(token == len(prefix) % 7) for token in range(40)]

    def drafter(_: tuple[int, ...], count: int) -> list[int]:
        return [39] * count  # never worth it

    known = {**LIMITS, "vocab_size": 40, "num_draft_tokens": 4, "adaptive": True, "samples_drafts": True}
    backend = ScriptedBackend.with_logits(logits, drafter, block_size=5, prefill_chunk=8)
    with Generator.from_parts(ModelLimits(**known), backend, step_costs=COSTS) as opened:
        greedy = opened.generate([1, 2], max_new_tokens=60)
        sampled = opened.generate([1, 2], max_new_tokens=60, sampling=SamplingParams(temperature=0.1, seed=1))
    assert greedy.stats.steps_by_draft_tokens[0] > 50
    assert set(sampled.stats.steps_by_draft_tokens) == {4}


def test_costs_of_other_widths_are_refused() -> None:
    limits = ModelLimits(**{**LIMITS, "num_draft_tokens": 4, "adaptive": True})
    with pytest.raises(RequestError, match=re.escape("costs of 0 to 1 drafts")):
        Generator.from_parts(limits, ScriptedBackend(follow(TEXT)), step_costs=StepCosts((1.0, 2.0)))
