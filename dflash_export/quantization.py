"""Weight-only quantisation: blocks of integers with a scale each, in the standard ``DequantizeLinear`` form.

A matrix ``[in, out]`` becomes codes ``[in, out]`` and scales ``[in / block, out]``: ``block`` consecutive
inputs of one output share a scale, and a weight is ``code * scale``. There is no zero point, which TensorRT
doesn't take. ONNX Runtime's CPU backend turns ``MatMul(x, DequantizeLinear(codes, scales, axis=0))`` into one
operator that reads the codes (tried on 1.32: int4 and int8; a ``Gemm``, or a ``Transpose`` behind the
``DequantizeLinear``, isn't turned and costs a hundred times as much).

The method is round-to-nearest. No text is needed for it; see docs/quantize.md for what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

__all__ = ["BLOCK_SIZES", "METHOD", "WeightFormat", "WeightType", "dequantize", "pack_int4", "quantize"]

WeightType: TypeAlias = Literal["int4", "int8"]

METHOD: Literal["rtn"] = "rtn"
# What ONNX Runtime's MatMulNBits takes.
BLOCK_SIZES = (16, 32, 64, 128, 256)

_RANGE: dict[WeightType, tuple[int, int]] = {"int4": (-8, 7), "int8": (-128, 127)}
# The largest weight of a block becomes this code, whichever of them leaves the smallest squared error. Beyond
# 7 some weights are cut to the range so that all others are rounded less; 8 suits a block whose largest
# weight is negative. With 255 steps nothing is gained by a choice.
_LARGEST: dict[WeightType, tuple[float, ...]] = {
    "int4": (7.0, 7.5, 8.0, 8.5, 9.0, 10.0, 11.0),
    "int8": (127.0,),
}
_AT_ONCE = 1 << 22  # weights; bounds the memory for the choice


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix is stored: the type of its codes, and how many inputs share a scale."""

    weights: WeightType
    block_size: int

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4 if self.weights == "int4" else 8


def quantize(
    matrix: torch.Tensor, form: WeightFormat, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a linear layer's weight.

    Args:
        matrix: ``[out, in]`` as a checkpoint has it, floating-point; ``in`` a multiple of the block size.
        form: what to make of it.
        scale_dtype: of the scales; codes are chosen for the scales as they are stored.

    Returns:
        int8 codes ``[out, in]`` in the range of the format, and scales ``[out, in / block]``.
    """
    rows = max(1, _AT_ONCE // matrix.shape[1])
    parts = [_quantize(part, form, scale_dtype) for part in torch.split(matrix, rows)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _quantize(
    matrix: torch.Tensor, form: WeightFormat, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = matrix.float().view(matrix.shape[0], -1, form.block_size)
    largest = blocks.abs().amax(-1, keepdim=True)
    low, high = _RANGE[form.weights]
    best = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest)
    for code in _LARGEST[form.weights]:
        # A block of zeros, or of numbers too small for the scale's type, keeps the scale 1: its codes are 0.
        tried = (largest / code).to(scale_dtype).float()
        tried = torch.where(tried > 0, tried, 1.0)
        error = (_codes(blocks, tried, low, high) * tried - blocks).square_().sum(-1, keepdim=True)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    codes = _codes(blocks, scales, low, high).to(torch.int8)
    return codes.flatten(1), scales.squeeze(-1).to(scale_dtype)


def _codes(blocks: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (blocks / scales).round_().clamp_(low, high)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 ``[in, out]`` of codes ``[in, out]`` and scales ``[in / block, out]``, as stored."""
    blocks = codes.float().reshape(scales.shape[0], -1, scales.shape[1])
    return (blocks * scales.float()[:, None]).flatten(0, 1)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """uint8 of int8 codes from -8 to 7: two to a byte in memory order, the first in the low half.

    That is how ONNX stores an INT4 tensor (onnx.proto3, ``raw_data``). Their number must be even.
    """
    halves = codes.contiguous().view(-1, 2).view(torch.uint8) & 0xF
    return halves[:, 0] | (halves[:, 1] << 4)
