"""Small ONNX graphs, written node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dflash_rt.version import __version__

__all__ = ["OPSET", "Nodes", "Values"]

OPSET = 24
# Name -> (onnx.TensorProto dtype, axes)
Values = Mapping[str, tuple[int, Sequence[str | int]]]


class Nodes:
    """Nodes and constants as they are added; every value gets a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: Any, dtype: type[np.generic] = np.float32) -> str:
        """Add a constant; returns its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def axis(self, *axes: int) -> str:
        """Axes, as operators take them."""
        return self.constant(axes, np.int64)

    def per_row(self, name: str) -> str:
        """``[b]`` as ``[b, 1, 1]``, to go with ``[b, r, V]``."""
        return self.op("Unsqueeze", name, self.axis(1, 2))

    def sum(self, value: str, *axes: int, keep: bool = True) -> str:
        """The sum over ``axes``."""
        return self.op("ReduceSum", value, self.axis(*axes), keepdims=int(keep))

    def floats(self, value: str) -> str:
        """``value`` as float32."""
        return self.op("Cast", value, to=TensorProto.FLOAT)

    def model(self, name: str, inputs: Values, outputs: Values) -> onnx.ModelProto:
        """The whole graph, checked."""
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                name,
                [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
                [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
                self.constants,
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=11,
            producer_name="dflash-export",
            producer_version=__version__,
        )
        onnx.checker.check_model(model, full_check=True)
        return model
