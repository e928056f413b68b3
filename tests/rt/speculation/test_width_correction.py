"""Costs that are corrected while requests run, on a simulated machine: seeded, and no clock is read."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median

import pytest

from dflash_rt.speculation.width import AcceptanceHistory, AdaptiveWidth
from dflash_rt.speculation.width_correction import RunningCosts, StepCosts

# The demo pair's: cost of a step by width, and the chance of each draft by kind of prompt.
TRUE = (1.0, 1.48, 1.55, 1.75, 1.78, 1.82, 1.93, 2.05)
PLAIN_SECONDS = 0.013
SHARES = {
    "counting": (0.97,) * 7,
    "code": (0.8, 0.75, 0.7, 0.7, 0.6, 0.55, 0.5),
    "story": (0.68, 0.65, 0.6, 0.6, 0.55, 0.5, 0.4),
    "repetition": (0.75, 0.6, 0.3, 0.2, 0.1, 0.1, 0.0),
    "letter": (0.62, 0.6, 0.55, 0.5, 0.5, 0.4, 0.3),
    "list": (0.55, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
    "French": (0.3, 0.25, 0.2, 0.1, 0.1, 0.0, 0.0),
    "temperature 1.5": (0.28, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0),
    "German": (0.25, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0),
    "random words": (0.15, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0),
    "question": (0.42, 0.35, 0.3, 0.2, 0.1, 0.0, 0.0),
    "temperature 0.8": (0.5, 0.45, 0.4, 0.3, 0.2, 0.1, 0.0),
}
NEW_TOKENS, REPEATS, MACHINES = 128, 5, 5


class Machine:
    """Steps take what they cost, times a speed that changes for seconds, times noise; a few are disturbed."""

    def __init__(self, seed: int, *, slow: float = 1.2, stays: float = 3.0) -> None:
        self.random = random.Random(seed)
        self._speeds = (1.0, slow)
        self._stays = stays
        self._left = self.random.expovariate(1 / stays)

    def step(self, width: int) -> float:
        noise = math.exp(self.random.gauss(0, 0.03)) * (1.5 if self.random.random() < 0.01 else 1.0)
        seconds = PLAIN_SECONDS * TRUE[width - 1] * self._speeds[0] * noise
        self._left -= seconds
        if self._left < 0:
            self._speeds = self._speeds[::-1]
            self._left = self.random.expovariate(1 / self._stays)
        return seconds

    def accepted(self, shares: tuple[float, ...], width: int) -> int:
        return next((i for i in range(width - 1) if self.random.random() >= shares[i]), width - 1)


def believed(excess: float) -> StepCosts:
    """Costs as a measurement might have found them: ``excess`` times what they are beyond a plain step."""
    return StepCosts(tuple(PLAIN_SECONDS * (1 + excess * (cost - 1)) for cost in TRUE))


@dataclass
class Run:
    """Decode rates over plain decoding's, by prompt, by what steps truly cost; median over repeats."""

    rates: dict[str, float]
    lowest: float  # of a single answer

    @property
    def overall(self) -> float:
        return 1 / fmean(1 / rate for rate in self.rates.values())


def run(measured: StepCosts, seed: int, *, told: bool = True, slow: float = 1.2) -> Run:
    machine, costs, history = Machine(seed, slow=slow), RunningCosts(measured), AcceptanceHistory(8)
    rates: dict[str, list[float]] = {kind: [] for kind in SHARES}
    for _ in range(REPEATS):
        for kind, shares in SHARES.items():
            policy = AdaptiveWidth(costs, history)
            tokens, spent = 0, 0.0
            while tokens < NEW_TOKENS - 1:  # the first is the prefill's
                width = policy.choose()
                accepted, seconds = machine.accepted(shares, width), machine.step(width)
                policy.observe(width, accepted, seconds if told else None)
                tokens += accepted + 1
                spent += TRUE[width - 1]
            rates[kind].append(tokens / spent)
    every = [rate for found in rates.values() for rate in found]
    return Run({kind: median(found) for kind, found in rates.items()}, min(every))


@cache
def best_fixed() -> float:
    """Decode rate over plain decoding's of the best fixed width, all prompts together."""

    def rate(width: int) -> float:
        steps = 0.0
        for shares in SHARES.values():
            steps += 1 / (1 + sum(math.prod(shares[:count]) for count in range(1, width)))
        return len(SHARES) / (TRUE[width - 1] * steps)

    return max(map(rate, range(1, 9)))


@cache
def runs(excess: float, told: bool = True) -> list[Run]:
    return [run(believed(excess), seed, told=told) for seed in range(MACHINES)]


@pytest.mark.parametrize("excess", [0.4, 0.6, 1.0, 1.5])
def test_whatever_was_measured_no_prompt_is_much_slower_than_plain_decoding(excess: float) -> None:
    assert min(rate for one in runs(excess) for rate in one.rates.values()) >= 0.985
    assert min(one.lowest for one in runs(excess)) >= 0.98


