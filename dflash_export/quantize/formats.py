"""Linear layers in 4 or 8 bits: the numbers, in the standard ``QuantizeLinear``/``DequantizeLinear`` forms.

A matrix ``[in, out]`` becomes codes ``[in, out]`` and scales, and a weight is ``code * scale``; there is no
zero point, which TensorRT doesn't take. With a block size, that many consecutive inputs of one output share
a scale, ``[in / block, out]`` (``axis=0``); without one an output has a single scale, ``[out]`` (``axis=1``).
ONNX Runtime's CPU backend turns ``MatMul(x, DequantizeLinear(codes, scales, axis=0))`` with blocks into one
operator that reads the codes (tried on 1.32: int4 and int8; a ``Gemm``, or a ``Transpose`` behind the
``DequantizeLinear``, isn't turned and costs a hundred times as much).
"""

from __future__ import annotations

import torch

from dflash_export.graphs.graph import CodeType, WeightFormat

__all__ = [
    "BLOCK_SIZES",
    "dequantize",
    "pack_int4",
    "quantize",
    "round_activations",
]

# What ONNX Runtime's MatMulNBits takes.
BLOCK_SIZES = (16, 32, 64, 128, 256)

_RANGE: dict[CodeType, tuple[int, int]] = {"int4": (-8, 7), "int8": (-128, 127)}
# The largest weight of a block becomes this code, whichever of them leaves the smallest squared error. Beyond
# 7 some weights are cut to the range so that all others are rounded less; 8 suits a block whose largest
# weight is negative; 7.5 itself would round it up or down by chance. With 255 steps a choice gains nothing.
_LARGEST: dict[CodeType, tuple[float, ...]] = {
    "int4": (7.0, 7.45, 8.0, 8.5, 9.0, 10.0, 11.0),
    "int8": (127.0,),
    "fp8": (448.0,),  # the largest finite number of float8 e4m3fn
}
_AT_ONCE = 1 << 22  # weights; bounds the memory for the choice


def quantize(
    matrix: torch.Tensor,
    form: WeightFormat,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a linear layer's weight.

    Args:
        matrix: ``[out, in]`` as a checkpoint has it, floating-point; ``in`` a multiple of the block size.
        form: what to make of it.
        scale_dtype: of the scales; codes are chosen for the scales as they are stored.
        importance: float32 ``[in]``, what a squared error of each input's weights costs; default: the same.

    Returns:
        Codes ``[out, in]``, int8 in the range of the format or float8_e4m3fn, and scales
        ``[out, in / block]`` or ``[out]``.
    """
    rows = max(1, _AT_ONCE // matrix.shape[1])
    parts = [_quantize(part, form, scale_dtype, importance) for part in torch.split(matrix, rows)]
    scales = torch.cat([scales for _, scales in parts])
    return torch.cat([codes for codes, _ in parts]), scales.squeeze(-1) if form.block_size is None else scales


def _quantize(
    matrix: torch.Tensor, form: WeightFormat, scale_dtype: torch.dtype, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    size = form.block_size or matrix.shape[1]
    blocks = matrix.float().view(matrix.shape[0], -1, size)
    weights = None if importance is None else importance.view(-1, size)
    largest = blocks.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest)
    for code in _LARGEST[form.weights]:
        # A block of zeros, or of numbers too small for the scale's type, keeps the scale 1: its codes are 0.
        tried = (largest / code).to(scale_dtype).float()
        tried = torch.where(tried > 0, tried, 1.0)
        error = (_codes(blocks, tried, form.weights).float() * tried - blocks).square_()
        error = (error if weights is None else error * weights).sum(-1, keepdim=True)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    return _codes(blocks, scales, form.weights).flatten(1), scales.squeeze(-1).to(scale_dtype)


def _codes(values: torch.Tensor, scales: torch.Tensor, kind: CodeType) -> torch.Tensor:
    if kind == "fp8":
        return (values / scales).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return (values / scales).round_().clamp_(*_RANGE[kind]).to(torch.int8)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 ``[in, out]`` of stored codes ``[in, out]`` and scales ``[in / block, out]`` or ``[out]``."""
    if scales.ndim == 1:
        return codes.float() * scales.float()
    blocks = codes.float().reshape(scales.shape[0], -1, scales.shape[1])
    return (blocks * scales.float()[:, None]).flatten(0, 1)


def round_activations(values: torch.Tensor, scale: float, kind: CodeType) -> torch.Tensor:
    """What ``QuantizeLinear`` and ``DequantizeLinear`` with one scale make of activations, in their dtype."""
    if kind == "fp8":
        codes = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = (values.float() / scale).round().clamp(-128, 127)
    return (codes.float() * scale).to(values.dtype)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """uint8 of int8 codes from -8 to 7: two to a byte in memory order, the first in the low half.

    That is how ONNX stores an INT4 tensor (onnx.proto3, ``raw_data``). Their number must be even.
    """
    halves = codes.contiguous().view(-1, 2).view(torch.uint8) & 0xF
    return halves[:, 0] | (halves[:, 1] << 4)
