"""The two protocols between a plan and what carries it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from dflash_rt.backends.device.plan import Run

__all__ = ["Bytes", "Captured", "Device", "Engines", "Event", "Work"]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Work: TypeAlias = Callable[[], None]


class Captured(Protocol):
    """Work that was captured once, to be launched as one."""

    def launch(self) -> None:
        """Enqueue all of it."""


class Event(Protocol):
    """A place in the stream that the host can wait for."""


class Device(Protocol):
    """Memory and one stream of work, done in order, later than it is asked for.

    What enqueues returns at once. Host memory given to :meth:`upload` and :meth:`download` is :meth:`pinned`
    memory, and is left alone until a later event (:meth:`record_event`) was waited for. Addresses are those
    of the device. Raises BackendError for whatever fails, perhaps later than the call that caused it.
    """

    @property
    def name(self) -> str:
        """What the device calls itself."""

    @property
    def stream(self) -> int:
        """Handle of the stream; 0 where there is none."""

    def free_bytes(self) -> int | None:
        """Bytes that can still be allocated; ``None`` if nothing limits them but the machine."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory, zeroed and aligned to 256 bytes. It lives until :meth:`close`."""

    def pinned(self, nbytes: int) -> Bytes:
        """New host memory, zeroed. It lives until :meth:`close`."""

    def upload(self, address: int, source: Bytes) -> None:
        """Enqueue a copy to the device."""

    def download(self, target: Bytes, address: int) -> None:
        """Enqueue a copy from the device."""

    def copy(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int
    ) -> None:
        """Enqueue ``height`` copies of ``width`` bytes within the device, each a pitch behind the last."""

    def zero(self, address: int, nbytes: int) -> None:
        """Enqueue zeroing."""

    def call(self, work: Work) -> None:
        """Enqueue the run of a graph: what :meth:`Engines.prepare` gave."""

    def capture(self, record: Work) -> Captured:
        """Call ``record``, and keep what it enqueues instead of doing it. Only copies, zeroing and runs."""

    def record_event(self) -> Event:
        """The place after everything that was enqueued so far."""

    def wait(self, event: Event) -> None:
        """Wait until everything before ``event`` is done. Its downloads are then in host memory."""

    def drain(self) -> None:
        """Wait for what runs, so that it can be taken apart. Raises nothing."""

    def close(self) -> None:
        """Wait for what runs, and free all memory. Safe to call twice."""


class Engines(Protocol):
    """Whatever runs the graphs of a bundle on a device."""

    @property
    def max_seq_len(self) -> int:
        """Prompt and output tokens together that it was built for, at most."""

    @property
    def capacity(self) -> int | None:
        """Rows that every cache must have; ``None`` if any number will do."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights; known before :meth:`load`."""

    def load(self, device: Device) -> int:
        """Load every graph. Returns the bytes of scratch memory that runs want; they share it."""

    def prepare(self, run: Run, address: Callable[[str], int], scratch: int) -> Work:
        """What enqueues ``run`` on the device's stream, over buffers at ``address(name)``.

        ``scratch`` is the address of memory as large as :meth:`load` said. Whatever depends on shapes is done
        here and once; the work itself may be captured.
        """

    def require_capturable(self) -> None:
        """Raises BackendError if the library says that something which was prepared can't be captured."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""
