"""PyTorch on the same device: plain decoding by Hugging Face, and the reference's own loop."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from dflash_bench.gpu.checkpoint import checkpoint_bytes
from dflash_bench.gpu.machine import synchronise
from dflash_bench.gpu.shapes import PairShape
from dflash_export.reference import generate_reference, reference_version

__all__ = ["HuggingFace", "Reference", "load_random_drafter", "load_random_target", "needed_bytes"]


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


class HuggingFace:
    """``generate``, one token at a time; seconds of each step by a streamer."""

    name = "hf"

    def __init__(self, target: Any) -> None:
        self._target = target

    def median_step_seconds(self, prompt: Sequence[int], steps: int) -> float:
        """Decode ``steps`` tokens after the first one; the median of their seconds."""
        device = str(self._target.device)
        clock = _Clock(device)
        input_ids = torch.tensor([list(prompt)], device=device)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=steps + 1, pad_token_id=0
        )
        self._target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=clock,
        )
        return median(clock.seconds)


class _Clock:
    """A streamer: told of the prompt first, then of each token when it is on the host."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        synchronise(self._device)
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    @property
    def seconds(self) -> list[float]:
        """Of each step; the prompt and the first token, the prefill, aren't any."""
        return [after - before for before, after in zip(self._times[1:], self._times[2:], strict=False)]


class Reference:
    """``dflash_generate`` of PyPI ``dflash``, by its own clock.

    It clips its last blocks to the tokens still wanted, so that the last of its steps are narrower than ours.
    That can only make it look faster.
    """

    name = "reference"

    def __init__(self, drafter: Any, target: Any) -> None:
        self._drafter, self._target = drafter, target

    @staticmethod
    def missing() -> str | None:
        """Why it can't run, or ``None``."""
        return None if reference_version() else "PyPI dflash isn't installed"

    def mean_step_seconds(self, prompt: Sequence[int], tokens: int) -> float:
        """Mean over the steps that it takes for ``tokens`` tokens."""
        run = generate_reference(
            self._drafter, self._target, prompt, max_new_tokens=tokens, stop_token_ids=()
        )
        return run.decode_seconds / len(run.tokens_by_step)
