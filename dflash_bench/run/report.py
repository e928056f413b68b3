"""The result of a benchmark: as one JSON object for scripts, and as a table for people.

docs/reference/benchmark.md says how each number is measured, and lists every key of the JSON object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dflash_bench.floor import StepFloor
from dflash_bench.report import Report
from dflash_bench.stats import OUTSIDE, STAGES, Agreement, agreement, as_dict
from dflash_bench.systems.own import PLAIN
from dflash_bench.tables import aligned, cell, joined, rounded

__all__ = ["BASELINE", "BenchReport", "render"]

BASELINE = "baseline-"
"""What the rows of another bundle begin with."""

_FORMAT, _FORMAT_VERSION = "dflash-bench", 1


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """What every system did, and what follows from it. ``num_draft_tokens`` lists those that draft.

    Attributes:
        floors: floor of a step of the bundle's systems where it is known.
        bytes_per_second: what memory delivers.
        skipped: systems that were left out, with the reason.
    """

    floors: Mapping[str, StepFloor] = field(default_factory=dict)
    bytes_per_second: float = 0.0
    skipped: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        """How far each system's tokens are those of plain decoding."""
        plain = self.outcomes[PLAIN]
        return {
            name: agreement((outcome, plain[pair]) for pair, outcome in outcomes.items())
            for name, outcomes in self.outcomes.items()
        }

    @property
    def own(self) -> tuple[str, ...]:
        """Names of this project's systems: those that know their stages."""
        return tuple(name for name, total in self.summaries.items() if total.stage_seconds is not None)

    @property
    def drafted(self) -> tuple[str, ...]:
        """Those that draft; not the baseline bundle's, whose plain steps cost something else."""
        return tuple(n for n in self.own if n in self.num_draft_tokens and not n.startswith(BASELINE))

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


def render(report: BenchReport) -> str:
    """The table. A cell of "-" is what couldn't be measured."""
    return joined(_sections(report))


def _sections(report: BenchReport) -> Iterator[list[str]]:
    yield _heading(report)
    yield _speeds(report)
    if len(report.outcomes) > len(report.own):
        yield _ratios(report)
    if report.drafted:
        yield _drafting(report)
    yield _stages(report)
    if report.floors:
        yield _floors(report)
    notes = [f"{name} was skipped: {reason}" for name, reason in report.skipped.items()]
    notes += [
        f"{name} gave other tokens than {PLAIN} in {same.answers - same.equal_answers} of "
        f"{same.answers} answers; its rate is that of its own tokens"
        for name, same in report.agreements.items()
        if not same.exact
    ]
    if notes:
        yield notes


def _heading(report: BenchReport) -> list[str]:
    c = report.conditions
    shortest, longest = min(c.prompt_tokens), max(c.prompt_tokens)
    loads = [f"{load:.1f}" for load in (c.load_before, c.load_after) if load is not None]
    stored = ", ".join(part for part in (c.precision, c.quantization) if part)
    return [
        f"{c.bundle} ({stored}) on {c.backend}, {c.threads} threads, {c.cpu}",
        *([f"baseline: {c.baseline}"] if c.baseline else []),
        f"{len(c.prompt_tokens)} prompts of {shortest} to {longest} tokens, at most {c.max_new_tokens} "
        f"new tokens, {c.repeats} repeats" + (f"; load {' before, '.join(loads)} after" if loads else ""),
    ]


def _speeds(report: BenchReport) -> list[str]:
    rows = [["", "tokens/s", "ms/step", "tokens/step", "first token", "outside run", "equal tokens"]]
    for name, total in report.summaries.items():
        same = report.agreements[name]
        rows.append(
            [
                name,
                cell(total.tokens_per_second, ".1f"),
                cell(total.ms_per_step, ".2f"),
                cell(total.tokens_per_step, ".2f"),
                cell(1e3 * total.prefill_seconds, ".0f", " ms"),
                cell(total.outside_share, ".1%"),
                "all" if same.exact else f"{same.equal_tokens} of {same.tokens}",
            ]
        )
    return aligned(rows)


def _ratios(report: BenchReport) -> list[str]:
    others = [name for name in report.summaries if name not in report.drafted]
    rows = [["tokens/s of … over", *others]]
    for name in report.own:
        ratios = [None if other == name else report.speed_ratio(name, other) for other in others]
        rows.append([name, *map(cell, ratios)])
    return [*aligned(rows), "(median and quartiles over the pairs of runs)"]


def _drafting(report: BenchReport) -> list[str]:
    rows = [["", "draft tokens", "step cost", "tokens/step", "expected gain", "measured gain"]]
    for name in report.drafted:
        rows.append(
            [
                name,
                str(report.num_draft_tokens[name]),
                cell(report.step_cost(name)),
                cell(report.summaries[name].tokens_per_step, ".2f"),
                cell(report.expected_gain(name), ".2f"),
                cell(report.speed_ratio(name, PLAIN)),
            ]
        )
    return [*aligned(rows), "(cost of a step and gain are relative to plain decoding)"]


def _stages(report: BenchReport) -> list[str]:
    splits = {name: report.summaries[name].stage_ms or {} for name in report.own}
    found = {stage for split in splits.values() for stage in split}
    order = [*(s for s in STAGES if s in found), *sorted(found - {*STAGES, OUTSIDE}), OUTSIDE]
    rows = [["ms of a step", *order]]
    rows += [[name, *(cell(split.get(s), ".2f") for s in order)] for name, split in splits.items()]
    return aligned(rows)


def _floors(report: BenchReport) -> list[str]:
    rows = [["", "weights read", "floor", "measured", "floor/measured", "arithmetic"]]
    for name, floor in report.floors.items():
        measured, floor_ms = report.summaries[name].ms_per_step, floor.milliseconds(report.bytes_per_second)
        rows.append(
            [
                name,
                f"{floor.weight_bytes / 1e6:.0f} MB",
                f"{floor_ms:.1f} ms",
                cell(measured, ".1f", " ms"),
                cell(floor_ms / measured if measured else None, ".0%"),
                cell(1e-6 * (floor.operations or 0) / measured if measured else None, ".0f", " GFLOP/s"),
            ]
        )
    bandwidth = report.bytes_per_second / 1e9
    return [
        *aligned(rows),
        f"(reading memory at {bandwidth:.1f} GB/s; the more rows, the more arithmetic counts)",
    ]
