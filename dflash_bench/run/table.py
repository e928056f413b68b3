"""A benchmark's report for people, in plain text. A cell of "-" is what couldn't be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dflash_bench.run.report import PLAIN, BenchReport
from dflash_bench.stats import OUTSIDE, STAGES

__all__ = ["aligned", "render"]


def render(report: BenchReport) -> str:
    """The table: sections with an empty line between them."""
    return "\n\n".join("\n".join(lines) for lines in _sections(report))


def _sections(report: BenchReport) -> Iterator[list[str]]:
    yield _heading(report)
    yield _speeds(report)
    if len(report.outcomes) > len(report.ours):
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
        *([f"beside it: {c.beside}"] if c.beside else []),
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
                _number(total.tokens_per_second, ".1f"),
                _number(total.ms_per_step, ".2f"),
                _number(total.tokens_per_step, ".2f"),
                _number(1e3 * total.prefill_seconds, ".0f", " ms"),
                _number(total.outside_share, ".1%"),
                "all" if same.exact else f"{same.equal_tokens} of {same.tokens}",
            ]
        )
    return aligned(rows)


def _ratios(report: BenchReport) -> list[str]:
    others = [name for name in report.summaries if name not in report.drafted]
    rows = [["tokens/s of … over", *others]]
    for name in report.ours:
        ratios = [None if other == name else report.speed_ratio(name, other) for other in others]
        rows.append([name, *("-" if value is None else str(value) for value in ratios)])
    return [*aligned(rows), "(median and quartiles over the pairs of runs)"]


def _drafting(report: BenchReport) -> list[str]:
    rows = [["", "width", "step cost", "tokens/step", "expected gain", "measured gain"]]
    for name in report.drafted:
        cost, gain = report.step_cost(name), report.speed_ratio(name, PLAIN)
        rows.append(
            [
                name,
                str(report.widths[name]),
                "-" if cost is None else str(cost),
                _number(report.summaries[name].tokens_per_step, ".2f"),
                _number(report.expected_gain(name), ".2f"),
                "-" if gain is None else str(gain),
            ]
        )
    return [*aligned(rows), "(cost of a step and gain are relative to plain decoding)"]


def _stages(report: BenchReport) -> list[str]:
    splits = {name: report.summaries[name].stage_ms or {} for name in report.ours}
    found = {stage for split in splits.values() for stage in split}
    order = [*(s for s in STAGES if s in found), *sorted(found - {*STAGES, OUTSIDE}), OUTSIDE]
    rows = [["ms of a step", *order]]
    rows += [[name, *(_number(split.get(s), ".2f") for s in order)] for name, split in splits.items()]
    return aligned(rows)


def _floors(report: BenchReport) -> list[str]:
    rows = [["", "weights read", "floor", "measured", "floor/measured", "arithmetic"]]
    for name, floor in report.floors.items():
        measured = report.summaries[name].ms_per_step
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
    bandwidth = next(iter(report.floors.values())).bytes_per_second / 1e9
    return [
        *aligned(rows),
        f"(reading memory at {bandwidth:.1f} GB/s; the more rows, the more arithmetic counts)",
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
