"""Tracing of torch modules into ONNX without their weights.

Modules are built under a ``FakeTensorMode``: parameters have shapes and dtypes but no data, so tracing
a model of any size costs no memory for its weights. The initializers of the traced graph keep the
parameters' names; :mod:`dflash_export.weights` streams the data in later.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.onnx._internal.exporter import _core
from torch.onnx._internal.exporter._registration import ONNXRegistry

from dflash_export.graphs.finish import finish_graph
from dflash_export.graphs.graph import OPSET, GraphTensor, TracedGraph, torch_dtype
from dflash_export.graphs.operators import emit_operators
from dflash_rt.bundle.graph_names import cache_names, output_name

__all__ = [
    "OFFSET",
    "START",
    "cache_inputs",
    "cache_outputs",
    "fake_mode",
    "rotary_constants",
    "rows",
    "trace",
]

START = GraphTensor("start", ir.DataType.INT64, ("batch",))
OFFSET = GraphTensor("offset", ir.DataType.INT64, ("batch",))

# What the symbolic axes measure while tracing. All differ from one another and from 0 and 1, which
# torch.export would specialise on.
_EXAMPLE = {"batch": 2, "rows": 5, "capacity": 32}


def rows(width: int) -> tuple[str | int, ...]:
    """Axes of ``width`` numbers for each row."""
    return ("batch", "rows", width)


def cache_inputs(layers: int, kv_heads: int, head_dim: int, dtype: ir.DataType) -> list[GraphTensor]:
    """Keys and values of each layer, ``[batch, kv_heads, capacity, head_dim]``."""
    return [
        GraphTensor(name, dtype, ("batch", kv_heads, "capacity", head_dim)) for name in cache_names(layers)
    ]


def cache_outputs(caches: Sequence[GraphTensor]) -> list[GraphTensor]:
    """The same as outputs."""
    return [GraphTensor(output_name(cache.name), cache.dtype, cache.shape) for cache in caches]


def rotary_constants(prefix: str, module: nn.Module) -> dict[str, np.ndarray]:
    """Rotary frequencies: the traced module has none, so a real one is made from the same config."""
    real: Any = type(module)
    return {f"{prefix}.{name}": buffer.numpy() for name, buffer in real(module.config).named_buffers()}


def fake_mode() -> FakeTensorMode:
    """The mode under which modules and example inputs are made."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace(
    module: nn.Module,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    constants: Mapping[str, np.ndarray] | None = None,
) -> TracedGraph:
    """Trace ``module.forward(*inputs)``; the initializers have no data.

    Args:
        module: built under :func:`fake_mode`; its ``forward`` takes one positional argument per input.
        inputs: in order; axes of the same name are the same axis.
        outputs: in order.
        constants: data of initializers that are no weights, such as rotary frequencies.

    Raises:
        UnsupportedModelError: a function that an operator would replace computes something else.
    """
    module.eval()
    with emit_operators(module):
        model = _traced(module, inputs, [item.name for item in outputs])
    return finish_graph(model, inputs, outputs, constants or {})


def _traced(module: nn.Module, inputs: Sequence[GraphTensor], output_names: Sequence[str]) -> ir.Model:
    axes = {name: torch.export.Dim(name) for item in inputs for name in item.shape if isinstance(name, str)}
    dynamic = tuple(
        {i: axes[d] for i, d in enumerate(item.shape) if isinstance(d, str)} or None for item in inputs
    )
    forward = module.forward
    assert callable(forward)
    takes_rest = forward.__code__.co_flags & 0x04  # *args: torch.export nests the rest in a tuple
    fixed = forward.__code__.co_argcount - 1
    shapes = (*dynamic[:fixed], dynamic[fixed:]) if takes_rest else dynamic
    with fake_mode():
        examples = tuple(_example(item) for item in inputs)
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
        result = _core.export(
            program,
            registry=_operators(),
            input_names=[item.name for item in inputs],
            output_names=list(output_names),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    return result.model


@functools.cache
def _operators() -> ONNXRegistry:
    """torch's table from its own operators to ONNX's, which no export changes.

    ``torch.onnx.export`` makes it anew for each graph, which is a fifth of the time of a trace; so what it
    calls with a table is called here. Compared with ``torch.onnx.export`` by a test.
    """
    return ONNXRegistry.from_torchlib(opset_version=OPSET)


def _example(tensor: GraphTensor) -> torch.Tensor:
    shape = [_EXAMPLE[d] if isinstance(d, str) else d for d in tensor.shape]
    return torch.zeros(shape, dtype=torch_dtype(tensor.dtype))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide notes of torch's exporter that a user can do nothing about."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of LeafSpec
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
