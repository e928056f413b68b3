"""Seconds of our own steps, through the public loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from dflash_rt.backends.base import Backend
from dflash_rt.loop import decode
from dflash_rt.sequence import Sequence as Tokens

from .rows import Sample

__all__ = ["WARM_STEPS", "rows_needed", "time_steps"]

WARM_STEPS = 4
"""Steps before the first one that counts: shapes are new in them, and a graph may be captured."""

_DRAFTING = ("inject", "draft", "draft_head")


def rows_needed(context: int, steps: int, width: int) -> int:
    """Rows of prompt and output that :func:`time_steps` may use, should every draft be accepted."""
    return context + (steps + WARM_STEPS) * width + 1


def time_steps(
    backend: Backend, prompt: Sequence[int], *, width: int, steps: int, prefill_chunk: int
) -> Sample:
    """Prefill, then the median over ``steps`` steps of ``width`` rows.

    The clock runs from one step's tokens to the next one's: everything between two tokens counts. The part
    inside the backend's runs is what the backend itself reports.
    """
    sequence = Tokens(np.array(prompt, np.int64))
    room = rows_needed(0, steps, width)
    running = decode(backend, sequence, max_new_tokens=room, width=width, prefill_chunk=prefill_chunk)
    walls, runs, drafting = [], [], []
    try:
        for _ in range(1 + WARM_STEPS):
            next(running)
        for _ in range(steps):
            before = backend.run_seconds
            began = time.perf_counter()
            next(running)
            walls.append(time.perf_counter() - began)
            after = backend.run_seconds
            stages = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
            runs.append(sum(stages.values()))
            drafting.append(sum(stages.get(name, 0.0) for name in _DRAFTING))
    finally:
        running.close()
    known = set(_DRAFTING) & backend.run_seconds.keys()
    return Sample(
        step_seconds=median(walls),
        run_seconds=median(runs),
        gap_seconds=median(wall - run for wall, run in zip(walls, runs, strict=True)),
        draft_seconds=median(drafting) if known and width > 1 else None,
    )
