"""Plain decoding by onnxruntime-genai, of the target as its own builder converts it."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from dflash_bench.systems.base import BenchSetup, Outcome, System, missing, require_fp32
from dflash_bench.systems.pytorch import target_model
from dflash_export.publish import new_folder
from dflash_rt.errors import BackendUnavailableError, OutputError

__all__ = ["make_genai", "make_genai_int4", "run_builder"]

Precision: TypeAlias = Literal["fp32", "int4"]
_NAMES: dict[Precision, str] = {"fp32": "genai", "int4": "genai-int4"}


def make_genai(setup: BenchSetup) -> Sequence[System]:
    """onnxruntime-genai's plain decoding, on a model that its own builder makes from the same weights.

    The first time this takes a while; the model is kept in the cache folder.

    Raises:
        BackendUnavailableError: the package isn't installed, its builder fails, or the bundle isn't fp32.
        OutputError: the cache folder can't be written.
        DFlashError: the target can't be found or loaded, or isn't the one that the bundle was built from.
    """
    return _make(setup, "fp32")


def make_genai_int4(setup: BenchSetup) -> Sequence[System]:
    """The same on the model that its builder makes of these weights in int4, by the builder's own defaults.

    Raises:
        As :func:`make_genai`.
    """
    return _make(setup, "int4")


def _make(setup: BenchSetup, precision: Precision) -> Sequence[System]:
    name = _NAMES[precision]
    require_fp32(setup, name)
    try:
        library = importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        remedy = "pip install --no-deps onnxruntime-genai==0.18.0"
        raise missing(name, "onnxruntime-genai", remedy) from error
    folder = _model_folder(setup, precision)
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


def _model_folder(setup: BenchSetup, precision: Precision) -> Path:
    """Folder of the target in genai's own format; made if the cache doesn't have it.

    ``int4`` is what the builder makes of it by default: in version 0.18 layers, head and embedding in blocks
    of 32, and activations rounded to 8 bits.

    Raises:
        BackendUnavailableError: genai's builder can't convert the target.
        OutputError: the cache folder can't be written.
    """
    caches = os.environ.get("XDG_CACHE_HOME")
    cache = setup.cache_folder or Path(caches or Path.home() / ".cache") / "dflash-export"
    folder = cache / f"{_NAMES[precision]}-{_key(setup)}"
    if (folder / "genai_config.json").is_file():
        return folder
    setup.say("converting the target with onnxruntime-genai's builder")
    model = target_model(setup, _NAMES[precision])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.hf-") as checkpoint:
            _save_checkpoint(model, Path(checkpoint))
            with new_folder(folder, force=False) as output:
                run_builder(Path(checkpoint), output, precision)
    except OSError as error:
        raise OutputError(
            f"can't write {folder}",
            found=error.strerror or error,
            expected="a writable folder with room for two copies of the target",
            remedy="free disk space, or name another folder with --cache-folder",
        ) from error
    return folder


def _key(setup: BenchSetup) -> str:
    """Changes with the target's files and with the package that converts them."""
    files = setup.bundle.manifest.target.source.files
    facts = [
        version("onnxruntime-genai"),
        *(f"{name} {record.sha256}" for name, record in sorted(files.items())),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _save_checkpoint(model: Any, folder: Path) -> None:
    """Save a model, however transformers loaded it, as a checkpoint that genai's builder takes.

    The builder insists on a tokenizer. Ids go in and come out here, so any will do.
    """
    import torch
    from tokenizers import Tokenizer, models

    from dflash_export.reference import _quiet_transformers

    config = copy.deepcopy(model.config)
    # A model that came from GGUF still calls itself quantised, and would refuse to be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    transformers = importlib.import_module("transformers")
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with _quiet_transformers():
        plain.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
            folder
        )


def run_builder(checkpoint: Path, output: Path, precision: Precision = "fp32") -> None:
    """In a process of its own, since it changes the import path; without a network, since all is here."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"]
    command += ["-i", str(checkpoint), "-o", str(output), "-c", str(checkpoint / "cache")]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not (output / "genai_config.json").is_file():
        lines = done.stderr.strip().splitlines()
        raise BackendUnavailableError(
            "onnxruntime-genai's builder can't convert the target",
            found=lines[-1] if lines else f"exit code {done.returncode}",
            expected=f"a target that onnxruntime-genai {version('onnxruntime-genai')} knows",
            remedy=f"leave {_NAMES[precision]} out of --compare",
        )
