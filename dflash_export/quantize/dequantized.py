"""What a quantised bundle really computes, put into a PyTorch model: the yardstick for its graphs.

Codes, scales, norms and what happens to inputs are read back from the bundle's files with onnx_ir, so that
what is compared with the graphs went through the same bytes as they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dflash_export.errors import VerifyError
from dflash_export.graphs.graph import CodeType, WeightFormat, torch_dtype
from dflash_export.quantize.calibration import CALIBRATION_FILE, Calibration, folding
from dflash_export.quantize.formats import dequantize, quantize, round_activations
from dflash_export.quantize.graph_pass import CODES, DIVISOR, SCALES
from dflash_rt.bundle.manifest import QuantizationInfo

__all__ = ["put_dequantized"]

# A code that is off by one adds a thousandth or more to the squared error of its output. What may be off
# without being wrong is a choice between two scales that are equally good.
_ERROR_FACTOR = 1.0005


@dataclass(frozen=True, eq=False)
class _Product:
    """One product of a graph. ``weight`` float32 ``[out, in]``; ``factor`` ``[in]`` multiplies its input.

    ``scales`` are as stored: ``[in / block, out]`` or ``[out]``.
    """

    name: str
    weight: torch.Tensor
    scales: torch.Tensor
    factor: torch.Tensor | None
    input_scale: float | None


def put_dequantized(model: Any, folder: Path, quantization: QuantizationInfo, *, check: bool) -> Any:
    """Make a transformers causal LM compute what the bundle in ``folder`` computes; returns it.

    Weights become ``code * scale``, norms and biases the stored ones, and inputs are divided and rounded
    where the graphs do that. Changes ``model`` in place, which holds the checkpoint. With ``check`` the
    checkpoint's own weights are quantised again, and each output's stored weights must be as near to them.

    Raises:
        VerifyError: they are not: the bundle doesn't hold these weights.
    """
    checker = _Checker(model, folder, quantization) if check else None
    graph = ir.load(folder / "target.onnx").graph
    for product in _products(graph):
        # "decoder.layers.0.self_attn.q_proj+k_proj+v_proj.weight": linear layers side by side
        names = _parameters(product.name)
        layers = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        parts = torch.split(product.weight, [layer.weight.shape[0] for layer in layers])
        if checker is not None:
            checker.require_nearest(product, names, quantization.weights, quantization.block_size)
        for name, layer, part in zip(names, layers, parts, strict=True):
            _replace(layer, part, name)
            _treat_input(layer, product, quantization.activations)
    if quantization.method in ("awq", "smoothquant"):
        _replace_vectors(model, graph)
    if quantization.head is not None:
        for product in _products(ir.load(folder / "lm_head.onnx").graph):
            block = product.weight.shape[1] // len(product.scales)
            if checker is not None:
                checker.require_nearest(product, ["lm_head.weight"], quantization.head, block)
            _replace(model.lm_head, product.weight, "lm_head")
    return model


def _parameters(name: str) -> list[str]:
    """Names in transformers of what a stored weight or bias holds side by side."""
    stem, _, leaf = name.rpartition(".")
    owner, _, joined = stem.rpartition(".")
    return [f"{owner}.{part}.{leaf}".replace("decoder.", "model.", 1) for part in joined.split("+")]


def _replace(layer: Any, weight: torch.Tensor, name: str) -> None:
    if weight.shape != layer.weight.shape:
        raise AssertionError(f"{name}: stored {tuple(weight.shape)}, loaded {tuple(layer.weight.shape)}")
    # A new parameter: the head's may be the embedding's, which isn't quantised.
    layer.weight = torch.nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def _treat_input(layer: Any, product: _Product, kind: CodeType | None) -> None:
    factor, scale = product.factor, product.input_scale
    if factor is None and scale is None:
        return

    def treat(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        values = inputs[0] if factor is None else inputs[0] * factor.to(inputs[0].dtype)
        if scale is not None and kind is not None:
            values = round_activations(values, scale, kind)
        return (values,)

    layer.register_forward_pre_hook(treat)


def _replace_vectors(model: Any, graph: ir.Graph) -> None:
    """Norms and biases as stored: they may have been divided."""
    parameters = dict(model.named_parameters())
    for name, value in graph.initializers.items():
        if not name.startswith("decoder.layers.") or not name.endswith(("layernorm.weight", "_proj.bias")):
            continue
        stored = torch.from_numpy(_numbers(value).astype(np.float32))
        targets = [parameters[each] for each in _parameters(name)]
        with torch.no_grad():
            for target, part in zip(targets, torch.split(stored, [len(t) for t in targets]), strict=True):
                target.copy_(part)


class _Checker:
    """Quantises a checkpoint again, as the build did. Use it for a layer before that layer is replaced."""

    def __init__(self, model: Any, folder: Path, quantization: QuantizationInfo) -> None:
        self._model, self._calibration = model, Calibration()
        if quantization.calibration is not None:
            self._calibration = Calibration.load(folder / CALIBRATION_FILE)
        repeats = model.config.num_attention_heads != model.config.num_key_value_heads
        self._folding = folding(self._calibration, repeats_values=repeats)

    def require_nearest(
        self, product: _Product, names: list[str], weights: CodeType, block_size: int | None
    ) -> None:
        form = WeightFormat(weights, block_size)
        original = torch.cat(
            [
                self._folding.apply(
                    name.replace("model.", "decoder.", 1), self._model.get_parameter(name).detach().float()
                )
                for name in names
            ]
        )
        layer = self._calibration.layers.get(product.name)
        cost = None if layer is None else layer.rounding_cost
        codes, scales = quantize(original, form, product.scales.dtype, cost)
        by_input = torch.ones(original.shape[1]) if cost is None else cost
        wanted = ((dequantize(codes.t(), scales.t()).T - original).square() * by_input).sum(1)
        found = ((product.weight - original).square() * by_input).sum(1)
        worse = found > _ERROR_FACTOR * wanted + 1e-12 * (original.square() * by_input).sum(1)
        if worse.any():
            blocks = "with a scale for each output" if block_size is None else f"in blocks of {block_size}"
            raise VerifyError(
                f"the bundle's {product.name} isn't the checkpoint's, quantised",
                found=f"{int(worse.sum())} of {len(worse)} outputs are further from it than rounding can be",
                expected=f"{weights} {blocks}, rounded to nearest",
                remedy="build the bundle again with `dflash-export build --force`",
            )


def _products(graph: ir.Graph) -> Iterator[_Product]:
    """The quantised products of a graph, one at a time."""
    for node in graph:
        weight = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        codes, scales = weight.inputs[:2]
        assert codes is not None
        assert scales is not None
        assert scales.dtype is not None
        stored = _floats(scales).to(torch_dtype(scales.dtype))
        matrix = dequantize(_floats(codes), stored).T.contiguous()
        name = str(codes.name).removesuffix(CODES)
        assert scales.name == name + SCALES
        yield _Product(name, matrix, stored, *_treatment(node.inputs[0]))


def _treatment(value: ir.Value | None) -> tuple[torch.Tensor | None, float | None]:
    """What an input is multiplied with, and the scale that it is rounded with."""
    scale = None
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        rounded = producer.inputs[0].producer() if producer.inputs[0] else None
        assert rounded is not None
        assert rounded.op_type == "QuantizeLinear"
        assert producer.inputs[1] is rounded.inputs[1]
        assert rounded.inputs[1] is not None
        scale = float(_floats(rounded.inputs[1]))
        producer = rounded.inputs[0].producer() if rounded.inputs[0] else None
    if producer is not None and producer.op_type == "Mul":
        factor = producer.inputs[1]
        if factor is not None and str(factor.name).endswith(DIVISOR):
            return _floats(factor), scale
    return None, scale


def _floats(value: ir.Value) -> torch.Tensor:
    return torch.from_numpy(_numbers(value).astype(np.float32))


def _numbers(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()
