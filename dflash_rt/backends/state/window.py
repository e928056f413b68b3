"""State of kind ``window``: caches that hold the last rows only, however long the context is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dflash_rt.arrays import IntArray
from dflash_rt.backends.state.kv import KvState
from dflash_rt.bundle.manifest import StateSpec, TensorSpec

__all__ = ["WindowState"]

# Rows are moved once in so many new ones at least, and in half a window.
_SLACK = 64


class WindowState(KvState):
    """As :class:`KvState`, but row 0 of the caches is at position ``offset``, and rows have to move.

    A block sees ``spec.window`` rows before it and itself. The caches hold those, the longest call's
    ``most_rows``, a block, and some room to spare, so that rows don't move at every step. The input
    ``offset`` is int64 ``[batch]``; always the same array.
    """

    def __init__(
        self, spec: StateSpec, tensors: Sequence[TensorSpec], batch: int, *, most_rows: int, block_size: int
    ) -> None:
        super().__init__(spec, tensors, batch)
        assert spec.window is not None
        self._size = spec.window
        self._most_rows = self._size + most_rows + block_size + max(_SLACK, self._size // 2)
        self.offset: IntArray = np.zeros(batch, np.int64)
        self.inputs = {"offset": self.offset}

    def rows(self, capacity: int) -> int:
        """A window at most, with room to spare."""
        return min(capacity, self._most_rows)

    def restart(self, slots: npt.NDArray[np.bool_]) -> None:
        """Back to position 0 in these slots."""
        self.offset[slots] = 0

    def place(self, start: IntArray, rows: int) -> IntArray:
        """See :meth:`KvState.place`. Rows that nothing sees any more are dropped, the others move forward."""
        caches = self.arrays.values()
        capacity = next(iter(caches)).shape[2]
        for slot, position in enumerate(start):
            drop = int(position) - self._size - int(self.offset[slot])
            if position + rows - self.offset[slot] <= capacity or drop <= 0:
                continue
            for cache in caches:
                cache[slot, :, : self._size] = cache[slot, :, drop : drop + self._size].copy()
            self.offset[slot] += drop
        return start - self.offset

    def clear(self) -> None:
        """Also back to position 0."""
        super().clear()
        self.offset[:] = 0
