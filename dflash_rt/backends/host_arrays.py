"""Arrays on the host that graphs read and write in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt.bundle.dtypes import NUMPY_TYPES
from dflash_rt.bundle.manifest import TensorSpec
from dflash_rt.errors import BackendError, NumericalError

__all__ = ["HostBuffer", "check_finite", "zeros"]


def zeros(shape: Sequence[int], dtype: str, what: str) -> npt.NDArray[Any]:
    """An array of zeros for a tensor of type ``dtype``. Raises BackendError, which names ``what``."""
    storage = NUMPY_TYPES[dtype]
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
        shape = spec.sized(batch=batch, rows=rows)
        self._tail, self._dtype = shape[2:], spec.dtype
        self._flat = zeros((math.prod(shape),), spec.dtype, f"{spec.name} of {rows} rows")
        self._views: dict[tuple[int, int], npt.NDArray[Any]] = {}

    def view(self, batch: int, rows: int) -> npt.NDArray[Any]:
        """The tensor as ``[batch, rows, …]``; every call with the same shape is the same memory."""
        view = self._views.get((batch, rows))
        if view is None:
            shape = (batch, rows, *self._tail)
            view = self._flat[: math.prod(shape)].reshape(shape)
            self._views[batch, rows] = view  # a step asks a dozen times
        return view

    def fits(self, spec: TensorSpec) -> bool:
        """Whether a row of this tensor is as large and of the same type."""
        return spec.shape[2:] == self._tail and spec.dtype == self._dtype

    def clear(self) -> None:
        """Zero all of it."""
        self._flat.fill(0)


def check_finite(logits: npt.NDArray[Any], stage: str) -> None:
    """Raise NumericalError, which names ``stage``, unless every value is finite."""
    # A sum is finite only if every term is; it costs a tenth of looking at each term. A finite
    # row may still overflow it, so that what looks wrong is looked at again.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(logits.sum()):
            return
    bad = ~np.isfinite(logits)
    if bad.any():
        raise NumericalError(
            "a step gave logits that are not finite",
            found=f"{int(bad.sum())} of {bad.size} values of {stage} are NaN or infinite",
            expected="finite logits",
            remedy="check the bundle with `dflash-export inspect`; in fp16, build with bf16 or fp32",
        )
