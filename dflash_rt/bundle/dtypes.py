"""The dtypes of a manifest in numpy and in ONNX."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["NUMPY_TYPES", "ONNX_TYPES", "as_float32", "item_size"]

# bfloat16 has no numpy type; its bits travel as uint16.
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
# Members of onnx.TensorProto.DataType.
ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


def item_size(dtype: str) -> int:
    """Bytes of one value."""
    return np.dtype(NUMPY_TYPES[dtype]).itemsize


def as_float32(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Convert floats of any of these types; a bfloat16's bits are the upper half of a float32's."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
