"""The result of a benchmark: as a table for people and as one JSON object for scripts.

docs/benchmark.md says how each number is measured and has every key of the JSON object with its unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dflash_rt.bench_contenders import Outcome
from dflash_rt.bench_floor import StepFloor
from dflash_rt.bench_stats import (
    OUTSIDE,
    STAGES,
    Agreement,
    Outcomes,
    Ratio,
    Summary,
    agreement,
    ratio,
    summarise,
)

__all__ = ["PLAIN", "BenchReport", "Conditions"]

PLAIN = "plain"
"""Our plain decoding: always measured, and what the tokens of all others are compared with."""

_FORMAT, _FORMAT_VERSION = "dflash-bench", 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the numbers depend on besides the code.

    ``load_before`` and ``load_after`` are the machine's load averages over one minute, ours included.
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
        """Names of ours that draft."""
        return tuple(name for name in self.ours if name in self.widths)

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
        return "\n\n".join("\n".join(lines) for lines in self._sections())

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

    # The table, section by section. A cell of "-" is what couldn't be measured.

    def _sections(self) -> Iterator[list[str]]:
        yield self._heading()
        yield self._speeds()
        if len(self.outcomes) > len(self.ours):
            yield self._ratios()
        if self.drafted:
            yield self._drafting()
        yield self._stages()
        if self.floors:
            yield self._floors()
        notes = [f"{name} was skipped: {reason}" for name, reason in self.skipped.items()]
        notes += [
            f"{name} gave other tokens than {PLAIN} in {same.answers - same.equal_answers} of "
            f"{same.answers} answers; its rate is that of its own tokens"
            for name, same in self.agreements.items()
            if not same.exact
        ]
        if notes:
            yield notes

    def _heading(self) -> list[str]:
        c = self.conditions
        shortest, longest = min(c.prompt_tokens), max(c.prompt_tokens)
        loads = [f"{load:.1f}" for load in (c.load_before, c.load_after) if load is not None]
        return [
            f"{c.bundle} ({c.precision}) on {c.backend}, {c.threads} threads, {c.cpu}",
            f"{len(c.prompt_tokens)} prompts of {shortest} to {longest} tokens, at most {c.max_new_tokens} "
            f"new tokens, {c.repeats} repeats" + (f"; load {' before, '.join(loads)} after" if loads else ""),
        ]

    def _speeds(self) -> list[str]:
        rows = [["", "tokens/s", "ms/step", "tokens/step", "first token", "outside run", "equal tokens"]]
        for name, total in self.summaries.items():
            same = self.agreements[name]
            rows.append(
                [
                    name,
                    _number(total.tokens_per_second, ".1f"),
                    _number(total.ms_per_step, ".2f"),
                    _number(total.tokens_per_step, ".2f"),
                    _number(1e3 * total.prefill_seconds, ".0f", " ms"),
                    _number(total.outside_share, ".1%"),
                    "all" if same.exact else f"{same.equal_tokens} of {same.tokens}",
                ]
            )
        return _aligned(rows)

    def _ratios(self) -> list[str]:
        others = [name for name in self.summaries if name not in self.drafted]
        rows = [["tokens/s of … over", *others]]
        for name in self.ours:
            ratios = [None if other == name else self.speed_ratio(name, other) for other in others]
            rows.append([name, *("-" if value is None else str(value) for value in ratios)])
        return [*_aligned(rows), "(median and quartiles over the pairs of runs)"]

    def _drafting(self) -> list[str]:
        rows = [["", "width", "step cost", "tokens/step", "expected gain", "measured gain"]]
        for name in self.drafted:
            cost, gain = self.step_cost(name), self.speed_ratio(name, PLAIN)
            rows.append(
                [
                    name,
                    str(self.widths[name]),
                    "-" if cost is None else str(cost),
                    _number(self.summaries[name].tokens_per_step, ".2f"),
                    _number(self.expected_gain(name), ".2f"),
                    "-" if gain is None else str(gain),
                ]
            )
        return [*_aligned(rows), "(cost of a step and gain are relative to plain decoding)"]

    def _stages(self) -> list[str]:
        splits = {name: self.summaries[name].stage_ms or {} for name in self.ours}
        found = {stage for split in splits.values() for stage in split}
        order = [*(s for s in STAGES if s in found), *sorted(found - {*STAGES, OUTSIDE}), OUTSIDE]
        rows = [["ms of a step", *order]]
        rows += [[name, *(_number(split.get(s), ".2f") for s in order)] for name, split in splits.items()]
        return _aligned(rows)

    def _floors(self) -> list[str]:
        rows = [["", "weights read", "floor", "measured", "floor/measured", "arithmetic"]]
        for name, floor in self.floors.items():
            measured = self.summaries[name].ms_per_step
            speed = None if not measured else 1e-6 * floor.operations / measured
            rows.append(
                [
                    name,
                    f"{floor.weight_bytes / 1e6:.0f} MB",
                    f"{floor.milliseconds:.1f} ms",
                    _number(measured, ".1f", " ms"),
                    _number(floor.milliseconds / measured if measured else None, ".0%"),
                    _number(speed, ".0f", " GFLOP/s"),
                ]
            )
        bandwidth = next(iter(self.floors.values())).bytes_per_second / 1e9
        return [
            *_aligned(rows),
            f"(reading memory at {bandwidth:.1f} GB/s; the more rows, the more arithmetic counts)",
        ]


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


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
