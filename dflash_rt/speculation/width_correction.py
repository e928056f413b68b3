"""What a step costs at each width, corrected by the times of the steps that requests take.

Costs measured at load are those of a second in which the machine may have been busy. So they are only where
this estimate starts. The speed of a machine changes for seconds at a time, and with it the time of every
width; what stays, or nearly, is the cost c(w) in plain steps. It shows where a plain step and a drafted one
are neighbours: one time over the other is an observation of c(w). Steps further apart aren't compared, since
a change of c(w) and one of the machine look the same as long as every step drafts.

The estimate is a Kalman filter on the logarithms of c(2) to c(W). Costs of widths near each other go
together, so that a width which is in use corrects those that aren't. A ratio far from what was expected
(another program, a cache that grew) counts as one at the edge of what is likely.

Nothing here reads a clock, and no token depends on it. It works on plain numbers, since for so few of them an
array takes longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from dflash_rt.errors import RequestError

__all__ = ["RunningCosts", "StepCosts"]

# Standard deviations of natural logarithms.
_SPREAD = 0.15  # of a cost as it was measured, and in the long run
_PAIR_NOISE = 0.08  # of one step's time over its neighbour's

_NEIGHBOURS = 0.85  # correlation of the costs of two widths that differ by 1
_MEMORY = 500  # pairs of steps after which most of what was learned has become uncertain again
_EDGE = 2.5  # standard deviations
_CAUTION = 0.5  # standard deviations
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step at width 1, 2, … ``widest``, everything between two tokens included."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        # Written so that NaN is refused, too.
        if not self.seconds or not all(0 < seconds < float("inf") for seconds in self.seconds):
            raise RequestError(
                "the costs of steps are wrong",
                found=self.seconds,
                expected="a positive number of seconds for each width from 1 on",
                remedy="measure them with dflash_rt.speculation.width_cost.measure_step_costs",
            )

    @property
    def widest(self) -> int:
        """The largest width whose cost is known."""
        return len(self.seconds)

    @property
    def relative(self) -> tuple[float, ...]:
        """Costs in plain steps: 1.0 first."""
        return tuple(seconds / self.seconds[0] for seconds in self.seconds)


class RunningCosts:
    """Costs of steps as they are now. Outlives requests. Not thread-safe.

    Attributes:
        relative: c(w) for w from 1 on; the first is 1. More rows never cost less.
        cautious: the same, dearer where little is known.
        spreads: standard deviation of the logarithm of each; the first is 0.
    """

    def __init__(self, measured: StepCosts) -> None:
        self._plain_seconds = measured.seconds[0]
        self._logs = [math.log(cost) for cost in measured.relative[1:]]  # of widths from 2 on
        positions = range(len(self._logs))
        self._first = [[_SPREAD**2 * _NEIGHBOURS ** abs(i - j) for j in positions] for i in positions]
        self._covariance = self._first
        self._last: tuple[int, float] | None = None  # width of the last step, and the logarithm of its time
        self._update()

    @property
    def widest(self) -> int:
        """The largest width whose cost is known."""
        return len(self.relative)

    @property
    def current(self) -> StepCosts:
        """The corrected costs, in seconds: of a plain step as many as were measured."""
        return StepCosts(tuple(self._plain_seconds * cost for cost in self.relative))

    def pause(self) -> None:
        """The next step is no neighbour of the last one."""
        self._last = None

    def add(self, width: int, seconds: float) -> None:
        """A step of ``width`` rows took ``seconds``."""
        before, self._last = self._last, (width, math.log(max(seconds, _LEAST_SECONDS)))
        if before is None:
            return
        if before[0] == 1 < width:
            self._learn(width, self._last[1] - before[1])
        elif width == 1 < before[0]:
            self._learn(before[0], before[1] - self._last[1])

    def _learn(self, width: int, ratio: float) -> None:
        """A step of ``width`` rows was seen to take exp(``ratio``) plain steps."""
        row = self._covariance[width - 2]
        spread = math.sqrt(row[width - 2] + _PAIR_NOISE**2)
        surprise = min(max((ratio - self._logs[width - 2]) / spread, -_EDGE), _EDGE)
        shares = [value / spread for value in row]
        self._logs = [log + share * surprise for log, share in zip(self._logs, shares, strict=True)]
        fresh = 1 / _MEMORY
        self._covariance = [
            [
                (1 - fresh) * (value - share * other) + fresh * at_first
                for value, other, at_first in zip(values, shares, first, strict=True)
            ]
            for values, share, first in zip(self._covariance, shares, self._first, strict=True)
        ]
        self._update()

    def _update(self) -> None:
        spreads = [math.sqrt(row[i]) for i, row in enumerate(self._covariance)]
        cautious = [log + _CAUTION * spread for log, spread in zip(self._logs, spreads, strict=True)]
        self.spreads = [0.0, *spreads]
        self.relative = [math.exp(log) for log in accumulate(self._logs, max, initial=0.0)]
        self.cautious = [math.exp(log) for log in accumulate(cautious, max, initial=0.0)]
