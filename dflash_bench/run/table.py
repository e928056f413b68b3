"""A benchmark's report for people, in plain text. A cell of "-" is what couldn't be measured."""

from __future__ import annotations

from collections.abc import Iterator

from dflash_bench.run.report import BenchReport
from dflash_bench.stats import OUTSIDE, STAGES
from dflash_bench.systems.own import PLAIN
from dflash_bench.tables import aligned, cell

__all__ = ["render"]


def render(report: BenchReport) -> str:
    """The table: sections with an empty line between them."""
    return "\n\n".join("\n".join(lines) for lines in _sections(report))


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
        rows.append([name, *("-" if value is None else str(value) for value in ratios)])
    return [*aligned(rows), "(median and quartiles over the pairs of runs)"]


def _drafting(report: BenchReport) -> list[str]:
    rows = [["", "draft tokens", "step cost", "tokens/step", "expected gain", "measured gain"]]
    for name in report.drafted:
        cost, gain = report.step_cost(name), report.speed_ratio(name, PLAIN)
        rows.append(
            [
                name,
                str(report.num_draft_tokens[name]),
                "-" if cost is None else str(cost),
                cell(report.summaries[name].tokens_per_step, ".2f"),
                cell(report.expected_gain(name), ".2f"),
                "-" if gain is None else str(gain),
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
