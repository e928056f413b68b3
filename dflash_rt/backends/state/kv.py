"""State of kind ``kv``: caches with a row for each position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt.arrays import IntArray
from dflash_rt.backends.host_arrays import zeros
from dflash_rt.bundle.manifest import StateSpec, TensorSpec

__all__ = ["Arrays", "KvState"]

Arrays = dict[str, npt.NDArray[Any]]


class KvState:
    """Caches ``[batch, heads, rows, head_dim]`` in host memory, by tensor; none before they first grow.

    A rollback is nothing to do: rows behind the last committed one are masked, and overwritten before they
    are committed.

    Attributes:
        arrays: the caches; moved when they grow, in place otherwise.
        inputs: inputs of the graphs besides, which :meth:`place` fills.
    """

    def __init__(self, spec: StateSpec, tensors: Sequence[TensorSpec], batch: int) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.name in spec.tensors]
        self._batch = batch
        self.arrays: Arrays = {}
        self.inputs: Mapping[str, IntArray] = {}

    def rows(self, capacity: int) -> int:
        """Rows of each cache when a sequence may have ``capacity`` rows."""
        return capacity

    def allocate(self, capacity: int) -> Arrays:
        """New caches, zeroed; the present ones stay as they are. Raises BackendError."""
        rows = self.rows(capacity)
        return {
            tensor.name: zeros(
                tensor.sized(batch=self._batch, capacity=rows), tensor.dtype, f"a cache of {rows} rows"
            )
            for tensor in self._tensors
        }

    def move(self, grown: Arrays) -> None:
        """Go over to caches that :meth:`allocate` made; each old one is freed before the next is copied."""
        for name, cache in grown.items():
            old = self.arrays.pop(name, None)
            if old is not None:
                rows = min(old.shape[2], cache.shape[2])
                cache[:, :, :rows] = old[:, :, :rows]
            self.arrays[name] = cache

    def restart(self, slots: npt.NDArray[np.bool_]) -> None:
        """A new sequence begins at position 0 in ``slots`` (``[batch]``)."""

    def place(self, start: IntArray, rows: int) -> IntArray:
        """Where ``rows`` from the positions ``start [batch]`` on go: the row of the caches for each slot."""
        return start

    def clear(self) -> None:
        """Zero everything, as at the beginning."""
        for cache in self.arrays.values():
            cache.fill(0)
