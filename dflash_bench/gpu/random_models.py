"""PyTorch's models of a shape, with random weights drawn on the device."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from dflash_bench.gpu.checkpoint import checkpoint_bytes
from dflash_bench.gpu.shapes import PairShape

__all__ = ["load_random_drafter", "load_random_target", "needed_bytes"]


def load_random_target(shape: PairShape, dtype: torch.dtype, device: str) -> Any:
    """The target's module with weights drawn on the device; for its speed, not for its tokens."""
    with torch.device(device):
        config = Qwen3Config(**shape.target_config())
        model: Any = Qwen3ForCausalLM._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return model.eval()


def load_random_drafter(shape: PairShape, dtype: torch.dtype, device: str) -> Any:
    """The reference's own drafter module, likewise."""
    module = importlib.import_module("dflash.model")
    # Through JSON, as from a file: the reference reads values of the config by name.
    config = Qwen3Config(**json.loads(json.dumps(shape.drafter_config())))
    with torch.device(device):
        return module.DFlashDraftModel(config).to(dtype).eval()


def needed_bytes(shape: PairShape, dtype: torch.dtype) -> int:
    """Memory that both models take, with a fifth more for caches and activations."""
    return checkpoint_bytes(shape, dtype) * 6 // 5
