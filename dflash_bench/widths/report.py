"""The result of ``dflash-rt bench --widths`` as a table and as JSON values (docs/guide/width.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median
from typing import Any

from dflash_bench.conditions import Conditions
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
from dflash_bench.systems.own import ADAPTIVE, PLAIN
from dflash_bench.tables import rounded
from dflash_rt.speculation.width_correction import StepCosts

__all__ = ["WidthsReport"]

_FORMAT, _FORMAT_VERSION = "dflash-bench-widths", 1


@dataclass(frozen=True, kw_only=True)
class WidthsReport:
    """Outcomes of plain decoding, of each fixed number of draft tokens and of the number that adapts.

    Attributes:
        conditions: what was run, where.
        kinds: what each prompt is an example of; no two are the same.
        sampled: for each prompt, whether its answer was sampled.
        outcomes: by system: ``plain``, ``drafted-N``, and ``adaptive``; all on the same prompts.
        num_draft_tokens: of those with a fixed number; 0 of ``plain``.
        costs: of a step by draft tokens, from 0 on, as they were measured at load.
    """

    conditions: Conditions
    kinds: tuple[str, ...]
    sampled: tuple[bool, ...]
    outcomes: Mapping[str, Outcomes]
    num_draft_tokens: Mapping[str, int]
    costs: StepCosts

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Totals by system, over all prompts."""
        return {name: summarise(outcomes) for name, outcomes in self.outcomes.items()}

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
        every = [
            agreement(
                {pair: found for pair, found in outcomes.items() if self.sampled[pair[0]] == sampled}, plain
            )
            for plain in [self.outcomes[PLAIN]]
            for name, outcomes in self.outcomes.items()
            if name != PLAIN
        ]
        return Agreement(
            equal_tokens=sum(one.equal_tokens for one in every),
            tokens=sum(one.tokens for one in every),
            equal_answers=sum(one.equal_answers for one in every),
            answers=sum(one.answers for one in every),
        )

    def step_cost(self, name: str) -> Ratio | None:
        """Time of a step with a fixed number over that of a plain step, in this run."""
        return ratio(self.outcomes[name], self.outcomes[PLAIN], seconds_per_step)

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
