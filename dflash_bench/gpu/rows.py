"""From samples to a row of the report, and from rows to verdicts. Nothing here measures anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from dflash_bench.floor import StepFloor
from dflash_bench.stats import Ratio, as_dict, quartiles

__all__ = [
    "DRAFTED",
    "GOALS",
    "GOAL_CONTEXT",
    "GOAL_PAIR",
    "GOAL_PRECISION",
    "HF",
    "PLAIN",
    "REFERENCE",
    "Goal",
    "Sample",
    "judge_goals",
    "make_row",
]

PLAIN, DRAFTED, HF, REFERENCE = "plain", "drafted", "hf", "reference"
GOAL_PAIR, GOAL_PRECISION, GOAL_CONTEXT = "qwen3-8b", "bf16", 1024


@dataclass(frozen=True)
class Sample:
    """One system in one repeat: medians over its steps, in seconds.

    Attributes:
        step_seconds: from token to token.
        run_seconds: of those, on the device by events, or inside the backend's runs where there is no GPU;
            ``None`` for PyTorch's systems.
        gap_seconds: mean time of a step less its mean time on the device.
    """

    step_seconds: float
    run_seconds: float | None = None
    gap_seconds: float | None = None

    @property
    def speed(self) -> str:
        """Milliseconds of a step, for a line of progress."""
        return f"{1e3 * self.step_seconds:.2f} ms"


def make_row(
    *,
    pair: str,
    precision: str,
    backend: str,
    context: int,
    width: int,
    samples: Mapping[str, Sequence[Sample]],
    floor: StepFloor,
    plain_floor: StepFloor,
    bytes_per_second: float,
    published: Mapping[str, float],
    missing: Mapping[str, str],
    draft_share: float | None = None,
) -> dict[str, Any]:
    """One row: medians over repeats, ratios over pairs of the same repeat.

    ``missing`` says by system why it has no samples. ``published`` gives tokens per step, from which the
    gain follows that this cycle cost would bring; what random weights accept means nothing.
    """
    plain, drafted, hf, reference = (
        [sample.step_seconds for sample in samples.get(name, ())] for name in (PLAIN, DRAFTED, HF, REFERENCE)
    )
    floor_ms, plain_floor_ms = (one.milliseconds(bytes_per_second) for one in (floor, plain_floor))
    step_ms, plain_ms = _median(drafted, 1e3), _median(plain, 1e3)
    cycle = _of_pairs(drafted, plain)
    over_hf = _of_pairs(hf, drafted)
    over_reference = _of_pairs(reference, drafted)
    return {
        "pair": pair,
        "precision": precision,
        "backend": backend,
        "context": context,
        "width": width,
        "repeats": len(drafted),
        "step_ms": step_ms,
        "plain_step_ms": plain_ms,
        "reference_step_ms": _median(reference, 1e3),
        "hf_step_ms": _median(hf, 1e3),
        "step_bytes": floor.total_bytes,
        "plain_step_bytes": plain_floor.total_bytes,
        "floor_ms": floor_ms,
        "plain_floor_ms": plain_floor_ms,
        "step_over_floor": None if step_ms is None else step_ms / floor_ms,
        "plain_over_floor": None if plain_ms is None else plain_ms / plain_floor_ms,
        "host_gap_us": _median((s.gap_seconds for s in samples.get(DRAFTED, [])), 1e6),
        "plain_host_gap_us": _median((s.gap_seconds for s in samples.get(PLAIN, [])), 1e6),
        "device_ms": _median((s.run_seconds for s in samples.get(DRAFTED, [])), 1e3),
        "draft_share": draft_share,
        "cycle_cost": as_dict(cycle),
        "over_reference": None if over_reference is None else over_reference.median,
        "over_reference_quartiles": as_dict(over_reference),
        "plain_over_hf": as_dict(_of_pairs(hf, plain)),
        "expected": {
            name: {
                "tokens_per_step": tokens,
                "over_plain": None if cycle is None else tokens / cycle.median,
                "over_hf": None if over_hf is None else tokens * over_hf.median,
            }
            for name, tokens in published.items()
        },
        "missing": dict(missing),
    }


@dataclass(frozen=True)
class Goal:
    """``key`` names a number of a row; it has to be at most (or at least) ``bound``."""

    text: str
    key: str
    bound: float
    at_most: bool = True

    def judge(self, value: float | None) -> Literal["met", "missed", "not measured"]:
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


def judge_goals(rows: Sequence[Mapping[str, Any]], *, dry_run: bool) -> list[dict[str, Any]]:
    """Compare with the row of :data:`GOAL_PAIR`; the first one, if several backends have one.

    Returns ``text``, ``value`` and ``verdict`` of each goal. A dry run meets and misses nothing: a CPU and a
    tiny pair say nothing about the goals.
    """
    wanted = (GOAL_PAIR, GOAL_PRECISION, GOAL_CONTEXT)
    found = [row for row in rows if (row["pair"], row["precision"], row["context"]) == wanted]
    row: Mapping[str, Any] = found[0] if found and not dry_run else {}
    values = {goal: row.get(goal.key) for goal in GOALS}
    return [
        {"text": goal.text, "value": value, "verdict": goal.judge(value)} for goal, value in values.items()
    ]


def _of_pairs(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio | None:
    """Ratios of values of the same repeat."""
    return quartiles(a / b for a, b in zip(numerator, denominator, strict=False) if b > 0)


def _median(seconds: Iterable[float | None], factor: float) -> float | None:
    known = [value for value in seconds if value is not None]
    return factor * median(known) if known else None
