"""The report of ``dflash-bench widths`` in plain text. A cell of "-" is what couldn't be measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dflash_bench.stats import ratio, tokens_per_second
from dflash_bench.systems.own import ADAPTIVE, PLAIN
from dflash_bench.tables import aligned, cell
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
    yield _by_system(report)
    yield _by_position(report)
    yield _by_prompt(report)
    yield _result(report)


def _by_system(report: WidthsReport) -> list[str]:
    rows = [["", "cost at load", "cost in the run", "tokens/step", "tokens/s", "over plain"]]
    for name, total in report.summaries.items():
        count = report.num_draft_tokens.get(name)
        at_load, cost = "-", None
        if count is not None:
            at_load = f"{1e3 * report.costs.seconds[count]:.1f} ms, {report.costs.relative[count]:.2f}"
            cost = report.step_cost(name)
        gain = ratio(report.outcomes[name], report.outcomes[PLAIN], tokens_per_second)
        rows.append(
            [
                name,
                at_load,
                "-" if cost is None else str(cost),
                cell(total.tokens_per_step, ".2f"),
                cell(total.tokens_per_second, ".1f"),
                "-" if gain is None else str(gain),
            ]
        )
    return [
        *aligned(rows),
        "(costs are relative to plain steps; medians and quartiles over pairs of runs)",
    ]


def _by_position(report: WidthsReport) -> list[str]:
    shares = {name: report.accepted(name) for name in dict.fromkeys((report.widest, ADAPTIVE))}
    positions = max(map(len, shares.values()))
    rows = [["drafts accepted", *(str(position + 1) for position in range(positions))]]
    for name, values in shares.items():
        cells = [f"{value:.0%}" for value in values]
        rows.append([name, *cells, *["-"] * (positions - len(cells))])
    return aligned(rows)


def _by_prompt(report: WidthsReport) -> list[str]:
    rows = [
        ["tokens/s", "plain", "best fixed", "adaptive", "over plain", "by costs", "steps by draft tokens"]
    ]
    over_plain = report.over_plain
    for number, kind in enumerate(report.kinds):
        rates = {name: report.rate(name, number) or 0.0 for name in report.num_draft_tokens}
        best = max(rates, key=rates.__getitem__)
        rows.append(
            [
                kind,
                cell(rates[PLAIN], ".1f"),
                f"{rates[best]:.1f} ({report.num_draft_tokens[best]})",
                cell(report.rate(ADAPTIVE, number), ".1f"),
                cell(over_plain.get(kind), ".2f"),
                cell(report.by_costs(ADAPTIVE, number), ".2f"),
                shares_text(report.chosen(number)),
            ]
        )
    return [*aligned(rows), "(by costs: over plain, had each step taken what it cost at load)"]


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
            f"adaptive over the best fixed number ({report.best_fixed}), all prompts: "
            f"{report.over_best_fixed:.3f}"
        )
    by_costs = {name: report.by_costs(name) or 0.0 for name in report.num_draft_tokens}
    best = max(by_costs, key=by_costs.__getitem__)
    adaptive = report.by_costs(ADAPTIVE)
    if adaptive is not None and by_costs[best]:
        lines.append(f"the same by costs ({best}): {adaptive / by_costs[best]:.3f}")
    greedy, sampled = report.agreement(sampled=False), report.agreement(sampled=True)
    if greedy.answers:
        what = "as in plain decoding" + ("" if greedy.exact else ": a near tie, or a bug")
        lines.append(f"greedy: {greedy.equal_answers} of {greedy.answers} answers {what}")
    if sampled.answers:
        lines.append(f"sampled: {sampled.equal_answers} of {sampled.answers} answers (rounding may move one)")
    return lines


def shares_text(shares: Mapping[int, float]) -> str:
    """Such as ``1: 80%, 4: 20%``, the most frequent three."""
    largest: Sequence[int] = sorted(shares, key=lambda count: -shares[count])[:3]
    return ", ".join(f"{count}: {shares[count]:.0%}" for count in sorted(largest))
