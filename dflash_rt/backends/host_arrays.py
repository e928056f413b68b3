"""Arrays on the host that graphs read and write in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt.bundle.manifest import TensorSpec
from dflash_rt.errors import BackendError

__all__ = ["STORAGE", "HostBuffer", "zeros"]

# Where bfloat16 has no numpy type its bits travel as uint16; ONNX Runtime is told by the number
# that onnx.TensorProto gives the type.
STORAGE: dict[str, tuple[type[np.generic], int]] = {
    "float32": (np.float32, 1),
    "int64": (np.int64, 7),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
}


def zeros(shape: Sequence[int], dtype: str, what: str) -> npt.NDArray[Any]:
    """An array of zeros for a tensor of type ``dtype``. Raises BackendError, which names ``what``."""
    storage = STORAGE[dtype][0]
    try:
        return np.zeros(tuple(shape), storage)
    except (MemoryError, ValueError) as error:  # ValueError: more bytes than an address can tell
        raise BackendError(
            f"there isn't enough memory for {what}",
            found=f"no room for {math.prod(shape) * np.dtype(storage).itemsize} more bytes",
            expected="memory for the caches and buffers of one sequence",
            remedy="free memory, shorten the prompt or max_new_tokens, or build with a smaller --max-seq-len "
            "or --prefill-chunk",
        ) from error


class HostBuffer:
    """Memory for one tensor of at most ``batch * rows`` rows; a smaller shape uses its beginning."""

    def __init__(self, spec: TensorSpec, batch: int, rows: int) -> None:
        self.tail = tuple(d for d in spec.shape[2:] if isinstance(d, int))
        size = math.prod((batch, rows, *self.tail))
        self._flat = zeros((size,), spec.dtype, f"{spec.name} of {rows} rows")
        self._views: dict[tuple[int, int], npt.NDArray[Any]] = {}

    def view(self, batch: int, rows: int) -> npt.NDArray[Any]:
        """The tensor as ``[batch, rows, …]``; every call with the same shape is the same memory."""
        view = self._views.get((batch, rows))
        if view is None:
            shape = (batch, rows, *self.tail)
            view = self._flat[: math.prod(shape)].reshape(shape)
            self._views[batch, rows] = view  # a step asks a dozen times
        return view

    def clear(self) -> None:
        """Zero all of it."""
        self._flat.fill(0)
