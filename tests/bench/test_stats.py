"""What the benchmark computes from its times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_bench.stats import OUTSIDE, agreement, ratio, summarise
from dflash_bench.systems.base import (
    Outcome,
)
from tests.bench.parts import answers

seconds = st.floats(1e-4, 1e3)


@st.composite
def outcome_tables(draw: st.DrawFn) -> dict[tuple[int, int], Outcome]:
    """Outcomes of an own system over some prompts and repeats; some answers have no step."""
    table = {}
    for prompt in range(draw(st.integers(1, 4))):
        accepted = tuple(draw(st.lists(st.integers(0, 3), max_size=6)))
        tokens = tuple(range(1 + sum(accepted) + len(accepted)))
        for repeat in range(draw(st.integers(1, 3))):
            decode = draw(seconds) if accepted else 0.0
            share = draw(st.floats(0, 1))
            stages = {"target": share * decode / 2, "draft": share * decode / 2}
            table[prompt, repeat] = Outcome(tokens, draw(seconds), decode, len(accepted), accepted, stages)
    return table


def speed(outcome: Outcome) -> float:
    return outcome.tokens_per_second


@settings(deadline=None, max_examples=60)
@given(outcome_tables(), outcome_tables())
def test_ratios_are_computed_from_pairs(
    left: dict[tuple[int, int], Outcome], right: dict[tuple[int, int], Outcome]
) -> None:
    pairs = [p for p in left if p in right and left[p].steps and right[p].steps]
    found = ratio(left, right, speed)
    if not pairs:
        assert found is None
        return
    assert found is not None
    values = [
        (len(left[p].token_ids) - 1) / left[p].decode_seconds
        / ((len(right[p].token_ids) - 1) / right[p].decode_seconds)
        for p in pairs
    ]  # fmt: skip
    expected = np.percentile(values, [50, 25, 75])
    assert [found.median, found.lower_quartile, found.upper_quartile] == pytest.approx(list(expected))
    assert found.pairs == len(pairs)


@settings(deadline=None, max_examples=30)
@given(outcome_tables(), st.lists(st.floats(0.01, 100), min_size=12, max_size=12))
def test_what_disturbs_a_pair_disturbs_no_ratio(
    table: dict[tuple[int, int], Outcome], disturbance: list[float]
) -> None:
    """Both sides of each pair slowed by the same factor, of each pair by another one."""

    def slowed(factor: float) -> dict[tuple[int, int], Outcome]:
        return {
            pair: Outcome(o.token_ids, o.prefill_seconds, factor * f * o.decode_seconds, o.steps)
            for f, (pair, o) in zip(disturbance, table.items(), strict=False)
        }

    found = ratio(slowed(1), slowed(3), speed)
    if found is not None:
        assert [found.median, found.lower_quartile, found.upper_quartile] == pytest.approx([3, 3, 3])


@settings(deadline=None, max_examples=60)
@given(outcome_tables())
def test_totals_are_those_of_each_prompts_median_repeat(table: dict[tuple[int, int], Outcome]) -> None:
    total = summarise(table)
    prompts = {prompt for prompt, _ in table}
    repeats = {p: sorted(o.decode_seconds for (q, _), o in table.items() if p == q) for p in prompts}
    assert total.decode_seconds == pytest.approx(sum(r[(len(r) - 1) // 2] for r in repeats.values()))
    assert total.steps == sum(table[p, 0].steps for p in prompts)
    assert total.decoded_tokens == sum(len(table[p, 0].token_ids) - 1 for p in prompts)
    assert total.prefill_seconds == pytest.approx(np.median([o.prefill_seconds for o in table.values()]))
    if not total.steps:
        assert total.ms_per_step is total.stage_ms is total.tokens_per_second is total.outside_share is None
        return
    assert total.stage_ms is not None
    assert total.ms_per_step is not None
    assert total.tokens_per_second is not None
    assert list(total.stage_ms)[-1] == OUTSIDE
    assert sum(total.stage_ms.values()) == pytest.approx(total.ms_per_step)
    assert total.outside_share == pytest.approx(total.stage_ms[OUTSIDE] / total.ms_per_step, abs=1e-9)
    assert total.tokens_per_step == pytest.approx(total.tokens_per_second * total.ms_per_step / 1e3)
    shares = total.accepted_by_position(3)
    assert shares is not None
    assert len(shares) == 3
    assert sorted(shares, reverse=True) == shares
    assert 1 + sum(shares) == pytest.approx(total.tokens_per_step)


def test_stages_are_in_the_order_of_a_step() -> None:
    stages = {"target": 1.0, "embed": 0.5, "special": 0.25, "draft": 1.0, "unused": 0.0}
    total = summarise({(0, 0): Outcome((1, 2), 1.0, 3.0, 1, (0,), stages)})
    assert total.stage_ms is not None
    assert list(total.stage_ms.items()) == [
        ("draft", 1000), ("embed", 500), ("target", 1000), ("special", 250), (OUTSIDE, 250)
    ]  # fmt: skip


def test_agreement_counts_up_to_the_first_difference() -> None:
    wanted = answers((1, 2, 3, 4), (1, 2, 3, 4), (1, 2), (1, 2))
    found = answers((1, 2, 9, 4), (1, 2, 3), (1, 2), (1, 2, 3))
    same = agreement(zip(found.values(), wanted.values(), strict=True))
    assert (same.equal_tokens, same.tokens, same.equal_answers, same.answers) == (2 + 3 + 2 + 2, 12, 1, 4)
    assert not same.exact
    assert agreement(zip(wanted.values(), wanted.values(), strict=True)).exact


def test_answers_without_a_step_have_no_ratio() -> None:
    assert ratio(answers((1,)), answers((1, 2)), speed) is None
    assert ratio(answers((1, 2)), answers((1,)), speed) is None
