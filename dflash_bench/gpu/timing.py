"""Seconds of this project's own steps, through the public loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import cast

import numpy as np

from dflash_bench.gpu.device_clock import Clocked
from dflash_bench.gpu.plan import WARM_STEPS, rows_needed
from dflash_bench.gpu.rows import Sample
from dflash_rt.backends.base import Backend
from dflash_rt.backends.device.backend import DeviceBackend
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence as Tokens

__all__ = ["time_steps"]


def time_steps(
    backend: Backend, prompt: Sequence[int], *, width: int, steps: int, prefill_chunk: int
) -> Sample:
    """Prefill, then the median over ``steps`` steps of ``width`` rows.

    The clock runs from one step's tokens to the next one's: everything between two tokens counts. Steps of a
    backend that runs ahead on a GPU are also timed there; of another one, the time inside its runs counts.
    """
    clocked = Clocked(backend) if isinstance(backend, DeviceBackend) and backend.runs_ahead else None
    runner = backend if clocked is None else cast(Backend, clocked)
    sequence = Tokens(np.array(prompt, np.int64))
    room = rows_needed(0, steps, width)
    running = decode(runner, sequence, max_new_tokens=room, verify_len=width, prefill_chunk=prefill_chunk)
    walls, runs = [], []
    try:
        for _ in range(1 + WARM_STEPS):
            next(running)
        for _ in range(steps):
            before = sum(backend.run_seconds.values())
            began = time.perf_counter()
            next(running)
            walls.append(time.perf_counter() - began)
            runs.append(sum(backend.run_seconds.values()) - before)
    finally:
        running.close()
    if clocked is not None and clocked.sees_device:
        # Step n of the loop is launch n; the last launch may have been one step further ahead.
        runs = clocked.seconds(WARM_STEPS, steps)
    return Sample(
        step_seconds=median(walls),
        run_seconds=median(runs),
        # Of sums: the host reads a step while the device is at the next one, so single steps don't match.
        gap_seconds=(sum(walls) - sum(runs)) / steps,
    )
