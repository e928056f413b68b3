"""A graph of a bundle, and the names, types and axes of what goes in and out."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from dflash_export.graphs.stored_weight import StoredWeight

__all__ = ["OPSET", "PRECISIONS", "GraphTensor", "TracedGraph", "add_placeholder", "torch_dtype"]

OPSET = 24
PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """PyTorch's name of a type."""
    found = getattr(torch, dtype.numpy().name)
    assert isinstance(found, torch.dtype)
    return found


@dataclass(frozen=True)
class GraphTensor:
    """One input or output of a graph: its name, type and axes (``str``: symbolic, ``int``: fixed)."""

    name: str
    dtype: ir.DataType
    shape: tuple[str | int, ...]

    def value(self) -> ir.Value:
        """A new value of this name, type and shape."""
        return ir.Value(name=self.name, shape=ir.Shape(self.shape), type=ir.TensorType(self.dtype))


@dataclass
class TracedGraph:
    """An ONNX graph and, by initializer name, the weights it still has to be given."""

    model: ir.Model
    weights: dict[str, StoredWeight] = field(default_factory=dict)


def add_placeholder(graph: ir.Graph, value: ir.Value, weight: StoredWeight) -> None:
    """Make ``value`` an initializer without data; weights/data_file.py points it at its bytes."""
    assert value.name is not None
    value.shape, value.dtype = ir.Shape(weight.shape), weight.dtype
    value.const_value = ir.ExternalTensor("", 0, 0, weight.dtype, shape=value.shape, name=value.name)
    graph.initializers[value.name] = value
