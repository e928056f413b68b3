"""What text taught about the inputs of a target's linear layers, and how it is put into their weights.

For a layer ``y = W x``: ``multiplier`` m ``[in]`` turns it into ``(W m)(x / m)``, which is the same but
easier to round (AWQ, arXiv 2306.00978; SmoothQuant, arXiv 2211.10438). Dividing x costs nothing where what
makes x can be divided instead: the weight of a norm, or the rows of the layer before. Otherwise the graph
gets one ``Mul``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from dflash_export.errors import VerifyError

__all__ = ["CALIBRATION_FILE", "JOINED", "Calibration", "Folding", "LayerCalibration", "folding"]

CALIBRATION_FILE = "calibration.safetensors"

# Linear layers of one decoder layer that read the same rows: the graph has one product for them.
JOINED = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """One product of the graph.

    Attributes:
        importance: float32 ``[in]``, mean square of each input, as it is before any division.
        multiplier: float32 ``[in]``; None: all ones.
        largest: the largest absolute input after the division; None where inputs aren't quantised.
    """

    importance: torch.Tensor
    multiplier: torch.Tensor | None
    largest: float | None

    @property
    def rounding_cost(self) -> torch.Tensor:
        """float32 ``[in]``: what a squared error of the stored weights costs."""
        if self.multiplier is None:
            return self.importance
        return self.importance / self.multiplier.square()


@dataclass(frozen=True, eq=False)
class Folding:
    """Factors for parameters. ``rows[p]`` belongs to axis 0 of p; all names as in the target's graph.

    ``divided`` are products whose input must be divided in the graph.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    divided: set[str] = field(default_factory=set)

    def apply(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter with its factors, in its own dtype."""
        rows, columns = self.rows.get(parameter), self.columns.get(parameter)
        if rows is None and columns is None:
            return tensor
        result = tensor.float()
        if rows is not None:
            result = result * (rows if tensor.ndim == 1 else rows[:, None])
        if columns is not None:
            result = result * columns
        return result.to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Calibration:
    """By the name of a product's weight in the target's graph, ``decoder.layers.0.mlp.down_proj.weight``."""

    layers: Mapping[str, LayerCalibration] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to a safetensors file, so that the codes can be compared with the checkpoint.

        Raises OSError when it can't be written, where ``save_file`` has an error of its own.
        """
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.importance"] = layer.importance
            if layer.multiplier is not None:
                tensors[f"{name}.multiplier"] = layer.multiplier
            if layer.largest is not None:
                tensors[f"{name}.largest"] = torch.tensor(layer.largest)
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read such a file. Raises VerifyError if it can't be read."""
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors has an error of its own beside OSError
            raise VerifyError(
                f"{path} can't be read",
                found=str(error),
                expected="the file that was written when the bundle was quantised",
                remedy="copy the bundle again, or build it again with `dflash-export build --force`",
            ) from error
        layers = {}
        for key, importance in tensors.items():
            name, _, kind = key.rpartition(".")
            if kind == "importance":
                largest = tensors.get(f"{name}.largest")
                layers[name] = LayerCalibration(
                    importance, tensors.get(f"{name}.multiplier"), None if largest is None else float(largest)
                )
        return cls(layers)


def folding(calibration: Calibration, *, repeats_values: bool) -> Folding:
    """Where each multiplier goes.

    ``repeats_values``: several query heads share a value head, so that a row of ``v_proj`` is read through
    several columns of ``o_proj`` and can't take the factor of each.
    """
    result = Folding()
    for name, layer in calibration.layers.items():
        if layer.multiplier is None:
            continue
        owner, _, joined = name.removesuffix(".weight").rpartition(".")
        block = owner.rpartition(".")[0]
        for part in joined.split("+"):
            result.columns[f"{owner}.{part}.weight"] = layer.multiplier
        divisor = 1 / layer.multiplier
        if joined.startswith("q_proj"):
            result.rows[f"{block}.input_layernorm.weight"] = divisor
        elif joined.startswith("gate_proj"):
            result.rows[f"{block}.post_attention_layernorm.weight"] = divisor
        elif joined == "down_proj":
            result.rows[f"{owner}.up_proj.weight"] = divisor
            result.rows[f"{owner}.up_proj.bias"] = divisor
        elif joined == "o_proj" and not repeats_values:
            result.rows[f"{owner}.v_proj.weight"] = divisor
            result.rows[f"{owner}.v_proj.bias"] = divisor
        else:
            result.divided.add(name)
    return result
