"""A copy of a graph's ONNX header, made ready for TensorRT. The weights stay where they are.

Two things change in the copy:

- ``capacity`` becomes a number: a cache that is updated in place must have a static length.
- The scale moves out of ``Attention``. The parser would multiply query AND key by ``sqrt(scale)`` in the
  graph's own dtype: a pass over the whole key cache, and in bf16 with heads of 128 a logit that is 0.3 % too
  small. Multiplying the query alone, in fp32, costs nothing and is exact to its rounding::

      Attention(q, k, v, scale)  ->  Attention(Cast(Mul(Cast(q, fp32), scale)), k, v, scale=1)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dflash_export.errors import EngineBuildError

__all__ = ["GraphHeader", "load_header"]

_ONNX_DTYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
_ONNX_DTYPES["bfloat16"] = onnx.TensorProto.BFLOAT16


@dataclass(frozen=True)
class GraphHeader:
    """``model`` points to weights in files beside ``path``. In ``shapes`` a ``str`` is a symbolic axis."""

    path: Path
    model: onnx.ModelProto
    shapes: dict[str, tuple[str | int, ...]]

    @property
    def data_files(self) -> tuple[str, ...]:
        """Names of the files that hold the weights, sorted."""
        return data_files(self.model)


def data_files(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the external data files of ``model``, sorted."""
    return tuple(
        sorted(
            {
                entry.value
                for tensor in model.graph.initializer
                for entry in tensor.external_data
                if entry.key == "location"
            }
        )
    )


def read_header(path: Path) -> onnx.ModelProto:
    """The graph without its weights. Raises EngineBuildError if it can't be read."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is in no public place
        raise EngineBuildError(
            f"{path} can't be read",
            found=str(error) or type(error).__name__,
            expected="an ONNX graph",
            remedy="copy the bundle again, or build it again with `dflash-export build --force`",
        ) from error


def load_header(path: Path, *, capacity: int, cache_dtype: str) -> GraphHeader:
    """Read a graph, fix its capacity and move the scale of every attention into its query.

    ``cache_dtype`` is the dtype of queries: float32, float16 or bfloat16.
    """
    model = read_header(path)
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_value = capacity
    # What was inferred for the symbolic capacity no longer holds.
    del model.graph.value_info[:]
    _scale_queries(model.graph, _ONNX_DTYPES[cache_dtype])
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    return GraphHeader(Path(os.path.abspath(path)), model, shapes)


def _scale_queries(graph: onnx.GraphProto, dtype: int) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        scale = next((a for a in node.attribute if a.name == "scale"), None)
        if node.op_type == "Attention" and scale is not None:
            stem = f"{node.output[0]}.query"
            graph.initializer.append(numpy_helper.from_array(np.array(scale.f, np.float32), f"{stem}.scale"))
            nodes += [
                helper.make_node("Cast", [node.input[0]], [f"{stem}.fp32"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Mul", [f"{stem}.fp32", f"{stem}.scale"], [f"{stem}.scaled"]),
                helper.make_node("Cast", [f"{stem}.scaled"], [stem], to=dtype),
            ]
            node.input[0] = stem
            scale.f = 1.0
        nodes.append(node)
    # Copied first: the list is a view of the graph.
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
