"""The target in onnxruntime-genai's own format, made by its own builder and kept in a cache folder."""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dflash_export.publish import new_folder
from dflash_rt.errors import BackendUnavailableError, OutputError

if TYPE_CHECKING:
    from dflash_bench.systems.base import BenchSetup

__all__ = ["Precision", "genai_model", "run_builder"]

Precision: TypeAlias = Literal["fp32", "int4"]
_NAMES: dict[Precision, str] = {"fp32": "genai", "int4": "genai-int4"}


def genai_model(setup: BenchSetup, load_target: Callable[[], Any], precision: Precision = "fp32") -> Path:
    """Folder of the target in genai's own format; made from ``load_target()`` if the cache doesn't have it.

    ``int4`` is what the builder makes of it by default: in version 0.18 layers, head and embedding in blocks
    of 32, and activations rounded to 8 bits.

    Raises:
        BackendUnavailableError: genai's builder can't convert the target.
        OutputError: the cache folder can't be written.
    """
    folder = _cache_folder(setup) / f"{_NAMES[precision]}-{_key(setup)}"
    if (folder / "genai_config.json").is_file():
        return folder
    setup.say("converting the target with onnxruntime-genai's builder")
    model = load_target()
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


def _cache_folder(setup: BenchSetup) -> Path:
    if setup.cache_folder is not None:
        return setup.cache_folder
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dflash-export"


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
