"""How many rows the next step has: fixed, or the width that promises the most tokens per second.

The maths. A step of width w costs c(w) plain steps, and gives one token for certain (the bonus) and each of
its w - 1 drafts if the target confirms it and all before it. With q(j) the chance that draft j is confirmed
once those before it were, the expected tokens and the expected rate are ::

    E(w) = 1 + q(1) + q(1) q(2) + ... + q(1)...q(w-1)        r(w) = E(w) / c(w)

and the width is the one with the largest r; width 1 is plain decoding. c is measured at load and corrected
by the times of steps (width_correction.py). q is estimated at two levels, since texts differ more than the
parts of one text do. ``AcceptanceHistory`` belongs to a generator: confirmed drafts over tried ones by
position, of all requests, old ones fading, starting from a neutral guess. A request starts from its history,
taken as ``_HISTORY_WEIGHT`` drafts seen, and adds its own. A draft behind a rejected one tells nothing, so it
counts as not tried. Positions are assumed to be the same at every width.

Two accounts, both in plain steps, settle what estimates can't:

- *Curiosity.* What isn't drafted isn't learned. Every step pays ``_CURIOSITY`` of its cost into the history's
  account; when that covers what the best wider step would be expected to lose against the best known width,
  that step is taken. So drafting that is off is probed, seldom where drafts are bad and soon where they may
  pay, at a cost of ``_CURIOSITY`` of the time.
- *Allowance.* A request may fall behind plain decoding by ``_ALLOWANCE`` plain steps and ``_ALLOWANCE_RATE``
  of its tokens, and by no more: no step loses more than the account covers if none of its drafts is
  confirmed. Nor more than ``_STAKE`` of it, unless it is about as cheap as width 2: whether first drafts are
  right is told as well by a narrow step as by a wide one, so that an answer whose first block fails can try
  again, and wide blocks come once drafts have paid. What drafting gains is paid in. Hence n tokens never take
  longer than (n + _ALLOWANCE + _ALLOWANCE_RATE n) plain steps, whatever is drafted. Where a drafting step
  that may pay costs more than 1 + _ALLOWANCE, the first number is what that one takes, _MOST_ALLOWANCE at
  most: otherwise it could never begin. All steps are billed by what they are thought to cost now, a little
  dearer where that isn't known well: so what was believed to be cheap and turns out not to be is paid back.

Costs are corrected where a plain step and a drafted one are neighbours. So a plain step comes between drafted
ones while what they seem to gain is less than ``_SURE`` standard deviations of their cost, and otherwise
after ``_CHECK`` of them.

A policy never sees tokens, and no token depends on it: it chooses how many rows are verified together. It
reads no clock either: it does the same whenever it is told the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import log
from operator import mul, truediv

from dflash_rt.speculation.width_correction import RunningCosts

__all__ = ["AcceptanceHistory", "AdaptiveWidth"]

_FIRST_GUESS, _GUESS_WEIGHT = 0.5, 2.0  # of q, before anything was seen: right after two drafts, so to say
_FADE = 0.97  # of what a history holds, with each drafted step
_REQUEST_FADE = 0.98  # the same within a request
_HISTORY_WEIGHT = 3.0
_CURIOSITY = 0.005
_ALLOWANCE, _MOST_ALLOWANCE = 1.0, 2.0
_ALLOWANCE_RATE = 0.002
_STAKE = 0.5
_NARROW = 1.25  # what a step may lose in any case, in what width 2 may lose
_CHECK = 32
_SURE = 3.0


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
        costs: of steps, for every width that may be chosen; this request corrects them.
        history: what earlier requests saw, at least as wide; this one adds to it.
    """

    def __init__(self, costs: RunningCosts, history: AcceptanceHistory) -> None:
        self._costs = costs
        self._history = history
        self._seen = _Counts(costs.widest - 1, _REQUEST_FADE)
        self._steps = [0] * costs.widest  # by width
        self._tokens = 0
        self._drafted = 0  # steps since the last plain one
        self._timed = False  # whether times of steps are told
        self._expected: list[float] | None = None  # until something is learned
        self._start = self._first_allowance()

    @property
    def widest(self) -> int:
        """See :class:`WidthPolicy`."""
        return self._costs.widest

    @property
    def expected_tokens(self) -> list[float]:
        """E(w) for w from 1 on, by what is known now."""
        if self._expected is None:
            shares = [
                self._seen.mean(position, self._history.share(position), _HISTORY_WEIGHT)
                for position in range(self.widest - 1)
            ]
            products = accumulate(shares, lambda before, share: before * share)
            self._expected = list(accumulate(products, initial=1.0))
        return self._expected

    @property
    def allowance(self) -> float:
        """Plain steps that may still be lost, by today's costs, should all drafts that are under way fail."""
        billed: float = sum(map(mul, self._steps, self._costs.cautious))
        return self._start + self._tokens * (1 + _ALLOWANCE_RATE) - billed

    def choose(self) -> int:
        """The width with the best rate; now and then a wider one, to learn."""
        if self._tokens == 0:
            self._costs.pause()  # whatever took the last step, it was another request
        width = self._best_or_probe()
        if width > 1 and self._is_check_due(width):
            width = 1
        self._drafted = self._drafted + 1 if width > 1 else 0
        # Billed as if all drafts failed, until it is known: another step may be chosen before that.
        self._steps[width - 1] += 1
        self._tokens += 1
        return width

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        """Count drafts up to the first rejected one, pay in the accepted ones, and correct the costs."""
        if width > 1:
            tried = min(accepted + 1, width - 1)
            self._seen.add(tried, accepted)
            self._history.add(tried, accepted)
            self._tokens += accepted
            self._expected = None
        self._timed = seconds is not None
        if seconds is not None:
            self._costs.add(width, seconds)

    def _best_or_probe(self) -> int:
        costs, expected = self._costs.relative, self.expected_tokens
        rates = list(map(truediv, expected, costs))
        affordable = self._affordable()
        best = _argmax(rates[:affordable])
        if best + 1 < affordable:
            probe = best + 1 + _argmax(rates[best + 1 : affordable])
            # The time of the probe, less what the best width would take for the tokens that it should give.
            loss = costs[probe] - expected[probe] / rates[best]
            if loss <= self._history.curiosity:
                self._history.curiosity -= max(loss, 0.0)
                return probe + 1
        self._history.curiosity += _CURIOSITY * costs[best]
        return best + 1

    def _is_check_due(self, width: int) -> bool:
        """Whether a plain step is worth more now, beside which the cost of a drafted one shows."""
        if self._drafted == 0 or not self._timed:
            return False
        gain = log(self.expected_tokens[width - 1] / self._costs.relative[width - 1])
        return self._drafted >= _CHECK or gain < _SURE * self._costs.spreads[width - 1]

    def _affordable(self) -> int:
        """The widest width that doesn't lose too much of the allowance if all its drafts fail.

        Plain steps can always be afforded: they cost what they give.
        """
        costs, allowance = self._costs.cautious, self.allowance
        if self.widest == 1:
            return 1
        stake = max(_STAKE * allowance, _NARROW * (costs[1] - 1))
        return max(1, bisect_right(costs, 1 + min(allowance, stake)))

    def _first_allowance(self) -> float:
        """What the narrowest width that should pay takes, within bounds; without one, the least bad."""
        if self.widest == 1:
            return _ALLOWANCE
        pairs = list(zip(self.expected_tokens, self._costs.relative, self._costs.cautious, strict=True))[1:]
        _, _, cost = next(
            (pair for pair in pairs if pair[0] > pair[1]), max(pairs, key=lambda pair: pair[0] / pair[1])
        )
        return min(max(_ALLOWANCE, cost - 1), _MOST_ALLOWANCE)


def _argmax(values: Sequence[float]) -> int:
    """Index of the largest, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)
