"""Which files of a model folder are the checkpoint, and reading the small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dflash_export.errors import CheckpointError

__all__ = [
    "INDEX_FILE",
    "PICKLES",
    "SINGLE_FILE",
    "cannot_read",
    "damaged",
    "index_map",
    "is_file",
    "read_bytes",
    "read_json",
    "safetensors_files",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def safetensors_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that make up the checkpoint, sorted.

    Raises ``CheckpointError`` when there are none, or two sets of them.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not is_file(index):
        if is_file(single):
            return (SINGLE_FILE,)
        raise _no_weights(folder)
    shards = tuple(sorted(set(index_map(index).values())))
    if is_file(single) and shards != (SINGLE_FILE,):
        raise CheckpointError(
            "there are two sets of weights",
            found=f"{SINGLE_FILE} and an index of {len(shards)} shards, in {folder}",
            expected="one or the other",
            remedy=f"remove the stale one of {SINGLE_FILE} and {INDEX_FILE}",
        )
    return shards


def index_map(index: Path) -> dict[str, str]:
    """Tensor name to shard file name, from ``model.safetensors.index.json``.

    Raises ``CheckpointError`` when it is malformed or a shard lies outside the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(
            f"{index.name} lists no tensors",
            f"weight_map is {type(weight_map).__name__} in {index}",
            "an object of tensor name to file name",
        )
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index.name} names a file that may not be loaded",
                found=f"{shard!r} for tensor {name!r}",
                expected="the plain name of a .safetensors file in the same folder",
                remedy="get the checkpoint from a source that you trust",
            )
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise cannot_read(folder, error) from error
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    expected = f"{SINGLE_FILE}, or {INDEX_FILE} with its shards"
    if "adapter_config.json" in names:
        return CheckpointError(
            "this is an adapter, not a whole model",
            found=f"adapter_config.json in {folder}",
            expected=expected,
            remedy="merge the adapter into its base model and save that as safetensors",
        )
    if pickles:
        return CheckpointError(
            "this model has only pickled weights, and pickles are never loaded",
            found=f"{', '.join(pickles[:5])} in {folder}",
            expected=expected,
            remedy="convert the checkpoint to safetensors: load it where you trust it, save_pretrained() it",
        )
    return CheckpointError(
        "this folder holds no weights",
        found=f"{', '.join(others[:5]) or 'neither safetensors nor .gguf'} in {folder}",
        expected=expected,
        remedy="name the file itself for a .gguf target; otherwise download the whole model again",
    )


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """What to raise when the operating system doesn't let a file or a folder of a model be read."""
    return CheckpointError(
        f"{path.name} of a model can't be read",
        found=f"{path}: {error.strerror or error}",
        expected="model files that exist and that you may read",
        remedy="mend the permissions or the disk that the model lies on, or copy the model elsewhere",
    )


def damaged(
    what: str, found: object, expected: str, remedy: str = "download the file again"
) -> CheckpointError:
    """What to raise when the content of a model's file can't be used."""
    return CheckpointError(what, found=found, expected=expected, remedy=remedy)


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises CheckpointError where that can't be told."""
    try:
        return path.is_file()
    except OSError as error:
        raise cannot_read(path, error) from error


def read_bytes(path: Path) -> bytes:
    """A small file of a model. Raises CheckpointError when it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that has to hold one JSON object.

    Raises ``CheckpointError`` when it is missing, isn't JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.name} is missing",
            found=f"no such file in {path.parent}",
            expected=f"a model folder with {path.name}",
            remedy="download the model again, or name the folder that holds it",
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(
            f"{path.name} can't be read as JSON", f"{path}: {error}", "UTF-8 text holding one JSON object"
        ) from error
    if not isinstance(value, dict):
        raise damaged(
            f"{path.name} doesn't hold a JSON object", f"{path}: a {type(value).__name__}", "one JSON object"
        )
    return value
