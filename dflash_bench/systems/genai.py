"""Plain decoding by onnxruntime-genai."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dflash_bench.systems.base import BenchSetup, Outcome, System
from dflash_bench.systems.checkpoints import missing, require_fp32, target_model
from dflash_bench.systems.genai_model import Precision, genai_model
from dflash_rt.errors import BackendUnavailableError

__all__ = ["make_genai", "make_genai_int4"]


def make_genai(setup: BenchSetup) -> Sequence[System]:
    """onnxruntime-genai's plain decoding, on a model that its own builder makes from the same weights.

    The first time this takes a while; the model is kept in the cache folder.

    Raises:
        BackendUnavailableError: the package isn't installed, its builder fails, or the bundle isn't fp32.
        OutputError: the cache folder can't be written.
        DFlashError: the target can't be found or loaded, or isn't the one that the bundle was built from.
    """
    return _make("genai", setup, "fp32")


def make_genai_int4(setup: BenchSetup) -> Sequence[System]:
    """The same on the model that its builder makes of these weights in int4, by the builder's own defaults.

    Raises:
        As :func:`make_genai`.
    """
    return _make("genai-int4", setup, "int4")


def _make(name: str, setup: BenchSetup, precision: Precision) -> Sequence[System]:
    require_fp32(setup, name)
    try:
        library = importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        remedy = "pip install --no-deps onnxruntime-genai==0.18.0"
        raise missing(name, "onnxruntime-genai", remedy) from error
    folder = genai_model(setup, lambda: target_model(setup, name), precision)
    return [_GenAI(name, library, folder, setup)]


class _GenAI:
    """One token a call; its prefill ends with the first one."""

    num_draft_tokens = None

    def __init__(self, name: str, library: Any, folder: Path, setup: BenchSetup) -> None:
        self.name = name
        self._library = library
        self._stops = frozenset(setup.stop_token_ids)
        config = library.Config(str(folder))
        threads = {"intra_op_num_threads": setup.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        # A single id replaces the target's own stop tokens, a list adds to them; none can't be said.
        for place, stop in enumerate(setup.stop_token_ids):
            config.overlay(json.dumps({"model": {"eos_token_id": [stop] if place else stop}}))
        try:
            self._model = library.Model(config)
            self.decode([0], 2)  # its kernels refuse some head sizes, and only when they run
        except Exception as error:  # its classes share no public base
            raise BackendUnavailableError(
                "onnxruntime-genai can't run the target",
                found=" ".join(str(error).split())[:300],
                expected="a model that its kernels support",
                remedy=f"leave {name} out of --compare",
            ) from error

    def decode(self, prompt: Sequence[int], max_new_tokens: int, /) -> Outcome:
        """See :class:`~dflash_bench.systems.base.System`."""
        began = time.perf_counter()
        parameters = self._library.GeneratorParams(self._model)
        # No longer than needed: its attention costs time for every row of its caches, too.
        parameters.set_search_options(
            do_sample=False, repetition_penalty=1.0, max_length=len(prompt) + max_new_tokens
        )
        generator = self._library.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        tokens = [int(generator.get_next_tokens()[0])]
        first = last = time.perf_counter()
        while len(tokens) < max_new_tokens and tokens[-1] not in self._stops and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            last = time.perf_counter()
        return Outcome(tuple(tokens), first - began, last - first, len(tokens) - 1)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None
