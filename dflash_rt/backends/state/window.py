"""Which rows the caches of a windowed drafter hold: the last ones, however long the context is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt.arrays import IntArray

__all__ = ["Window"]

# Rows are moved once in so many new ones at least, and in half a window.
_SLACK = 64


class Window:
    """Positions of row 0 of caches ``[batch, heads, rows, head_dim]``, and when rows have to move.

    A block sees ``size`` rows before it and itself. The caches hold those, the longest call's rows, a block,
    and some room to spare, so that rows don't move at every step: ``rows`` in all. ``offset`` is int64
    ``[batch]``, the position of row 0; always the same array.
    """

    def __init__(self, size: int, most_rows: int, block_size: int, batch: int) -> None:
        self._size = size
        self.rows = size + most_rows + block_size + max(_SLACK, size // 2)
        self.offset: IntArray = np.zeros(batch, np.int64)

    def place(self, start: IntArray, rows: int, caches: Iterable[npt.NDArray[Any]]) -> IntArray:
        """Make room for ``rows`` at positions from ``start [batch]`` on; returns the cache row of each.

        Rows that nothing can see any more are dropped, the others move to the front.
        """
        caches = list(caches)
        capacity = caches[0].shape[2]
        for slot, position in enumerate(start):
            if position < self.offset[slot]:  # another sequence
                self.offset[slot] = 0
            drop = int(position) - self._size - int(self.offset[slot])
            if position + rows - self.offset[slot] <= capacity or drop <= 0:
                continue
            for cache in caches:
                cache[slot, :, : self._size] = cache[slot, :, drop : drop + self._size].copy()
            self.offset[slot] += drop
        return start - self.offset

    def clear(self) -> None:
        """Back to position 0."""
        self.offset[:] = 0
