"""The goals, and what the measurements say about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["GOALS", "GOAL_CONTEXT", "GOAL_PAIR", "GOAL_PRECISION", "Goal", "Judged", "judge_goals"]

GOAL_PAIR, GOAL_PRECISION, GOAL_CONTEXT = "qwen3-8b", "bf16", 1024

Verdict = Literal["met", "missed", "not measured"]


@dataclass(frozen=True)
class Goal:
    """``key`` names a number of a row; it has to be at most (or at least) ``bound``."""

    text: str
    key: str
    bound: float
    at_most: bool = True

    def judge(self, value: float | None) -> Verdict:
        """NaN misses."""
        if value is None:
            return "not measured"
        return "met" if (value <= self.bound if self.at_most else value >= self.bound) else "missed"


GOALS = (
    Goal("a drafted step takes at most 1.25 x the floor", "step_over_floor", 1.25),
    Goal("drafting takes at most 15 % of the step", "draft_share", 0.15),
    Goal("the host's gap between two steps is below 20 microseconds", "host_gap_us", 20.0),
    Goal("at least 4 x the step rate of the PyTorch reference loop", "over_reference", 4.0, at_most=False),
)


@dataclass(frozen=True)
class Judged:
    """One goal beside what was measured."""

    text: str
    value: float | None
    verdict: Verdict


def judge_goals(rows: list[Mapping[str, Any]], *, dry_run: bool) -> tuple[Judged, ...]:
    """Compare with the row of :data:`GOAL_PAIR`; the first one, if several backends have one.

    A dry run meets and misses nothing: a CPU and a tiny pair say nothing about the goals.
    """
    wanted = [
        row
        for row in rows
        if (row["pair"], row["precision"], row["context"]) == (GOAL_PAIR, GOAL_PRECISION, GOAL_CONTEXT)
    ]
    row: Mapping[str, Any] = wanted[0] if wanted and not dry_run else {}
    judged = []
    for goal in GOALS:
        value = row.get(goal.key)
        judged.append(Judged(goal.text, value, goal.judge(value)))
    return tuple(judged)
