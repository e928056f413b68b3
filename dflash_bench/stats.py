"""From outcomes to numbers. Pure functions: nothing here measures anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import median, median_low, quantiles
from typing import TypeAlias

from dflash_bench.systems.base import Outcome
from dflash_bench.tables import rounded
from dflash_export.parity.limits import equal_prefix

__all__ = [
    "OUTSIDE",
    "STAGES",
    "Agreement",
    "Outcomes",
    "Ratio",
    "Summary",
    "agreement",
    "as_dict",
    "quartiles",
    "ratio",
    "seconds_per_step",
    "summarise",
    "tokens_per_second",
]

STAGES = ("inject", "draft", "draft_head", "embed", "target", "target_head")
"""Stages of a step in the order in which it runs them (``embed`` runs before the draft, too)."""

OUTSIDE = "outside"
"""Time of a step that is spent in no stage: in Python, between the backend's runs."""

Outcomes: TypeAlias = "Mapping[tuple[int, int], Outcome]"
"""What one system did, by (prompt, repeat)."""

tokens_per_second: Callable[[Outcome], float] = attrgetter("tokens_per_second")
seconds_per_step: Callable[[Outcome], float] = attrgetter("seconds_per_step")


@dataclass(frozen=True)
class Ratio:
    """A ratio of two systems: median and quartiles over the pairs of runs that it was computed for.

    The two runs of a pair had the same prompt in the same repeat, seconds apart, so that what else the
    machine was doing slowed both.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower_quartile:.2f}-{self.upper_quartile:.2f})"


@dataclass(frozen=True)
class Agreement:
    """How far a system's tokens are those of plain decoding, over all prompts and repeats.

    ``equal_tokens`` counts up to the first difference of each answer: what comes after one follows from it.
    """

    equal_tokens: int
    tokens: int
    equal_answers: int
    answers: int

    @property
    def exact(self) -> bool:
        """Whether every answer is the same."""
        return self.equal_answers == self.answers


@dataclass(frozen=True)
class Summary:
    """One system over the whole run.

    For each prompt it takes the repeat whose decode time is the median (the lower one of two), and adds up
    those: all totals are of the same runs, and a repeat that something disturbed doesn't count.
    """

    prefill_seconds: float
    decode_seconds: float
    decoded_tokens: int
    steps: int
    stage_seconds: Mapping[str, float] | None
    accepted_per_step: tuple[int, ...] | None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode rate; ``None`` if no answer had a second token."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds > 0 and self.steps else None

    @property
    def ms_per_step(self) -> float | None:
        """Mean time of a step in milliseconds."""
        return 1e3 * self.decode_seconds / self.steps if self.steps else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that a step decided on average; 1 without drafting."""
        return self.decoded_tokens / self.steps if self.steps else None

    @property
    def outside_share(self) -> float | None:
        """Part of the decode time that wasn't spent inside the backend's runs; ``None`` if not known."""
        if self.stage_seconds is None or not self.decode_seconds > 0:
            return None
        return 1 - sum(self.stage_seconds.values()) / self.decode_seconds

    @property
    def stage_ms(self) -> dict[str, float] | None:
        """Milliseconds of a step by stage, in the order of :data:`STAGES`, then :data:`OUTSIDE`.

        They add up to :attr:`ms_per_step`.
        """
        if self.stage_seconds is None or not self.steps:
            return None
        order = {stage: place for place, stage in enumerate(STAGES)}
        names = sorted(self.stage_seconds, key=lambda stage: order.get(stage, len(order)))
        seconds = {name: self.stage_seconds[name] for name in names if self.stage_seconds[name] > 0}
        seconds[OUTSIDE] = self.decode_seconds - sum(seconds.values())
        return {stage: 1e3 * value / self.steps for stage, value in seconds.items()}

    def accepted_by_position(self, num_draft_tokens: int) -> list[float] | None:
        """Share of the steps that accepted the draft at each position, ``num_draft_tokens`` of them."""
        counts = self.accepted_per_step
        if counts is None or not counts:
            return None
        return [sum(count > place for count in counts) / len(counts) for place in range(num_draft_tokens)]


def summarise(outcomes: Outcomes) -> Summary:
    """Add up one system's outcomes; there has to be at least one."""
    by_prompt: dict[int, list[Outcome]] = {}
    for (prompt, _), outcome in sorted(outcomes.items(), key=lambda item: item[0]):
        by_prompt.setdefault(prompt, []).append(outcome)
    chosen = [_median_outcome(repeats) for repeats in by_prompt.values()]
    stages = [outcome.stage_seconds for outcome in chosen if outcome.stage_seconds is not None]
    accepted = [outcome.accepted_per_step for outcome in chosen if outcome.accepted_per_step is not None]
    return Summary(
        prefill_seconds=median(outcome.prefill_seconds for outcome in outcomes.values()),
        decode_seconds=sum(outcome.decode_seconds for outcome in chosen),
        decoded_tokens=sum(outcome.decoded_tokens for outcome in chosen),
        steps=sum(outcome.steps for outcome in chosen),
        stage_seconds=_added(stages) if len(stages) == len(chosen) else None,
        accepted_per_step=tuple(c for counts in accepted for c in counts) if accepted else None,
    )


def ratio(numerator: Outcomes, denominator: Outcomes, of: Callable[[Outcome], float]) -> Ratio | None:
    """Ratio of ``of(outcome)`` over the pairs where both are measurable; ``None`` if there is none."""
    return quartiles(
        of(outcome) / of(denominator[pair])
        for pair, outcome in numerator.items()
        if pair in denominator and outcome.measurable and denominator[pair].measurable
    )


def quartiles(ratios: Iterable[float]) -> Ratio | None:
    """Median and quartiles of ratios; ``None`` if there are none."""
    values = list(ratios)
    if not values:
        return None
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Ratio(middle, lower, upper, len(values))


def as_dict(value: Ratio | None) -> dict[str, float | None] | None:
    """Its fields as JSON values, with six significant digits."""
    if value is None:
        return None
    return {key: item if isinstance(item, int) else rounded(item) for key, item in asdict(value).items()}


def agreement(pairs: Iterable[tuple[Outcome, Outcome]]) -> Agreement:
    """Compare answers, each with the one that is expected."""
    equal_tokens = tokens = equal_answers = answers = 0
    for outcome, expected in pairs:
        equal_tokens += equal_prefix(outcome.token_ids, expected.token_ids)
        tokens += len(expected.token_ids)
        equal_answers += outcome.token_ids == expected.token_ids
        answers += 1
    return Agreement(equal_tokens, tokens, equal_answers, answers)


def _median_outcome(repeats: Sequence[Outcome]) -> Outcome:
    middle = median_low(outcome.decode_seconds for outcome in repeats)
    return next(outcome for outcome in repeats if outcome.decode_seconds == middle)


def _added(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for seconds in stages for name in seconds)
    return {name: sum(seconds.get(name, 0.0) for seconds in stages) for name in names}
