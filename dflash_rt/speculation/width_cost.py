"""What a step costs at each width, measured once when a generator is opened."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from math import sqrt
from statistics import median

import numpy as np

from dflash_rt.backends.base import Backend
from dflash_rt.decoding.loop import Decoded, decode
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.request import ModelLimits
from dflash_rt.speculation.width_correction import StepCosts

__all__ = ["measure_step_costs"]

_BUDGET_SECONDS = 0.8
_WARM_UP_SECONDS = 10.0
_ROUNDS = 8  # of all widths, at most
_PROMPT_ROWS = 16


def measure_step_costs(
    backend: Backend,
    limits: ModelLimits,
    *,
    budget_seconds: float = _BUDGET_SECONDS,
    warm_up_seconds: float = _WARM_UP_SECONDS,
) -> StepCosts:
    """Seconds of a step with 0 to ``limits.num_draft_tokens`` drafts, by decoding a few made-up tokens.

    First a step of each width that isn't timed: a backend may compile or allocate for it. After
    ``warm_up_seconds`` of these, widths that had none are left out. Then each in turn is measured between two
    plain steps, and counts with the median of its ratios to them, since a machine may change its speed at
    any time. ``budget_seconds`` ends it, once the widest was measured; widths that were left out are
    interpolated. Costs are those of a short context.

    No width counts as cheaper than a narrower one. The backend is left cleared. Raises BackendError
    as any request does.
    """
    widest = limits.num_draft_tokens + 1
    if limits.max_seq_len < 3:  # the prompt, the prefill's token, and no room for a step's
        return StepCosts((1.0,) * widest)
    steps = _Steps(backend, limits)
    widths = _warm_up(steps, widest, warm_up_seconds)
    plain, ratios = _measure(steps, widths, budget_seconds)
    steps.close()
    backend.clear()
    measured = [1.0, *(median(ratios[width]) for width in sorted(ratios))]
    # More rows never cost less: a step that seems cheaper than a narrower one met a quieter moment.
    rising = np.maximum.accumulate(measured)
    relative = np.interp(range(1, widest + 1), [1, *sorted(ratios)], rising)
    return StepCosts(tuple(median(plain) * float(cost) for cost in relative))


def _warm_up(steps: _Steps, widest: int, seconds: float) -> list[int]:
    """Take a step of each width, until ``seconds`` have passed; the widths above 1 that had one."""
    deadline = time.perf_counter() + seconds
    warm: list[int] = []
    for width in _order(widest):
        if len(warm) >= 2 and time.perf_counter() >= deadline:
            break
        steps.take(width)
        warm.append(width)
    return warm[1:]


def _measure(steps: _Steps, widths: list[int], seconds: float) -> tuple[list[float], dict[int, list[float]]]:
    """Times of plain steps; and by width, those of its steps over those of the plain steps beside them."""
    deadline = time.perf_counter() + seconds
    plain, ratios = [steps.take(1)], dict[int, list[float]]()
    for width in widths * _ROUNDS:
        drafted = steps.take(width)
        plain.append(steps.take(1))
        ratios.setdefault(width, []).append(drafted / sqrt(plain[-2] * plain[-1]))
        if time.perf_counter() >= deadline:
            break
    return plain, ratios


def _order(widest: int) -> list[int]:
    """All widths: both ends first, then halves of what lies between, so that the first ones tell most."""
    order, gaps = list(dict.fromkeys((1, widest))), [(1, widest)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if middle not in (low, high):
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order


@dataclass
class _Told:
    """A policy that is told each width."""

    widest: int
    next_width: int = 1

    def choose(self) -> int:
        return self.next_width

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        pass


class _Steps:
    """Takes steps of any width over a made-up prompt, again and again."""

    def __init__(self, backend: Backend, limits: ModelLimits) -> None:
        self._backend = backend
        self._limits = limits
        self._policy = _Told(limits.num_draft_tokens + 1)
        self._running: Generator[Decoded, None, None] | None = None

    def take(self, width: int) -> float:
        """Take a step of ``width`` rows; its seconds."""
        if self._running is None:
            self._running = self._start()
        self._policy.next_width = width
        began = time.perf_counter()
        decoded = next(self._running)
        seconds = time.perf_counter() - began
        if decoded.finish_reason is not None:
            self._running = None  # there is no more room
        # A clock may be too coarse for a step of a scripted backend, and no step costs nothing.
        return max(seconds, 1e-9)

    def close(self) -> None:
        """End it."""
        if self._running is not None:
            self._running.close()

    def _start(self) -> Generator[Decoded, None, None]:
        limits = self._limits
        rows = min(_PROMPT_ROWS, limits.max_seq_len // 2)
        running = decode(
            self._backend,
            Sequence(np.arange(rows, dtype=np.int64) % limits.vocab_size),
            max_new_tokens=limits.max_seq_len - rows,
            verify_len=self._policy,
            prefill_chunk=limits.prefill_chunk,
            run_ahead=False,  # a step's time is its own, and its width the one just told
        )
        next(running)  # the prefill
        return running