@pytest.mark.parametrize("excess", [0.6, 1.0, 1.5])
def test_whatever_was_measured_it_is_faster_than_the_best_fixed_width(excess: float) -> None:
    """A single run's acceptance is luck, so over all of them."""
    assert fmean(one.overall for one in runs(excess)) >= 1.04 * best_fixed()


def test_without_the_correction_it_is_not() -> None:
    assert min(one.lowest for one in runs(0.4, told=False)) < 0.95
    assert fmean(one.overall for one in runs(1.5, told=False)) < 1.03 * best_fixed()


@pytest.mark.parametrize("excess", [0.4, 1.5])
def test_costs_are_found(excess: float) -> None:
    costs, machine = RunningCosts(believed(excess)), Machine(1)
    for width in [4, 1] * 60:
        costs.add(width, machine.step(width))
    assert costs.relative[3] == pytest.approx(TRUE[3], rel=0.05)
    before = believed(excess).relative
    for width in (3, 5):  # neighbours learn with it
        assert abs(math.log(costs.relative[width - 1] / TRUE[width - 1])) < abs(
            math.log(before[width - 1] / TRUE[width - 1])
        )
    assert costs.spreads[3] < costs.spreads[4] < costs.spreads[7]


def test_only_neighbours_are_compared() -> None:
    costs = RunningCosts(believed(1.0))
    before = costs.relative
    for width, seconds in ((4, 9.0), (5, 0.1), (4, 7.0)):  # no plain step beside them
        costs.add(width, seconds)
    for seconds in (1.0, 5.0):
        costs.pause()
        costs.add(1, seconds)
    costs.pause()
    costs.add(4, 3.0)
    assert costs.relative == before
    costs.add(1, 1.0)
    assert costs.relative[3] > before[3]


def test_one_outlier_does_not_move_a_cost_far() -> None:
    costs, machine = RunningCosts(believed(1.0)), Machine(2)
    for width in [4, 1] * 60:
        costs.add(width, machine.step(width))
    before = costs.relative[3]
    costs.add(4, 1000.0)
    assert before < costs.relative[3] < 1.04 * before


def test_wider_is_never_cheaper_and_caution_is_dearer() -> None:
    costs = RunningCosts(StepCosts((1.0, 1.5, 1.6)))
    for _ in range(30):
        costs.add(1, 1.0)
        costs.add(3, 1.2)
        costs.add(1, 1.0)
        costs.add(2, 1.4)
    assert 1 <= costs.relative[1] <= costs.relative[2]
    assert all(dear >= cost for dear, cost in zip(costs.cautious, costs.relative, strict=True))
    assert costs.current.seconds == tuple(costs.relative)


def test_one_width_has_one_cost() -> None:
    costs = RunningCosts(StepCosts((0.5,)))
    costs.add(1, 0.1)
    costs.add(1, 0.0)  # a clock that is too coarse
    assert (costs.widest, costs.relative, costs.cautious) == (1, [1.0], [1.0])


# What a policy makes of it


def confident(widest: int = 2) -> AcceptanceHistory:
    """All drafts were right so far."""
    history = AcceptanceHistory(widest)
    for _ in range(100):
        history.add(widest - 1, widest - 1)
    return history


def test_a_step_that_was_cheaper_in_belief_is_paid_back() -> None:
    costs = RunningCosts(StepCosts((1.0, 1.3)))
    policy = AdaptiveWidth(costs, AcceptanceHistory(2))
    assert policy.choose() == 2
    policy.observe(2, 0, 1.9)
    before = policy.allowance
    costs.add(1, 1.0)  # now it shows what the step cost
    assert policy.allowance < before - 0.3


def test_steps_under_way_count_as_failed() -> None:
    """A backend that runs ahead has the next width chosen before the last step is observed."""
    policy = AdaptiveWidth(RunningCosts(StepCosts((1.0, 1.8))), confident())
    chosen = [policy.choose(), policy.choose()]
    assert chosen == [2, 1]  # 0.8 of the allowance of 1 is bound
    policy.observe(2, 1)
    assert policy.choose() == 2


def test_plain_steps_between_drafted_ones_while_costs_are_uncertain() -> None:
    def widths(told: bool) -> list[int]:
        policy = AdaptiveWidth(RunningCosts(StepCosts((1.0, 1.8))), confident())
        found = []
        for _ in range(400):
            found.append(policy.choose())
            policy.observe(found[-1], found[-1] - 1, (1.0, 1.8)[found[-1] - 1] if told else None)
        return found

    told = widths(told=True)
    assert told[:4] == [2, 1, 2, 1]
    assert 1 / 40 < told[200:].count(1) / 200 < 1 / 20  # later only now and then
    assert widths(told=False) == [2] * 400  # where no times are told a plain step would tell nothing


def test_a_width_that_costs_more_than_two_plain_steps_is_taken_where_it_pays() -> None:
    costs = (1.0, *(2.5 + 0.05 * width for width in range(7)))
    assert AdaptiveWidth(RunningCosts(StepCosts(costs)), confident(8)).choose() > 1
