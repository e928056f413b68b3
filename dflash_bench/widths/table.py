"""The report of ``dflash-rt bench --widths`` in plain text. A cell of "-" is what couldn't be measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dflash_bench.run.report import PLAIN
from dflash_bench.run.table import aligned
from dflash_bench.stats import ratio
from dflash_bench.widths.report import ADAPTIVE

if TYPE_CHECKING:
    from dflash_bench.widths.report import WidthsReport

__all__ = ["render", "shares_text"]


def render(report: WidthsReport) -> str:
    """The table: sections with an empty line between them."""
    return "\n\n".join("\n".join(lines) for lines in _sections(report))


def _sections(report: WidthsReport) -> Iterator[list[str]]:
    c = report.conditions
    yield [
        f"{c.bundle} ({c.precision}) on {c.backend}, {c.threads} threads, {c.cpu}",
        f"{len(report.kinds)} prompts, at most {c.max_new_tokens} new tokens, {c.repeats} repeats",
    ]
    yield _by_width(report)
    yield _by_position(report)
    yield _by_prompt(report)
    yield _result(report)


def _by_width(report: WidthsReport) -> list[str]:
    rows = [["", "cost at load", "cost in the run", "tokens/step", "tokens/s", "over plain"]]
    for name, total in report.summaries.items():
        width = report.widths.get(name)
        at_load = "-"
        if width is not None:
            at_load = (
                f"{1e3 * report.costs.seconds[width - 1]:.1f} ms, {report.costs.relative[width - 1]:.2f}"
            )
        cost = None if width is None else report.step_cost(name)
        gain = ratio(report.outcomes[name], report.outcomes[PLAIN], lambda o: o.tokens_per_second)
        rows.append(
            [
                name,
                at_load,
                "-" if cost is None else str(cost),
                _number(total.tokens_per_step, ".2f"),
                _number(total.tokens_per_second, ".1f"),
                "-" if gain is None else str(gain),
            ]
        )
    return [
        *aligned(rows),
        "(costs are relative to plain steps; medians and quartiles over pairs of runs)",
    ]


def _by_position(report: WidthsReport) -> list[str]:
    widest = max(report.widths, key=lambda name: report.widths[name])
    shares = {name: report.accepted(name) for name in dict.fromkeys((widest, ADAPTIVE))}
    positions = max(map(len, shares.values()))
    rows = [["drafts accepted", *(str(position + 1) for position in range(positions))]]
    for name, values in shares.items():
        cells = [f"{value:.0%}" for value in values]
        rows.append([name, *cells, *["-"] * (positions - len(cells))])
    return aligned(rows)


def _by_prompt(report: WidthsReport) -> list[str]:
    rows = [["tokens/s", "plain", "best fixed", "adaptive", "over plain", "by costs", "steps by width"]]
    over_plain = report.over_plain
    for number, kind in enumerate(report.kinds):
        rates = {name: report.rate(name, number) or 0.0 for name in report.widths}
        best = max(rates, key=rates.__getitem__)
        rows.append(
            [
                kind,
                _number(rates[PLAIN], ".1f"),
                f"{rates[best]:.1f} ({report.widths[best]})",
                _number(report.rate(ADAPTIVE, number), ".1f"),
                _number(over_plain.get(kind), ".2f"),
                _number(report.by_costs(ADAPTIVE, number), ".2f"),
                shares_text(report.chosen(number)),
            ]
        )
    return [*aligned(rows), "(by costs: over plain, had each step taken what its width cost at load)"]


def _result(report: WidthsReport) -> list[str]:
    over_plain, lines = report.over_plain, []
    costs = {
        kind: value
        for number, kind in enumerate(report.kinds)
        if (value := report.by_costs(ADAPTIVE, number)) is not None
    }
    for what, values in (("", over_plain), (" by costs", costs)):
        if values:
            lowest = min(values, key=values.__getitem__)
            lines.append(f"adaptive over plain{what}: at least {values[lowest]:.3f} ({lowest})")
    if report.over_best_fixed is not None:
        lines.append(
            f"adaptive over the best fixed width ({report.best_fixed}), all prompts: "
            f"{report.over_best_fixed:.3f}"
        )
    by_costs = {name: report.by_costs(name) or 0.0 for name in report.widths}
    best = max(by_costs, key=by_costs.__getitem__)
    ours = report.by_costs(ADAPTIVE)
    if ours is not None and by_costs[best]:
        lines.append(f"the same by costs ({best}): {ours / by_costs[best]:.3f}")
    greedy, sampled = report.agreement(sampled=False), report.agreement(sampled=True)
    if greedy.answers:
        what = "as in plain decoding" + ("" if greedy.exact else ": a near tie, or a bug")
        lines.append(f"greedy: {greedy.equal_answers} of {greedy.answers} answers {what}")
    if sampled.answers:
        lines.append(f"sampled: {sampled.equal_answers} of {sampled.answers} answers (rounding may move one)")
    return lines


def shares_text(shares: Mapping[int, float]) -> str:
    """Such as ``1: 80%, 4: 20%``, the most frequent three."""
    largest: Sequence[int] = sorted(shares, key=lambda width: -shares[width])[:3]
    return ", ".join(f"{width}: {shares[width]:.0%}" for width in sorted(largest))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
