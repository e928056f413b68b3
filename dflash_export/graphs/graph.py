"""A graph of a bundle: its inputs and outputs, how its weights are stored, and small graphs node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.tape
import torch

__all__ = [
    "OPSET",
    "PRECISIONS",
    "CodeType",
    "GraphTensor",
    "Nodes",
    "StoredWeight",
    "TracedGraph",
    "WeightFormat",
    "add_placeholder",
    "int64_constant",
    "only_reader",
    "torch_dtype",
]

OPSET = 24
PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

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
    """Make ``value`` an initializer without data; weights.py points it at its bytes."""
    assert value.name is not None
    value.shape, value.dtype = ir.Shape(weight.shape), weight.dtype
    value.const_value = ir.ExternalTensor("", 0, 0, weight.dtype, shape=value.shape, name=value.name)
    graph.initializers[value.name] = value


class Nodes:
    """A graph as it is written. ``inputs`` are its inputs, by name."""

    def __init__(self, inputs: Sequence[GraphTensor]) -> None:
        self.inputs = {tensor.name: tensor.value() for tensor in inputs}
        self._graph = ir.Graph(list(self.inputs.values()), [], nodes=[], opset_imports={"": OPSET})
        self._weights: dict[str, StoredWeight] = {}

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node; returns its one output."""
        node = ir.node(kind, inputs, attributes)
        self._graph.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: type[np.generic] = np.float32) -> ir.Value:
        """Add a constant."""
        return self.op("Constant", value=ir.tensor(np.array(value, dtype)))

    def weight(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], parameter: str | None = None
    ) -> ir.Value:
        """Add a weight, stored as the checkpoint has it; ``parameter`` is its name there if that differs."""
        value = ir.Value(name=name)
        self._weights[name] = StoredWeight((parameter or name,), False, dtype, shape)
        add_placeholder(self._graph, value, self._weights[name])
        return value

    def axis(self, *axes: int) -> ir.Value:
        """Axes, as operators take them."""
        return self.constant(axes, np.int64)

    def per_row(self, value: ir.Value) -> ir.Value:
        """``[b]`` as ``[b, 1, 1]``, to go with ``[b, r, V]``."""
        return self.op("Unsqueeze", value, self.axis(1, 2))

    def sum(self, value: ir.Value, *axes: int, keep: bool = True) -> ir.Value:
        """The sum over ``axes``."""
        return self.op("ReduceSum", value, self.axis(*axes), keepdims=int(keep))

    def cast(self, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """``value`` in another type."""
        return self.op("Cast", value, to=dtype)

    def finish(self, name: str, outputs: Sequence[tuple[GraphTensor, ir.Value]]) -> TracedGraph:
        """The graph with these outputs, which take the names, types and axes of their tensors."""
        for tensor, value in outputs:
            value.name, value.shape = tensor.name, ir.Shape(tensor.shape)
            value.type = ir.TensorType(tensor.dtype)
            self._graph.outputs.append(value)
        self._graph.name = name
        return TracedGraph(ir.Model(self._graph, ir_version=10, producer_name="dflash-export"), self._weights)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``; None if there are others, or if it leaves the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def int64_constant(tape: ir.tape.Tape, values: Sequence[int]) -> ir.Value:
    """A list of integers, as an operator takes it."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})
