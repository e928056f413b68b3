"""The buffers of a plan on a device, and the host's staging buffers for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt.arrays import IntArray
from dflash_rt.backends.device.plan import Copy, Layout
from dflash_rt.backends.device.protocols import Bytes, Device, Event
from dflash_rt.bundle.dtypes import NUMPY_TYPES

__all__ = ["Memory", "Readback"]


@dataclass(frozen=True)
class Readback:
    """What the host reads after a pass. The arrays are copies; each int64, slots first."""

    values: dict[str, IntArray]

    def rows(self, name: str, rows: int) -> IntArray:
        """The buffer ``name`` as ``[batch, rows]``."""
        flat = self.values[name].reshape(-1)
        batch = self.values[name].shape[0]
        return flat[: batch * rows].reshape(batch, rows)

    def bad_slots(self, *, drafted: bool) -> dict[str, int]:
        """How many slots had logits that aren't finite, by stage; empty if all are fine."""
        counts = {"target_head": int((self.values["finite"] != 1).sum())}
        if drafted:
            counts["draft_head"] = int((self.values["draft_finite"] != 1).sum())
        return {stage: count for stage, count in counts.items() if count}


class Memory:
    """One allocation on a device, laid out as a plan says, zeroed; and pinned memory to write and read it."""

    def __init__(self, device: Device, layout: Layout) -> None:
        self.layout = layout
        self._device = device
        self._base = device.allocate(layout.nbytes)
        self._inbox: dict[str, tuple[Bytes, Event | None]] = {}

    def address(self, name: str) -> int:
        """Where a buffer begins."""
        return self._base + self.layout.offsets[name]

    def write(self, name: str, values: npt.NDArray[Any]) -> None:
        """Enqueue an upload to the beginning of a buffer; ``values`` may change afterwards."""
        pinned, event = self._inbox.get(name, (None, None))
        if pinned is None:
            pinned = self._device.pinned(self.layout.buffers[name].nbytes)
        if event is not None:
            self._device.wait(event)  # long past, except when the host writes twice in a row
        source = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        pinned[: source.size] = source
        self._device.upload(self.address(name), pinned[: source.size])
        self._inbox[name] = pinned, self._device.record_event()

    def read(self, name: str, staging: Bytes) -> None:
        """Enqueue a download of the first ``staging.size`` bytes of a buffer."""
        self._device.download(staging, self.address(name))

    def new_staging(self, *names: str) -> Bytes:
        """Pinned memory (a staging buffer) as large as the largest of some buffers."""
        return self._device.pinned(max(self.layout.buffers[name].nbytes for name in names))

    def new_readback(self) -> Bytes:
        """Pinned memory for what a pass leaves for the host."""
        return self._device.pinned(self.layout.readback[1])

    def read_back(self, staging: Bytes) -> None:
        """Enqueue a download of it into such memory."""
        self._device.download(staging, self._base + self.layout.readback[0])

    def readback(self, staging: Bytes) -> Readback:
        """What was downloaded, by buffer."""
        begin, _ = self.layout.readback
        values = {}
        for name, buffer in self.layout.buffers.items():
            if buffer.kind == "readback":
                at = self.layout.offsets[name] - begin
                values[name] = staging[at : at + buffer.nbytes].view(np.int64).reshape(buffer.shape).copy()
        return Readback(values)

    def as_array(self, name: str, staging: Bytes, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A view of downloaded bytes; bfloat16 comes as its bits."""
        dtype = np.dtype(NUMPY_TYPES[self.layout.buffers[name].dtype])
        return staging[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    def copy(self, copy: Copy) -> None:
        """Enqueue a copy of a plan."""
        source, target = (
            self.address(copy.source) + copy.source_at,
            self.address(copy.target) + copy.target_at,
        )
        self._device.copy(source, copy.source_pitch, target, copy.target_pitch, copy.width, copy.height)

    def zero(self, name: str) -> None:
        """Enqueue zeroing of a buffer."""
        self._device.zero(self.address(name), self.layout.buffers[name].nbytes)

    def zero_all(self) -> None:
        """Enqueue zeroing of everything."""
        self._device.zero(self._base, self.layout.nbytes)
