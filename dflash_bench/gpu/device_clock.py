"""Times of steps through the public loop, of the operations of one step, and of copies on a device.

The host doesn't see when a device works. On a GPU events in the backend's own stream do; on the host's
stand-in for a device, which works off a queue, an entry of the queue that looks at the clock.

This file reaches into :class:`~dflash_rt.backends.device.backend.DeviceBackend`: nobody else needs what it
reads there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from dflash_bench.gpu.plan import WARM_STEPS, rows_needed
from dflash_bench.gpu.rows import Sample
from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Backend
from dflash_rt.backends.device.backend import DeviceBackend
from dflash_rt.backends.device.plan import Copy, Operation, Run
from dflash_rt.backends.device.protocols import Device
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence as Tokens

__all__ = ["Clocked", "copy_bandwidth", "drafting_ends", "measure_draft_share", "prefill", "time_steps"]

_ROUNDS = 8
_Moment: TypeAlias = "_HostMoment | _CudaMoment"


class _HostMoment:
    """A place in the stream. ``until`` gives seconds from here to a later one, once both were reached."""

    def __init__(self, device: Device) -> None:
        self._at: float | None = None
        device.call(self._reach)

    def _reach(self) -> None:
        self._at = time.perf_counter()

    def until(self, later: Any) -> float:
        return float(later._at - self._at)


class _CudaMoment:
    """The same on a GPU."""

    def __init__(self, stream: Any = None) -> None:
        cuda: Any = torch.cuda  # its types are incomplete
        self._event = cuda.Event(enable_timing=True)
        self._event.record(stream)

    def until(self, later: Any) -> float:
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3


def _clock(backend: DeviceBackend) -> Callable[[], _Moment]:
    """What marks moments in the backend's stream."""
    device = backend._device
    if device.stream == 0:
        return lambda: _HostMoment(device)
    cuda: Any = torch.cuda
    stream = cuda.ExternalStream(device.stream)
    return lambda: _CudaMoment(stream)


class Clocked:
    """A backend on a device whose launched steps are timed there; everything else is passed on."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._now = _clock(backend)
        self._launches: list[tuple[_Moment, _Moment]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def launch(self, verify_len: int, anchors: IntArray | None = None, start: IntArray | None = None) -> None:
        """As the backend's, between two moments."""
        before = self._now()
        self._backend.launch(verify_len, anchors, start)
        self._launches.append((before, self._now()))

    @property
    def sees_device(self) -> bool:
        """Whether moments pass by themselves. The host's queue stands still while nobody waits for it."""
        return self._backend._device.stream != 0

    def seconds(self, first: int, count: int) -> list[float]:
        """Of ``count`` steps from the launch ``first`` on (0-based). Waits for all that was launched."""
        device = self._backend._device
        device.wait(device.record_event())
        return [begin.until(end) for begin, end in self._launches[first : first + count]]


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


def measure_draft_share(
    backend: Backend, prompt: Sequence[int], *, width: int, prefill_chunk: int
) -> float | None:
    """Share of a step's device time before the target's pass: inject, draft, and the draft's head.

    The operations of a step are enqueued one by one, several steps in a row without waiting, with a moment
    after each. ``None`` for a backend that isn't on a device.
    """
    if not isinstance(backend, DeviceBackend):
        return None
    runner, now = backend._runner, _clock(backend)
    anchors = prefill(backend, prompt, prefill_chunk)
    start = np.array([len(prompt)], np.int64)
    backend.launch(width, anchors, start)  # where the device stands is the device's from here on
    backend.collect()
    operations = runner._planner.step(width, inject=True)
    end = drafting_ends(operations)
    moments: list[list[_Moment]] = []
    for _ in range(_ROUNDS + 1):
        marks = [now()]
        for operation in operations:
            if isinstance(operation, Copy):
                runner._memory.copy(operation)
            else:
                backend._device.call(runner._work(operation))
            marks.append(now())
        moments.append(marks)
    backend._device.wait(backend._device.record_event())
    backend.clear()  # it stands where its host doesn't know
    return median(marks[0].until(marks[end]) / marks[0].until(marks[-1]) for marks in moments[1:])


def prefill(backend: Backend, prompt: Sequence[int], prefill_chunk: int) -> IntArray:
    """Feed a prompt in chunks; the tokens chosen after its last row, int64 ``[batch]``."""
    ids = np.array([prompt], np.int64)
    for at in range(0, len(prompt), prefill_chunk):
        chunk = ids[:, at : at + prefill_chunk]
        anchors = backend.prefill(chunk, np.array([at], np.int64), inject=True)
    return anchors


def drafting_ends(operations: Sequence[Operation]) -> int:
    """How many operations come before the target's own pass, which begins with the last ``embed``."""
    return max(
        place for place, item in enumerate(operations) if isinstance(item, Run) and item.graph == "embed"
    )


def copy_bandwidth(device: str, size: int, rounds: int) -> float:
    """Bytes per second, read and written, of copying ``size`` bytes within a PyTorch device.

    Nothing but the copy counts: the median of ``rounds``, by events on a GPU.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    seconds = []
    for _ in range(rounds + 2):
        began = time.perf_counter() if device == "cpu" else _CudaMoment()
        goal.copy_(source)
        if isinstance(began, _CudaMoment):
            seconds.append(began.until(_CudaMoment()))
        else:
            seconds.append(time.perf_counter() - began)
    return 2 * size / median(seconds[2:])
