"""The result of a benchmark, and its numbers as one JSON object for scripts.

docs/reference/benchmark.md says how each number is measured, and lists every key of the JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dflash_bench.conditions import Conditions
from dflash_bench.floor import StepFloor
from dflash_bench.stats import (
    Agreement,
    Outcomes,
    Ratio,
    Summary,
    agreement,
    as_dict,
    ratio,
    seconds_per_step,
    summarise,
    tokens_per_second,
)
from dflash_bench.systems.own import PLAIN
from dflash_bench.tables import rounded

__all__ = ["BASELINE", "BenchReport"]

BASELINE = "baseline-"
"""What the rows of another bundle begin with."""

_FORMAT, _FORMAT_VERSION = "dflash-bench", 1


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What every system did, and what follows from it.

    Attributes:
        conditions: what was run, where.
        outcomes: each system's outcomes; :data:`PLAIN` is among them.
        num_draft_tokens: drafted tokens of each system that drafts; the others aren't listed.
        floors: floor of a step of the bundle's systems where it is known.
        bytes_per_second: what memory delivers.
        skipped: systems that were left out, with the reason.
    """

    conditions: Conditions
    outcomes: Mapping[str, Outcomes]
    num_draft_tokens: Mapping[str, int]
    floors: Mapping[str, StepFloor] = field(default_factory=dict)
    bytes_per_second: float = 0.0
    skipped: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Totals by system."""
        return {name: summarise(outcomes) for name, outcomes in self.outcomes.items()}

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        """How far each system's tokens are those of plain decoding."""
        return {name: agreement(outcomes, self.outcomes[PLAIN]) for name, outcomes in self.outcomes.items()}

    @property
    def own(self) -> tuple[str, ...]:
        """Names of this project's systems: those that know their stages."""
        return tuple(name for name, total in self.summaries.items() if total.stage_seconds is not None)

    @property
    def drafted(self) -> tuple[str, ...]:
        """Those that draft; not the baseline bundle's, whose plain steps cost something else."""
        return tuple(n for n in self.own if n in self.num_draft_tokens and not n.startswith(BASELINE))

    def speed_ratio(self, name: str, other: str) -> Ratio | None:
        """Tokens per second of one over another."""
        return ratio(self.outcomes[name], self.outcomes[other], tokens_per_second)

    def step_cost(self, name: str) -> Ratio | None:
        """Time of a step over that of a plain step, on the same prompts and so at the same contexts."""
        return ratio(self.outcomes[name], self.outcomes[PLAIN], seconds_per_step)

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
            "systems": {name: self._system(name) for name in self.summaries},
            "ratios": {
                name: {
                    other: as_dict(self.speed_ratio(name, other)) for other in self.summaries if other != name
                }
                for name in self.own
            },
            "drafting": {
                name: {
                    "num_draft_tokens": self.num_draft_tokens[name],
                    "step_cost": as_dict(self.step_cost(name)),
                    "tokens_per_step": rounded(self.summaries[name].tokens_per_step),
                    "expected_gain": rounded(self.expected_gain(name)),
                    "measured_gain": as_dict(self.speed_ratio(name, PLAIN)),
                }
                for name in self.drafted
            },
            "floor": {name: self._floor(name) for name in self.floors},
            "skipped": dict(self.skipped),
        }

    def _system(self, name: str) -> dict[str, Any]:
        total, same = self.summaries[name], self.agreements[name]
        stages = total.stage_ms
        count = self.num_draft_tokens.get(name)
        positions = None if count is None else total.accepted_by_position(count)
        return {
            "tokens_per_second": rounded(total.tokens_per_second),
            "ms_per_step": rounded(total.ms_per_step),
            "tokens_per_step": rounded(total.tokens_per_step),
            "first_token_ms": rounded(1e3 * total.prefill_seconds),
            "outside_share": rounded(total.outside_share),
            "stage_ms": None if stages is None else {key: rounded(value) for key, value in stages.items()},
            "num_draft_tokens": count,
            "accepted_by_position": None if positions is None else [rounded(share) for share in positions],
            "decoded_tokens": total.decoded_tokens,
            "steps": total.steps,
            "equal_tokens": same.equal_tokens,
            "compared_tokens": same.tokens,
            "equal_answers": same.equal_answers,
            "answers": same.answers,
        }

    def _floor(self, name: str) -> dict[str, Any]:
        floor, measured = self.floors[name], self.summaries[name].ms_per_step
        floor_ms, operations = floor.milliseconds(self.bytes_per_second), floor.operations or 0
        return {
            "weight_bytes": floor.weight_bytes,
            "bytes_per_second": rounded(self.bytes_per_second),
            "floor_ms": rounded(floor_ms),
            "floor_share": rounded(floor_ms / measured) if measured else None,
            "operations": operations,
            "operations_per_second": rounded(1e3 * operations / measured) if measured else None,
        }
