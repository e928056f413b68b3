"""Calibration by nvidia-modelopt (``modelopt.torch.quantization``), in PyTorch on the CPU.

Only what modelopt finds out about inputs is used: the search for AWQ's and SmoothQuant's multipliers, and the
largest inputs. Its ONNX export needs an ONNX Runtime that lacks our operators, and weights are rounded by
:mod:`dflash_export.quantize.formats`, as they are streamed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from dflash_export.errors import RecipeError
from dflash_export.quantize.calibration import JOINED, Calibration, LayerCalibration

__all__ = ["Method", "calibrate", "load_modelopt"]

Method: TypeAlias = Literal["awq", "smoothquant", "max"]

_OFF = {"quantizer_name": "*", "enable": False}
_PER_OUTPUT = {"num_bits": 8, "axis": 0}
_PER_TENSOR: dict[Method, dict[str, Any]] = {
    "smoothquant": {"num_bits": 8, "axis": None},
    "max": {"num_bits": (4, 3), "axis": None},  # exponent and mantissa of e4m3
}


def load_modelopt() -> Any:
    """``modelopt.torch.quantization``. Raises RecipeError where it can't be imported."""
    try:
        with _quietly():
            return importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise RecipeError(
            "nvidia-modelopt, which calibrates, can't be imported",
            found=error,
            expected="nvidia-modelopt 0.47 beside PyTorch",
            remedy="pip install 'dflash-export[quantize]', or choose --int8-weight-only, which needs none",
        ) from error


def calibrate(model: Any, rows: torch.Tensor, method: Method, block_size: int | None) -> Calibration:
    """What ``rows`` (token ids ``[rows, tokens]``) tell about the linear layers of ``model``.

    ``model`` is a transformers causal LM in fp32 and is of no use afterwards: layers that read the same input
    are joined, as in the target's graph, so that they get one multiplier.
    """
    modelopt = load_modelopt()
    layers = _join(model)

    def forward(_: object = None) -> None:
        with torch.inference_mode():
            model.model(rows, use_cache=False)

    passes = 0

    def calibrating(_: object = None) -> None:
        # AWQ's second pass searches, which costs as many passes as there are candidates.
        nonlocal passes
        passes += 1
        with torch.inference_mode():
            model.model(rows[:1] if passes > 1 else rows, use_cache=False)

    squares = _mean_squares(layers, forward)
    with _quietly(), torch.no_grad():
        modelopt.quantize(model.model, _config(method, block_size), calibrating)
    found = {}
    for name, layer in layers.items():
        scale = getattr(layer.input_quantizer, "pre_quant_scale", None)
        largest = layer.input_quantizer.amax
        found[name] = LayerCalibration(
            importance=squares[name],
            multiplier=None if scale is None else 1 / scale.detach().float().flatten(),
            largest=None if largest is None else float(largest),
        )
    return Calibration(found)


def _config(method: Method, block_size: int | None) -> dict[str, Any]:
    if method == "awq":
        weights: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: block_size, "type": "static"}}
        algorithm: Any = {"method": "awq_lite", "alpha_step": 0.2}
        return {
            "quant_cfg": [_OFF, {"quantizer_name": "*weight_quantizer", "cfg": weights}],
            "algorithm": algorithm,
        }
    quantizers = [_OFF, {"quantizer_name": "*input_quantizer", "cfg": _PER_TENSOR[method]}]
    if method == "smoothquant":
        quantizers.append({"quantizer_name": "*weight_quantizer", "cfg": _PER_OUTPUT})
    return {"quant_cfg": quantizers, "algorithm": method}


class _Joined(nn.Module):
    """Linear layers side by side. The first of its parts to be called computes all of them."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        sizes = [layer.out_features for layer in layers]
        bias = layers[0].bias is not None
        self.linear = nn.Linear(layers[0].in_features, sum(sizes), bias=bias)
        self.linear.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
        if bias:
            self.linear.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
        self._sizes = sizes
        self._source: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()

    def part(self, source: torch.Tensor, index: int) -> torch.Tensor:
        if self._source is not source:
            self._source, self._parts = source, self.linear(source).split(self._sizes, -1)
        result = self._parts[index]
        if index == len(self._sizes) - 1:
            self._source, self._parts = None, ()
        return result


class _Part(nn.Module):
    def __init__(self, joined: _Joined, index: int) -> None:
        super().__init__()
        self._get: Callable[[], _Joined] = lambda: joined  # no child of this module
        self._index = index

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return self._get().part(source, self._index)


def _join(model: Any) -> dict[str, Any]:
    """Join layers in place; the products by the names that their weights have in the target's graph."""
    found: dict[str, Any] = {}
    for index, decoder_layer in enumerate(model.model.layers):
        for owner_name, names in JOINED:
            owner = decoder_layer.get_submodule(owner_name)
            layer = owner.get_submodule(names[0])
            if len(names) > 1:
                joined = _Joined([owner.get_submodule(name) for name in names])
                owner.add_module("+".join(names), joined)
                for position, name in enumerate(names):
                    setattr(owner, name, _Part(joined, position))
                layer = joined.linear
            found[f"decoder.layers.{index}.{owner_name}.{'+'.join(names)}.weight"] = layer
    return found


def _mean_squares(layers: dict[str, Any], forward: Callable[[], None]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[Any, Any], None]:
        def record(_: Any, inputs: Any) -> None:
            found[name] = inputs[0].flatten(0, -2).double().square().mean(0).float()

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    forward()
    for handle in handles:
        handle.remove()
    return found


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """It prints what it inserts, and warns of versions of transformers that we have tried."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
