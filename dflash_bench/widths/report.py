"""The result of ``dflash-bench widths`` as JSON values and as a table (docs/guide/width.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from dflash_bench.report import Report
from dflash_bench.stats import Agreement, Ratio, agreement, as_dict, ratio, tokens_per_second
from dflash_bench.systems.own import ADAPTIVE, PLAIN
from dflash_bench.tables import aligned, cell, joined, rounded
from dflash_rt.speculation.width_correction import StepCosts

__all__ = ["WidthsReport", "render", "shares_text"]

_FORMAT, _FORMAT_VERSION = "dflash-bench-widths", 1


@dataclass(frozen=True, kw_only=True)
class WidthsReport(Report):
    """Outcomes of plain decoding, of each fixed number of draft tokens and of the number that adapts.

    ``num_draft_tokens`` lists ``plain`` (0) and the fixed numbers; all outcomes are on the same prompts.

    Attributes:
        kinds: what each prompt is an example of; no two are the same.
        sampled: for each prompt, whether its answer was sampled.
        costs: of a step by draft tokens, from 0 on, as they were measured at load.
    """

    kinds: tuple[str, ...]
    sampled: tuple[bool, ...]
    costs: StepCosts

    @property
    def widest(self) -> str:
        """The system with the largest fixed number of draft tokens."""
        return max(self.num_draft_tokens, key=self.num_draft_tokens.__getitem__)

    @property
    def best_fixed(self) -> str:
        """The fixed number (plain decoding is one) that was fastest over all prompts together."""
        return max(self.num_draft_tokens, key=lambda name: self.summaries[name].tokens_per_second or 0.0)

    @property
    def over_best_fixed(self) -> float | None:
        """Decode rate of the number that adapts over that of the best fixed one, all prompts together."""
        adaptive = self.summaries[ADAPTIVE].tokens_per_second
        best = self.summaries[self.best_fixed].tokens_per_second
        return adaptive / best if adaptive and best else None

    @property
    def over_plain(self) -> dict[str, float]:
        """By prompt, the decode rate over that of plain decoding in the same repeat; median over repeats."""
        ratios = {kind: self._ratio(ADAPTIVE, number) for number, kind in enumerate(self.kinds)}
        return {kind: value.median for kind, value in ratios.items() if value is not None}

    def by_costs(self, name: str, prompt: int | None = None) -> float | None:
        """Decode rate over plain decoding's if every step had cost what it did at load.

        It tells what the choices were worth, whatever the machine did meanwhile. Of one prompt or of all.
        """
        tokens, plain_steps = 0, 0.0
        for (number, _), outcome in self.outcomes[name].items():
            if prompt in (None, number):
                tokens += outcome.decoded_tokens
                plain_steps += sum(self.costs.relative[count] for count in outcome.drafted_per_step or ())
        return tokens / plain_steps if plain_steps else None

    def agreement(self, *, sampled: bool) -> Agreement:
        """How far greedy answers, or sampled ones, of all systems are those of plain decoding."""
        plain = self.outcomes[PLAIN]
        return agreement(
            (outcome, plain[pair])
            for name, outcomes in self.outcomes.items()
            for pair, outcome in outcomes.items()
            if name != PLAIN and self.sampled[pair[0]] == sampled
        )

    def accepted(self, name: str) -> list[float]:
        """By position, the share of the steps with a draft there that accepted it; up to the last drafted."""
        drafted, accepted = Counter[int](), Counter[int]()
        for outcome in self.outcomes[name].values():
            pairs = zip(outcome.drafted_per_step or (), outcome.accepted_per_step or (), strict=True)
            for drafts, count in pairs:
                drafted.update(range(drafts))
                accepted.update(range(count))
        return [accepted[position] / drafted[position] for position in sorted(drafted)]

    def chosen(self, prompt: int | None = None) -> dict[int, float]:
        """Share of the adaptive steps by their draft tokens; of one prompt, or of all."""
        counts: Counter[int] = Counter()
        for (number, _), outcome in self.outcomes[ADAPTIVE].items():
            if prompt in (None, number):
                counts.update(outcome.drafted_per_step or ())
        return {count: counts[count] / counts.total() for count in sorted(counts)}

    def rate(self, name: str, prompt: int) -> float | None:
        """Tokens per second on one prompt, median over repeats."""
        rates = [
            o.tokens_per_second for (n, _), o in self.outcomes[name].items() if n == prompt and o.measurable
        ]
        return median(rates) if rates else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; what couldn't be measured is ``None``."""
        conditions = asdict(self.conditions)
        conditions["prompt_tokens"] = list(conditions["prompt_tokens"])
        return {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            **conditions,
            "load_cost_ms": [rounded(1e3 * seconds) for seconds in self.costs.seconds],
            "systems": {name: self._system(name) for name in self.outcomes},
            "prompts": [self._prompt(number) for number in range(len(self.kinds))],
            "greedy_answers": self._agreement_dict(sampled=False),
            "sampled_answers": self._agreement_dict(sampled=True),
            "best_fixed": self.best_fixed,
            "adaptive_over_best_fixed": rounded(self.over_best_fixed),
            "lowest_over_plain": rounded(min(self.over_plain.values(), default=None)),
        }

    def _ratio(self, name: str, prompt: int) -> Ratio | None:
        one = {pair: outcome for pair, outcome in self.outcomes[name].items() if pair[0] == prompt}
        return ratio(one, self.outcomes[PLAIN], tokens_per_second)

    def _agreement_dict(self, *, sampled: bool) -> dict[str, int]:
        found = self.agreement(sampled=sampled)
        return {"equal": found.equal_answers, "all": found.answers}

    def _system(self, name: str) -> dict[str, Any]:
        total = self.summaries[name]
        cost = self.step_cost(name) if name in self.num_draft_tokens else None
        return {
            "num_draft_tokens": self.num_draft_tokens.get(name),
            "tokens_per_second": rounded(total.tokens_per_second),
            "tokens_per_step": rounded(total.tokens_per_step),
            "step_cost": as_dict(cost),
            "over_plain_by_costs": rounded(self.by_costs(name)),
            "accepted_by_position": [rounded(share) for share in self.accepted(name)],
        }

    def _prompt(self, number: int) -> dict[str, Any]:
        kind = self.kinds[number]
        return {
            "kind": kind,
            "tokens_per_second": {name: rounded(self.rate(name, number)) for name in self.outcomes},
            "over_plain": rounded(self.over_plain.get(kind)),
            "over_plain_by_costs": rounded(self.by_costs(ADAPTIVE, number)),
            "steps_by_draft_tokens": {str(n): rounded(share) for n, share in self.chosen(number).items()},
        }


def render(report: WidthsReport) -> str:
    """The table. A cell of "-" is what couldn't be measured."""
    return joined(_sections(report))


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
        rows.append(
            [
                name,
                at_load,
                cell(cost),
                cell(total.tokens_per_step, ".2f"),
                cell(total.tokens_per_second, ".1f"),
                cell(report.speed_ratio(name, PLAIN)),
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
    largest = sorted(shares, key=lambda count: -shares[count])[:3]
    return ", ".join(f"{count}: {shares[count]:.0%}" for count in sorted(largest))
