"""The result of a benchmark: as a table for people and as one JSON object for scripts.

docs/reference/benchmark.md says how each number is measured, and lists every key of the JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dflash_bench.floor import StepFloor
from dflash_bench.stats import (
    Agreement,
    Outcomes,
    Ratio,
    Summary,
    agreement,
    ratio,
    summarise,
)
from dflash_bench.systems.base import Outcome

__all__ = ["BESIDE", "PLAIN", "BenchReport", "Conditions"]

PLAIN = "plain"
"""Our plain decoding: always measured, and what the tokens of all others are compared with."""

BESIDE = "beside-"
"""What the rows of another bundle begin with."""

_FORMAT, _FORMAT_VERSION = "dflash-bench", 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the numbers depend on besides the code.

    ``load_before`` and ``load_after`` are the machine's load averages over one minute, ours included.
    ``quantization`` says how the bundle's weights are stored, and ``beside`` describes the second bundle.
    """

    bundle: str
    precision: str
    backend: str
    threads: int
    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    repeats: int
    created: str
    cpu: str
    packages: Mapping[str, str]
    load_before: float | None = None
    load_after: float | None = None
    quantization: str | None = None
    beside: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What every contender did, and what follows from it.

    Attributes:
        conditions: what was run, where.
        outcomes: each contender's outcomes; :data:`PLAIN` is among them.
        widths: rows of a verify pass of each contender that drafts; the others aren't listed.
        floors: floor of a step for each of ours where it is known.
        skipped: contenders that were left out, with the reason.
    """

    conditions: Conditions
    outcomes: Mapping[str, Outcomes]
    widths: Mapping[str, int]
    floors: Mapping[str, StepFloor] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Totals by contender."""
        return {name: summarise(outcomes) for name, outcomes in self.outcomes.items()}

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        """How far each contender's tokens are those of our plain decoding."""
        return {name: agreement(outcomes, self.outcomes[PLAIN]) for name, outcomes in self.outcomes.items()}

    @property
    def ours(self) -> tuple[str, ...]:
        """Names of our own contenders: those that know their stages."""
        return tuple(name for name, total in self.summaries.items() if total.stage_seconds is not None)

    @property
    def drafted(self) -> tuple[str, ...]:
        """Names of ours that draft; not those of the bundle beside, whose plain steps cost something else."""
        return tuple(name for name in self.ours if name in self.widths and not name.startswith(BESIDE))

    def speed_ratio(self, name: str, other: str) -> Ratio | None:
        """Tokens per second of one over another."""
        return ratio(self.outcomes[name], self.outcomes[other], lambda o: o.tokens_per_second)

    def step_cost(self, name: str) -> Ratio | None:
        """Time of a step over that of a plain step, on the same prompts and so at the same contexts."""
        return ratio(self.outcomes[name], self.outcomes[PLAIN], _seconds_per_step)

    def expected_gain(self, name: str) -> float | None:
        """Tokens per step over all prompts, divided by the median cost of a step."""
        cost, tokens = self.step_cost(name), self.summaries[name].tokens_per_step
        return None if cost is None or tokens is None else tokens / cost.median

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; what couldn't be measured is ``None``."""
        conditions = asdict(self.conditions)
        lengths = conditions.pop("prompt_tokens")
        return {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            **conditions,
            "prompts": len(lengths),
            "prompt_tokens": list(lengths),
            "contenders": {name: self._contender(name) for name in self.summaries},
            "ratios": {
                name: {
                    other: _ratio_dict(self.speed_ratio(name, other))
                    for other in self.summaries
                    if other != name
                }
                for name in self.ours
            },
            "drafting": {
                name: {
                    "width": self.widths[name],
                    "step_cost": _ratio_dict(self.step_cost(name)),
                    "tokens_per_step": _rounded(self.summaries[name].tokens_per_step),
                    "expected_gain": _rounded(self.expected_gain(name)),
                    "measured_gain": _ratio_dict(self.speed_ratio(name, PLAIN)),
                }
                for name in self.drafted
            },
            "floor": {name: self._floor(name) for name in self.floors},
            "skipped": dict(self.skipped),
        }

    def table(self) -> str:
        """All of it for people, in plain text."""
        from dflash_bench.run.table import render

        return render(self)

    def _contender(self, name: str) -> dict[str, Any]:
        total, same = self.summaries[name], self.agreements[name]
        stages = total.stage_ms
        positions = total.accepted_by_position(self.widths[name]) if name in self.widths else None
        return {
            "tokens_per_second": _rounded(total.tokens_per_second),
            "ms_per_step": _rounded(total.ms_per_step),
            "tokens_per_step": _rounded(total.tokens_per_step),
            "first_token_ms": _rounded(1e3 * total.prefill_seconds),
            "outside_share": _rounded(total.outside_share),
            "stage_ms": None if stages is None else {key: _rounded(value) for key, value in stages.items()},
            "width": self.widths.get(name),
            "accepted_by_position": None if positions is None else [_rounded(share) for share in positions],
            "decoded_tokens": total.decoded_tokens,
            "steps": total.steps,
            "equal_tokens": same.equal_tokens,
            "compared_tokens": same.tokens,
            "equal_answers": same.equal_answers,
            "answers": same.answers,
        }

    def _floor(self, name: str) -> dict[str, Any]:
        floor, measured = self.floors[name], self.summaries[name].ms_per_step
        return {
            "weight_bytes": floor.weight_bytes,
            "bytes_per_second": _rounded(floor.bytes_per_second),
            "floor_ms": _rounded(floor.milliseconds),
            "floor_share": None if not measured else _rounded(floor.milliseconds / measured),
            "operations": floor.operations,
            "operations_per_second": None if not measured else _rounded(1e3 * floor.operations / measured),
        }


def _seconds_per_step(outcome: Outcome) -> float:
    return outcome.seconds_per_step


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _ratio_dict(value: Ratio | None) -> dict[str, float | int] | None:
    if value is None:
        return None
    return {
        key: item if isinstance(item, int) else float(f"{item:.6g}") for key, item in value.as_dict().items()
    }
