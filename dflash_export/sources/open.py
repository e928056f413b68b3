"""Opening a checkpoint, whatever it is stored as."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dflash_export.sources.gguf import GgufWeights
from dflash_export.sources.resolve import Source
from dflash_export.sources.safetensors import SafetensorsWeights
from dflash_export.sources.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["open_weights"]


def open_weights(source: Source, config: PreTrainedConfig | None = None) -> Weights:
    """Open a checkpoint and check all of its headers and sizes; no tensor data is read.

    ``config`` is needed for a GGUF file, whose names depend on it. Raises
    :class:`~dflash_export.errors.CheckpointError`, and :class:`~dflash_export.errors.UnsupportedModelError`
    for a GGUF file that says things transformers doesn't read.
    """
    if source.kind != "gguf":
        return SafetensorsWeights(source.path, source.weight_files())
    if config is None:
        raise TypeError("a GGUF file is opened with the config that it holds: load_target_config(source)")
    return GgufWeights(source.path, config)
