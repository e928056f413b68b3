"""What a step costs at each width, measured once when a generator is opened."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from dflash_rt.backends.base import Backend
from dflash_rt.loop import Decoded, decode
from dflash_rt.request import ModelLimits
from dflash_rt.sequence import Sequence
from dflash_rt.width import StepCosts

__all__ = ["measure_step_costs"]

_BUDGET_SECONDS = 0.8
_ROUNDS = 8  # of all widths, at most
_PROMPT_ROWS = 16


def measure_step_costs(
    backend: Backend, limits: ModelLimits, *, budget_seconds: float = _BUDGET_SECONDS
) -> StepCosts:
    """Seconds of a step at each width from 1 to ``limits.draft_width``, by decoding a few made-up tokens.

    All widths take turns, and each counts with its fastest step: what a step costs when nothing disturbs it
    and everything is warm. ``budget_seconds`` ends it after the step that is running; where a round
    takes longer, widths that were left out are interpolated. Costs are those of a short context.

    No width counts as cheaper than a narrower one. The backend is left cleared. Raises BackendError
    as any request does.
    """
    widest = limits.draft_width
    if limits.max_seq_len < 3:  # the prompt, the prefill's token, and no room for a step's
        return StepCosts((1.0,) * widest)
    deadline = time.perf_counter() + budget_seconds
    order = _order(widest)
    rounds: list[dict[int, float]] = []
    steps = _timed_steps(backend, limits, order * _ROUNDS)
    for number, (width, seconds) in enumerate(steps):
        if number % len(order) == 0:
            rounds.append({})
        rounds[-1][width] = seconds
        # The narrowest and the widest come first: everything else lies between them.
        if number >= 1 and time.perf_counter() >= deadline:
            break
    steps.close()
    backend.clear()
    whole = [times for times in rounds if len(times) == len(order)]
    counted = whole or rounds[:1]
    best = {width: min(times[width] for times in counted) for width in sorted(counted[0])}
    # More rows never cost less: a step that seems cheaper than a narrower one met a quieter moment.
    rising = np.maximum.accumulate(list(best.values()))
    seconds_by_width = np.interp(range(1, widest + 1), list(best), rising)
    return StepCosts(tuple(float(seconds) for seconds in seconds_by_width))


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

    def observe(self, width: int, accepted: int) -> None:
        pass


def _timed_steps(
    backend: Backend, limits: ModelLimits, widths: list[int]
) -> Generator[tuple[int, float], None, None]:
    """Take a step of each width in turn; yield the width and its seconds. Starts again when room is out."""
    rows = min(_PROMPT_ROWS, limits.max_seq_len // 2)
    prompt = np.arange(rows, dtype=np.int64) % limits.vocab_size
    policy = _Told(limits.draft_width)
    running: Iterator[Decoded] | None = None
    for width in widths:
        if running is None:
            running = decode(
                backend,
                Sequence(prompt),
                max_new_tokens=limits.max_seq_len - rows,
                width=policy,
                prefill_chunk=limits.prefill_chunk,
                run_ahead=False,  # a step's time is its own, and its width the one just told
            )
            next(running)  # the prefill
        policy.next_width = width
        began = time.perf_counter()
        decoded = next(running)
        seconds = time.perf_counter() - began
        if decoded.finish_reason is not None:
            running = None
        # A clock may be too coarse for a step of a scripted backend, and no step costs nothing.
        yield width, max(seconds, 1e-9)
