"""A graph as TensorRT takes it: its ONNX header made ready, the parsed network, and the edits of both.

Weights stay where they are. Two things change in the copy of the header:

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
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dflash_export.engines.vendor import has_lengths
from dflash_export.errors import EngineBuildError
from dflash_rt.bundle.dtypes import ONNX_TYPES

__all__ = ["GraphHeader", "Network", "load_header", "parse"]


class Network:
    """A ``trt.INetworkDefinition`` with its layers by what they make.

    The library gives out layers as ``ILayer``; :meth:`as_layer` gives one its own type.
    """

    def __init__(self, trt: ModuleType, definition: Any) -> None:
        self.trt = trt
        self.definition = definition
        self.inputs = [definition.get_input(i) for i in range(definition.num_inputs)]
        self.outputs = [definition.get_output(i) for i in range(definition.num_outputs)]
        self.layers = [definition.get_layer(i) for i in range(definition.num_layers)]
        self._producers = {
            layer.get_output(i).name: layer for layer in self.layers for i in range(layer.num_outputs)
        }

    def producer(self, tensor: Any) -> Any | None:
        """The layer that makes ``tensor``; None for an input of the network."""
        return self._producers.get(tensor.name)

    def input(self, name: str) -> Any:
        """An input of the network by name."""
        return next(tensor for tensor in self.inputs if tensor.name == name)

    def layers_of(self, kind: str) -> list[Any]:
        """All layers of a ``trt.LayerType``."""
        wanted = getattr(self.trt.LayerType, kind)
        return [layer for layer in self.layers if layer.type == wanted]

    def is_kind(self, layer: Any | None, kind: str) -> bool:
        """True if ``layer`` is there and of a ``trt.LayerType``."""
        return layer is not None and layer.type == getattr(self.trt.LayerType, kind)

    def as_layer(self, layer: Any, type_name: str) -> Any:
        """``layer`` with the methods of its own class."""
        layer.__class__ = getattr(self.trt, type_name)
        return layer

    def attentions(self) -> list[Any]:
        """Every ``trt.IAttention``."""
        layers = self.layers_of("ATTENTION_INPUT")
        return [self.as_layer(layer, "IAttentionInputLayer").attention for layer in layers]

    # --- Edits ---

    def read_caches_directly(self) -> None:
        """Take out the multiplications by one that the parser puts before query and key of an attention.

        The one on the key would be a pass over the whole cache.
        """
        for attention in self.attentions():
            for index in (0, 1):
                source = self._behind_unit_product(attention.get_input(index))
                if source is not None:
                    attention.set_input(index, source)

    def _behind_unit_product(self, tensor: Any) -> Any | None:
        layer = self.producer(tensor)
        if not self.is_kind(layer, "ELEMENTWISE"):
            return None
        assert layer is not None
        product = self.as_layer(layer, "IElementWiseLayer")
        if product.op != self.trt.ElementWiseOperation.PROD or not self._is_one(product.get_input(1)):
            return None
        return product.get_input(0)

    def _is_one(self, tensor: Any) -> bool:
        layer = self.producer(tensor)
        while self.is_kind(layer, "CAST") or self.is_kind(layer, "SHUFFLE"):
            assert layer is not None
            layer = self.producer(layer.get_input(0))
        if not self.is_kind(layer, "CONSTANT"):
            return False
        weights = self.as_layer(layer, "IConstantLayer").weights
        values = weights if isinstance(weights, np.ndarray) else weights.numpy()
        return bool(np.all(values == 1))

    def limit_attention_to_valid_rows(self) -> None:
        """Tell every attention how many rows of its caches are valid, so that it reads no more of them.

        That is ``start + rows`` for each sequence: what was committed before and what this call writes. The
        mask still decides what is seen. Does nothing where the library can't be told (TensorRT 10): attention
        then reads whole caches, and computes the same.
        """
        attentions = self.attentions()
        if not attentions or not has_lengths(self.trt):
            return
        net, trt = self.definition, self.trt
        shape = net.add_shape(self.input("embeddings")).get_output(0)
        rows = net.add_slice(shape, (1,), (1,), (1,)).get_output(0)
        start = self.input("start")
        end = net.add_elementwise(start, rows, trt.ElementWiseOperation.SUM).get_output(0)
        lengths = net.add_cast(end, trt.int32).get_output(0)
        for attention in attentions:
            attention.key_value_lengths = lengths

    def allow_unfused_attention(self) -> None:
        """Let attention fall back to separate products and softmax: there is no fused kernel for fp32."""
        for attention in self.attentions():
            attention.decomposable = True


def parse(trt: ModuleType, builder: Any, logger: Any, header: GraphHeader) -> tuple[Network, Any]:
    """Parse a header; weights are read from where they lie. The parser must outlive the build.

    Raises:
        EngineBuildError: the parser refuses the graph.
    """
    # TensorRT 11 and TensorRT-RTX are always strongly typed.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(definition, logger)
    # The path says which folder the weights' file names are relative to.
    if not parser.parse(header.model.SerializeToString(), str(header.path)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise EngineBuildError(
            f"{header.path.name} can't be parsed",
            found="; ".join(errors) or "; ".join(logger.errors) or "no message",
            expected="a graph that this version of TensorRT supports",
            remedy="use a newer version of TensorRT, or report this graph",
        )
    return Network(trt, definition), parser


@dataclass(frozen=True)
class GraphHeader:
    """``model`` points to weights in files beside ``path``. In ``shapes`` a ``str`` is a symbolic axis."""

    path: Path
    model: onnx.ModelProto
    shapes: dict[str, tuple[str | int, ...]]


def data_files(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the external data files of ``model``, sorted."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return tuple(sorted({entry.value for entry in entries if entry.key == "location"}))


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
    _scale_queries(model.graph, ONNX_TYPES[cache_dtype])
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
