"""A device that is the host itself: the whole of the device's loop on a CPU, for tests and dry runs.

It works as a GPU's stream does, and not at once: work waits until somebody waits for it. So a host that
overwrites what is still to be copied, or reads what isn't there yet, is wrong here too.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass

import numpy as np

from dflash_rt.backends.device.plan import ALIGNMENT
from dflash_rt.backends.device.protocols import Bytes, Captured, Event, Work
from dflash_rt.errors import BackendError

__all__ = ["HostDevice", "Recorded"]


@dataclass
class _HostEvent:
    reached: bool = False

    def __call__(self) -> None:
        self.reached = True


@dataclass(frozen=True)
class Recorded:
    """Work to be enqueued again at each launch."""

    queue: deque[Work]
    work: tuple[Work, ...]

    def launch(self) -> None:
        self.queue.extend(self.work)


class HostDevice:
    """See :class:`dflash_rt.backends.device.protocols.Device`. ``limit``: bytes that it pretends to have."""

    name = "host"
    stream = 0

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._queue: deque[Work] = deque()
        self._recording: list[Work] | None = None
        self._memory: list[Bytes] = []

    def free_bytes(self) -> int | None:
        """The limit less what was allocated."""
        return None if self._limit is None else self._limit - sum(array.nbytes for array in self._memory)

    def allocate(self, nbytes: int) -> int:
        free = self.free_bytes()
        if free is not None and nbytes > free:
            raise BackendError(
                "the device is out of memory",
                found=f"{free} bytes free",
                expected=f"{nbytes} bytes",
                remedy="choose a shorter max_seq_len",
            )
        memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
        self._memory.append(memory)
        return -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT

    def pinned(self, nbytes: int) -> Bytes:
        """Any memory of the host will do."""
        return np.zeros(nbytes, np.uint8)

    def upload(self, address: int, source: Bytes) -> None:
        self._add(lambda: _move(address, source.ctypes.data, source.nbytes))

    def download(self, target: Bytes, address: int) -> None:
        self._add(lambda: _move(target.ctypes.data, address, target.nbytes))

    def copy(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int
    ) -> None:

        def work() -> None:
            for index in range(height):
                _move(target + index * target_pitch, source + index * source_pitch, width)

        self._add(work)

    def zero(self, address: int, nbytes: int) -> None:
        self._add(lambda: _zero(address, nbytes))

    def call(self, work: Work) -> None:
        self._add(work)

    def capture(self, record: Work) -> Captured:
        recorded: list[Work] = []
        self._recording = recorded
        try:
            record()
        finally:
            self._recording = None
        return Recorded(self._queue, tuple(recorded))

    def record_event(self) -> Event:
        event = _HostEvent()
        self._add(event)
        return event

    def wait(self, event: Event) -> None:
        """Do the work up to the event. What fails takes the rest of the queue with it."""
        assert isinstance(event, _HostEvent)
        try:
            while self._queue and not event.reached:
                self._queue.popleft()()
        except BaseException:
            self._queue.clear()
            raise

    def drain(self) -> None:
        """Nothing runs unless somebody waits for it: what is queued is dropped."""
        self._queue.clear()

    def close(self) -> None:
        self._queue.clear()
        self._memory.clear()

    def _add(self, work: Work) -> None:
        (self._queue if self._recording is None else self._recording).append(work)


def _move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


def _zero(address: int, nbytes: int) -> None:
    ctypes.memset(address, 0, nbytes)
