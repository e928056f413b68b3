"""Small ONNX graphs, written node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dflash_export.graphs.graph import OPSET, GraphTensor, TracedGraph, add_placeholder
from dflash_export.graphs.stored_weight import StoredWeight

__all__ = ["Nodes", "int64_constant", "only_reader"]


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


def int64_constant(values: Sequence[int]) -> ir.Node:
    """A ``Constant`` node of a list of integers."""
    return ir.node("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})
