"""The weights that a quantised bundle really has, put into a PyTorch model: the yardstick for its graphs.

The codes are read back from the bundle's files with onnx_ir, so that what is compared with the graphs went
through the same bytes as they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dflash_rt.errors import VerifyError
from dflash_rt.manifest import QuantizationInfo

from .quantization import WeightFormat, dequantize, quantize
from .quantize_pass import CODES, SCALES

__all__ = ["put_dequantized"]

# A code that is off by one adds a thousandth or more to the squared error of its output. What may be off
# without being wrong is a choice between two scales that are equally good.
_ERROR_FACTOR = 1.0005


def put_dequantized(model: Any, folder: Path, quantization: QuantizationInfo, *, check: bool) -> Any:
    """Replace the linear layers of a transformers causal LM by what ``code * scale`` gives; returns it.

    ``folder`` is a bundle's, and holds ``target.onnx`` and ``lm_head.onnx``. Changes ``model`` in place. With
    ``check`` the model's own weights are quantised again, and each output's stored weights must be as near
    to them.

    Raises:
        VerifyError: they are not: the bundle doesn't hold these weights.
    """
    form = WeightFormat(quantization.weights, quantization.block_size)
    for name, weight, scale_dtype in _dequantized(folder / "target.onnx"):
        # "decoder.layers.0.self_attn.q_proj+k_proj+v_proj.weight": linear layers side by side
        owner, _, joined = name.removesuffix(".weight").rpartition(".")
        names = [f"{owner}.{part}".replace("decoder.", "model.", 1) for part in joined.split("+")]
        layers = [model.get_submodule(name) for name in names]
        parts = torch.split(weight, [layer.weight.shape[0] for layer in layers])
        for layer_name, layer, part in zip(names, layers, parts, strict=True):
            _replace(layer, part, layer_name, form if check else None, scale_dtype)
    if quantization.head is not None:
        form = WeightFormat(quantization.head, quantization.block_size)
        for _, weight, scale_dtype in _dequantized(folder / "lm_head.onnx"):
            _replace(model.lm_head, weight, "lm_head", form if check else None, scale_dtype)
    return model


def _replace(
    layer: Any, weight: torch.Tensor, name: str, form: WeightFormat | None, scale_dtype: torch.dtype
) -> None:
    if weight.shape != layer.weight.shape:
        raise AssertionError(f"{name}: stored {tuple(weight.shape)}, loaded {tuple(layer.weight.shape)}")
    if form is not None:
        _require_nearest(layer.weight.detach().float(), weight, name, form, scale_dtype)
    # A new parameter: the head's may be the embedding's, which isn't quantised.
    layer.weight = torch.nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def _require_nearest(
    original: torch.Tensor, stored: torch.Tensor, name: str, form: WeightFormat, scale_dtype: torch.dtype
) -> None:
    codes, scales = quantize(original, form, scale_dtype)
    wanted = (dequantize(codes.T, scales.T).T - original).square().sum(1)
    found = (stored - original).square().sum(1)
    worse = found > _ERROR_FACTOR * wanted + 1e-12 * original.square().sum(1)
    if worse.any():
        raise VerifyError(
            f"the bundle's {name} isn't the checkpoint's, quantised",
            found=f"{int(worse.sum())} of {len(worse)} outputs are further from it than rounding explains",
            expected=f"{form.weights} in blocks of {form.block_size}, rounded to nearest",
            todo="build the bundle again with `dflash-export build --force`",
        )


def _dequantized(path: Path) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Names, float32 ``[out, in]`` and types of scale of a graph's quantised weights, one at a time."""
    initializers = ir.load(path).graph.initializers
    for name in initializers:
        if name.endswith(CODES):
            codes = _numbers(initializers[name]).astype(np.int8)
            value = initializers[name.removesuffix(CODES) + SCALES]
            weight = dequantize(torch.from_numpy(codes), torch.from_numpy(_numbers(value).astype(np.float32)))
            assert value.dtype is not None
            yield name.removesuffix(CODES), weight.T.contiguous(), _SCALE_DTYPES[value.dtype]


_SCALE_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def _numbers(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()
