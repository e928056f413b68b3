"""Plain decoding by Hugging Face ``generate``."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dflash_bench.systems.base import BenchSetup, Outcome, System
from dflash_bench.systems.checkpoints import require_fp32, target_model, torch_threads

if TYPE_CHECKING:
    import torch

__all__ = ["HuggingFace", "make_hf"]


def make_hf(setup: BenchSetup) -> Sequence[System]:
    """Plain Hugging Face ``generate``.

    Raises:
        BackendUnavailableError: torch or transformers isn't installed, or the bundle isn't fp32.
        DFlashError: the target can't be found or loaded, or isn't the one that the bundle was built from.
    """
    require_fp32(setup, "hf")
    return [HuggingFace(target_model(setup, "hf"), setup.stop_token_ids, setup.threads)]


class HuggingFace:
    """``generate`` with a streamer, which hears of every token when it is decided.

    ``model`` is on a CPU, where ``threads`` threads compute, or on a GPU.
    """

    name = "hf"
    num_draft_tokens = None

    def __init__(self, model: Any, stop_token_ids: Sequence[int] = (), threads: int | None = None) -> None:
        self._model = model
        self._stops = list(stop_token_ids)
        self._threads = threads

    def decode(self, prompt: Sequence[int], max_new_tokens: int, /) -> Outcome:
        """See :class:`~dflash_bench.systems.base.System`."""
        import torch

        transformers: Any = importlib.import_module("transformers")  # its types are incomplete
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._stops or None,
            pad_token_id=self._stops[0] if self._stops else 0,
        )
        input_ids = torch.tensor([list(prompt)], device=self._model.device)
        clock = _TokenClock()
        with torch_threads(self._threads):
            began = time.perf_counter()
            output = self._model.generate(
                input_ids,
                # Left out, prompt tokens that equal the pad id would be taken for padding.
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                streamer=clock,
            )
        tokens = tuple(output[0, len(prompt) :].tolist())
        first, last = clock.times[0], clock.times[-1]
        seconds = tuple(b - a for a, b in zip(clock.times, clock.times[1:], strict=False))
        return Outcome(tokens, first - began, last - first, len(tokens) - 1, step_seconds=seconds)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class _TokenClock:
    """A streamer for ``generate`` that notes when each new token was on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then one token at a time, each copied to the host before."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the last token has its time already."""
