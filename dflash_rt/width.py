"""How many rows the next step has: fixed, or the width that promises the most tokens per second.

The maths. A step of width w costs c(w) seconds, measured at load, and gives one token for certain (the bonus)
and each of its w - 1 drafts if the target confirms it and all before it. With q(j) the chance that draft j is
confirmed once those before it were, the expected tokens and the expected rate are ::

    E(w) = 1 + q(1) + q(1) q(2) + ... + q(1)...q(w-1)        r(w) = E(w) / c(w)

and the width is the one with the largest r; width 1 is plain decoding. q is estimated at two levels, since
texts differ more than the parts of one text do. ``AcceptanceHistory`` belongs to a generator: confirmed
drafts over tried ones by position, of all requests, old ones fading, starting from a neutral guess. A request
starts from its history, taken as ``_HISTORY_WEIGHT`` drafts seen, and adds its own. A draft behind a rejected
one tells nothing, so it counts as not tried. Positions are assumed to be the same at every width.

Two accounts, both in seconds of plain decoding, settle what estimates can't:

- *Curiosity.* What isn't drafted isn't learned. Every step pays ``_CURIOSITY`` of its cost into the history's
  account; when that covers what the best wider step would be expected to lose against the best known width,
  that step is taken. So drafting that is off is probed, seldom where drafts are bad and soon where they may
  pay, at a cost of ``_CURIOSITY`` of the time.
- *Allowance.* A request may fall behind plain decoding by ``_ALLOWANCE`` plain steps and ``_ALLOWANCE_RATE``
  of its tokens, and by no more: a step is as wide as the account covers if none of its drafts is confirmed.
  What drafting gains is paid in. Hence by the measured costs, n tokens never take longer than
  (n + _ALLOWANCE + _ALLOWANCE_RATE n) plain steps, whatever is drafted.

A policy never sees tokens, and no token depends on it: it chooses how many rows are verified together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from dflash_rt.errors import RequestError

__all__ = ["AcceptanceHistory", "AdaptiveWidth", "FixedWidth", "StepCosts", "WidthPolicy"]

_FIRST_GUESS, _GUESS_WEIGHT = 0.5, 2.0  # of q, before anything was seen: right after two drafts, so to say
_FADE = 0.97  # of what a history holds, with each drafted step
_REQUEST_FADE = 0.98  # the same within a request
_HISTORY_WEIGHT = 3.0
_CURIOSITY = 0.0075
_ALLOWANCE = 1.0
_ALLOWANCE_RATE = 0.005


class WidthPolicy(Protocol):
    """Chooses the width of each step of one request."""

    @property
    def widest(self) -> int:
        """No step will be wider. 1: the drafter never runs, and needs no features."""

    def choose(self) -> int:
        """Rows of the next step's verify pass, 1 (plain decoding) to :attr:`widest`. Called once a step."""

    def observe(self, width: int, accepted: int) -> None:
        """A step of ``width`` rows is done; its first ``accepted`` drafts were confirmed."""


@dataclass(frozen=True)
class FixedWidth:
    """The same width at every step."""

    widest: int

    def choose(self) -> int:
        """Always :attr:`widest`."""
        return self.widest

    def observe(self, width: int, accepted: int) -> None:
        """Nothing to learn."""


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
                todo="measure them with dflash_rt.width_cost.measure_step_costs",
            )

    @property
    def widest(self) -> int:
        """The largest width whose cost is known."""
        return len(self.seconds)

    @property
    def relative(self) -> tuple[float, ...]:
        """Costs in plain steps: 1.0 first."""
        return tuple(seconds / self.seconds[0] for seconds in self.seconds)


class _Counts:
    """Drafts tried and confirmed by position, 0-based; older ones count less."""

    def __init__(self, positions: int, fade: float) -> None:
        self._fade = fade
        self._tried = [0.0] * positions
        self._confirmed = [0.0] * positions

    def add(self, tried: int, confirmed: int) -> None:
        """The first ``tried`` positions were decided, the first ``confirmed`` of them with yes."""
        for position in range(len(self._tried)):
            self._tried[position] = self._tried[position] * self._fade + (position < tried)
            self._confirmed[position] = self._confirmed[position] * self._fade + (position < confirmed)

    def mean(self, position: int, guess: float, weight: float) -> float:
        """The share confirmed, with ``guess`` as if ``weight`` more drafts had confirmed to that share."""
        return (self._confirmed[position] + weight * guess) / (self._tried[position] + weight)


class AcceptanceHistory:
    """What all requests of a generator saw of its drafter; outlives each of them. Not thread-safe."""

    def __init__(self, widest: int) -> None:
        self._counts = _Counts(widest - 1, _FADE)
        self.curiosity = 0.0
        """Plain steps that may be spent on finding out."""

    def add(self, tried: int, confirmed: int) -> None:
        """See :class:`_Counts`."""
        self._counts.add(tried, confirmed)

    def share(self, position: int) -> float:
        """q of the 0-based ``position``."""
        return self._counts.mean(position, _FIRST_GUESS, _GUESS_WEIGHT)


class AdaptiveWidth:
    """The policy of one request: see the top of this file.

    Args:
        costs: of steps, for every width that may be chosen.
        history: what earlier requests saw, at least as wide; this one adds to it.
    """

    def __init__(self, costs: StepCosts, history: AcceptanceHistory) -> None:
        self._costs = costs.relative
        self._history = history
        self._seen = _Counts(costs.widest - 1, _REQUEST_FADE)
        self._allowance = _ALLOWANCE

    @property
    def widest(self) -> int:
        """See :class:`WidthPolicy`."""
        return len(self._costs)

    @property
    def expected_tokens(self) -> list[float]:
        """E(w) for w from 1 on, by what is known now."""
        shares = [
            self._seen.mean(position, self._history.share(position), _HISTORY_WEIGHT)
            for position in range(self.widest - 1)
        ]
        products = accumulate(shares, lambda before, share: before * share)
        return list(accumulate(products, initial=1.0))

    def choose(self) -> int:
        """The width with the best rate; now and then a wider one, to learn."""
        expected = self.expected_tokens
        rates = [tokens / cost for tokens, cost in zip(expected, self._costs, strict=True)]
        affordable = self._affordable()
        best = _argmax(rates[:affordable])
        if best + 1 < affordable:
            probe = best + 1 + _argmax(rates[best + 1 : affordable])
            # The time of the probe, less what the best width would take for the tokens that it should give.
            loss = self._costs[probe] - expected[probe] / rates[best]
            if loss <= self._history.curiosity:
                self._history.curiosity -= max(loss, 0.0)
                return probe + 1
        self._history.curiosity += _CURIOSITY * self._costs[best]
        return best + 1

    def observe(self, width: int, accepted: int) -> None:
        """Count drafts up to the first rejected one, and settle the step with the allowance."""
        if width > 1:
            tried = min(accepted + 1, width - 1)
            self._seen.add(tried, accepted)
            self._history.add(tried, accepted)
        tokens = accepted + 1
        self._allowance += tokens * (1 + _ALLOWANCE_RATE) - self._costs[width - 1]

    def _affordable(self) -> int:
        """The widest width whose cost, should all drafts fail, leaves the allowance at 0 or above.

        Plain steps can always be afforded: they cost what they give.
        """
        limit = self._allowance + 1
        return max((i for i, cost in enumerate(self._costs, 1) if cost <= limit), default=1)


def _argmax(values: Sequence[float]) -> int:
    """Index of the largest, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)
