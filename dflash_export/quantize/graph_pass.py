"""``MatMul(x, weight)`` of a graph becomes ``MatMul(Q/DQ(x), DequantizeLinear(codes, scales))``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.tape
import torch

from dflash_export.errors import UnsupportedModelError
from dflash_export.graphs.graph import StoredWeight, TracedGraph, WeightFormat, add_placeholder
from dflash_export.quantize.formats import BLOCK_SIZES

__all__ = ["CODES", "DIVISOR", "SCALES", "InputTreatment", "quantize_graph"]

CODES, SCALES = ".codes", ".scales"  # what a weight's two initializers end in
DIVISOR, INPUT_SCALE, ZERO = ".divisor", ".input_scale", ".input_zero"  # of what treats its input

_DTYPES = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_TOP = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True, eq=False)
class InputTreatment:
    """What happens to the input of one product first.

    ``factor`` float32 ``[in]`` is multiplied with it; ``largest`` is the absolute input that becomes the
    largest code, None where inputs stay as they are.
    """

    factor: torch.Tensor | None = None
    largest: float | None = None


@dataclass
class _Pass:
    graph: ir.Graph
    weights: dict[str, StoredWeight]
    form: WeightFormat
    inputs: Mapping[str, InputTreatment]

    def replace_product(self, node: ir.Node, name: str, matrix: StoredWeight) -> None:
        del self.weights[name]
        tape, old = ir.tape.Tape(), node.outputs[0]
        source = self._treated(tape, node.inputs[0], name, matrix.dtype)
        new = tape.op("MatMul", [source, self._dequantized(tape, name, matrix)])
        new.shape, new.type = old.shape, old.type
        self.graph.insert_before(node, tape.nodes)
        old.replace_all_uses_with(new)
        self.graph.remove(node, safe=True)
        del self.graph.initializers[name]

    def _dequantized(self, tape: ir.tape.Tape, name: str, weight: StoredWeight) -> ir.Value:
        """The output of a new ``DequantizeLinear``; its two initializers become weights."""
        form, shape = self.form, self.form.scale_shape(*weight.shape)
        parts = {
            CODES: StoredWeight(weight.parameters, True, _DTYPES[form.weights], weight.shape, form),
            SCALES: StoredWeight(weight.parameters, True, weight.dtype, shape, form, is_scale=True),
        }
        values = []
        for ending, part in parts.items():
            self.weights[f"{name}{ending}"] = part
            values.append(ir.Value(name=f"{name}{ending}"))
            add_placeholder(self.graph, values[-1], part)
        block = form.block_size
        attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        return tape.op("DequantizeLinear", values, attributes)

    def _treated(
        self, tape: ir.tape.Tape, source: ir.Value | None, name: str, dtype: ir.DataType
    ) -> ir.Value | None:
        """The input ``source`` of a product, divided and rounded as is wanted."""
        treatment = self.inputs.get(name, InputTreatment())
        if treatment.factor is not None:
            factor = self._constant(f"{name}{DIVISOR}", treatment.factor.numpy(), dtype)
            source = tape.op("Mul", [source, factor])
        if treatment.largest is not None:
            # A layer that saw only zeros keeps the scale 1.
            step = (treatment.largest or _TOP[self.form.weights]) / _TOP[self.form.weights]
            scale = self._constant(f"{name}{INPUT_SCALE}", np.array(step), dtype)
            zero = self._constant(f"{name}{ZERO}", np.array(0), _DTYPES[self.form.weights])
            rounded = tape.op("QuantizeLinear", [source, scale, zero])
            source = tape.op("DequantizeLinear", [rounded, scale, zero])
        return source

    def _constant(self, name: str, numbers: np.ndarray, dtype: ir.DataType) -> ir.Value:
        tensor = ir.Tensor(numbers.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(dtype), const_value=tensor
        )
        self.graph.initializers[name] = value
        return value


def quantize_graph(
    graph: TracedGraph,
    form: WeightFormat,
    inputs: Mapping[str, InputTreatment] | None = None,
    *,
    skip: Collection[str] = (),
) -> TracedGraph:
    """A copy of ``graph`` in which the weight of every linear layer is stored in ``form``.

    Biases and norms stay as they are, and so do activations but for what ``inputs`` says of a product, by the
    name of its weight. Products with a weight of ``skip`` are left alone. No data of weights is needed.

    Raises:
        UnsupportedModelError: a matrix has no whole number of blocks, or weights that multiply are no linear
            layers, such as the experts of a mixture.
    """
    model, weights = graph.model.clone(), dict(graph.weights)
    products = {str(node.inputs[1].name): node for node in model.graph if _weight(node, weights)}  # type: ignore[union-attr]
    products = {name: node for name, node in products.items() if name not in skip}
    matrices = {name: _transposed(weights[name]) for name in products}
    _check(weights, matrices, form, skip)
    work = _Pass(model.graph, weights, form, inputs or {})
    for name, node in products.items():
        work.replace_product(node, name, matrices[name])
    return TracedGraph(model, weights)


def _weight(node: ir.Node, weights: Mapping[str, StoredWeight]) -> bool:
    """Whether ``node`` is ``x · weight``; the head's is a Gemm with the rows as the embedding has them."""
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return False
    return node.inputs[1].name in weights


def _transposed(weight: StoredWeight) -> StoredWeight:
    return weight if weight.transpose else replace(weight, transpose=True, shape=weight.shape[::-1])


def _check(
    weights: Mapping[str, StoredWeight],
    matrices: Mapping[str, StoredWeight],
    form: WeightFormat,
    skip: Collection[str],
) -> None:
    others = [
        name
        for name, weight in weights.items()
        if len(weight.shape) > 1 and name not in matrices and name not in skip
    ]
    if others:
        raise UnsupportedModelError(
            "this model can't be quantised",
            found=f"{others[0]} {list(weights[others[0]].shape)}",
            expected="linear layers only; experts of a mixture and convolutions aren't supported",
            remedy="leave --quantize-drafter out if this is a drafter's, else build without quantisation",
        )
    if form.block_size is None:
        return
    inputs = {name: weight.shape[0] for name, weight in matrices.items()}
    for name, count in inputs.items():
        if count % form.block_size:
            fitting = [str(size) for size in BLOCK_SIZES if not any(n % size for n in inputs.values())]
            raise UnsupportedModelError(
                f"{name} can't be cut into blocks of {form.block_size}",
                found=f"{count} inputs",
                expected=f"a multiple of {form.block_size}",
                remedy=f"choose --quantize-block {' or '.join(fitting)}"
                if fitting
                else "build without --int4 and --int8-weight-only",
            )
