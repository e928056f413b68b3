"""``MatMul(x, weight)`` of a graph becomes ``MatMul(x, DequantizeLinear(codes, scales))``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from dflash_rt.errors import UnsupportedModelError

from .graph_passes import StoredWeight, TracedGraph, add_placeholder
from .quantization import BLOCK_SIZES, WeightFormat

__all__ = ["CODES", "SCALES", "quantize_graph"]

CODES, SCALES = ".codes", ".scales"  # what a weight's two initializers end in

_DTYPES = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8}


def quantize_graph(graph: TracedGraph, form: WeightFormat) -> TracedGraph:
    """A copy of ``graph`` in which the weight of every linear layer is stored in ``form``.

    Biases, norms and all activations stay as they are. No data is needed.

    Raises:
        UnsupportedModelError: a matrix has no whole number of blocks, or weights that multiply are no linear
            layers, such as the experts of a mixture.
    """
    model, weights = graph.model.clone(), dict(graph.weights)
    products = {str(node.inputs[1].name): node for node in model.graph if _weight(node, weights)}  # type: ignore[union-attr]
    matrices = {name: _transposed(weights[name]) for name in products}
    _check(weights, matrices, form)
    for name, node in products.items():
        del weights[name]
        product = ir.node(
            "MatMul", [node.inputs[0], _dequantized(model.graph, node, name, matrices[name], form, weights)]
        )
        new, old = product.outputs[0], node.outputs[0]
        new.shape, new.type = old.shape, old.type
        model.graph.insert_before(node, product)
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[name]
    return TracedGraph(model, weights)


def _weight(node: ir.Node, weights: Mapping[str, StoredWeight]) -> bool:
    """Whether ``node`` is ``x · weight``; the head's is a Gemm with the rows as the embedding has them."""
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return False
    return node.inputs[1].name in weights


def _transposed(weight: StoredWeight) -> StoredWeight:
    return weight if weight.transpose else replace(weight, transpose=True, shape=weight.shape[::-1])


def _check(
    weights: Mapping[str, StoredWeight], matrices: Mapping[str, StoredWeight], form: WeightFormat
) -> None:
    others = [name for name, weight in weights.items() if len(weight.shape) > 1 and name not in matrices]
    if others:
        raise UnsupportedModelError(
            "this target can't be quantised",
            found=f"{others[0]} {list(weights[others[0]].shape)}",
            expected="linear layers only; the experts of a mixture aren't supported",
            todo="build without --int4 and --int8",
        )
    inputs = {name: weight.shape[0] for name, weight in matrices.items()}
    for name, count in inputs.items():
        if count % form.block_size:
            fitting = [str(size) for size in BLOCK_SIZES if not any(n % size for n in inputs.values())]
            raise UnsupportedModelError(
                f"{name} can't be cut into blocks of {form.block_size}",
                found=f"{count} inputs",
                expected=f"a multiple of {form.block_size}",
                todo=f"choose --quantize-block {' or '.join(fitting)}"
                if fitting
                else "build without --int4 and --int8",
            )


def _dequantized(
    graph: ir.Graph,
    node: ir.Node,
    name: str,
    weight: StoredWeight,
    form: WeightFormat,
    weights: dict[str, StoredWeight],
) -> ir.Value:
    """The output of a new ``DequantizeLinear`` before ``node``; its two initializers go into ``weights``."""
    inputs, outputs = weight.shape
    parts = {
        CODES: StoredWeight(weight.parameters, True, _DTYPES[form.weights], weight.shape, form),
        SCALES: StoredWeight(
            weight.parameters, True, weight.dtype, (inputs // form.block_size, outputs), form, is_scale=True
        ),
    }
    values = []
    for ending, part in parts.items():
        weights[f"{name}{ending}"] = part
        values.append(ir.Value(name=f"{name}{ending}"))
        add_placeholder(graph, values[-1], part)
    dequantize = ir.node("DequantizeLinear", values, {"axis": 0, "block_size": form.block_size})
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]
