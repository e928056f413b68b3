"""How a weight of a graph is stored: which parameters it comes from, laid out how, in which codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

__all__ = ["CodeType", "StoredWeight", "WeightFormat"]

CodeType = Literal["int4", "int8", "fp8"]


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix is stored: the type of its codes, and how many inputs share a scale (None: all)."""

    weights: CodeType
    block_size: int | None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4 if self.weights == "int4" else 8

    def scale_shape(self, inputs: int, outputs: int) -> tuple[int, ...]:
        """As stored in a graph."""
        return (outputs,) if self.block_size is None else (inputs // self.block_size, outputs)


@dataclass(frozen=True)
class StoredWeight:
    """How one initializer comes from parameters of the traced module.

    The data is ``concatenate(parameters, axis=0)``, then transposed if ``transpose``: linear layers that read
    the same rows become one matrix, and ``[out, in]`` becomes the ``[in, out]`` that MatMul wants.
    ``shape`` is the shape as stored. With a ``form`` it is quantised, and ``dtype`` is that of its codes or,
    with ``is_scale``, of its scales.
    """

    parameters: tuple[str, ...]
    transpose: bool
    dtype: ir.DataType
    shape: tuple[int, ...]
    form: WeightFormat | None = None
    is_scale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape, dtype=np.int64) * self.dtype.itemsize)  # 0.5 bytes for int4
