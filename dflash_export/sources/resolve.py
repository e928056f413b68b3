"""Where a model comes from: a hub id, a local folder, or a local ``.gguf`` file.

Only the files that an export reads are fetched and recorded: configuration, tokenizer and safetensors.
Pickles are never fetched or opened, and no code that lies beside a checkpoint is ever imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dflash_export.errors import CheckpointError, SourceError
from dflash_export.sources.files import (
    INDEX_FILE,
    PICKLES,
    SINGLE_FILE,
    is_file,
    safetensors_files,
)
from dflash_export.sources.gguf import GgufWeights
from dflash_export.sources.safetensors import SafetensorsWeights
from dflash_export.sources.weights import Weights
from dflash_rt.bundle.manifest import FileRecord

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Source", "open_weights", "resolve_drafter", "resolve_target"]

_METADATA_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A model on this machine's disk, and where it came from.

    ``path`` is a folder, or the file itself when ``kind`` is ``"gguf"``. ``revision`` is the commit that a
    hub id was resolved to and ``None`` for local files. ``id`` is the hub id, or the name of the folder or
    file: local paths aren't recorded, since a bundle may be published.
    """

    kind: Literal["hub", "folder", "gguf"]
    id: str
    revision: str | None
    path: Path

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        return self.path.parent if self.kind == "gguf" else self.path

    def weight_files(self) -> tuple[str, ...]:
        """Names of the files that hold tensors, sorted.

        Raises :class:`~dflash_export.errors.CheckpointError` when there are none that may be loaded.
        """
        if self.kind == "gguf":
            return (self.path.name,)
        return safetensors_files(self.path)

    def files(self) -> dict[str, FileRecord]:
        """Size and SHA-256 of every file that an export may read, by name. Reads every byte of them.

        Raises :class:`~dflash_export.errors.CheckpointError` when one can't be read.
        """
        others = () if self.kind == "gguf" else (*_METADATA_FILES, INDEX_FILE)
        present = [name for name in others if is_file(self.path / name)]
        records = {}
        for name in sorted({*present, *self.weight_files()}):
            path = self.folder / name
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
                    records[name] = FileRecord(file.tell(), digest.hexdigest())
            except OSError as error:
                raise CheckpointError(
                    f"{name} of {self.id} can't be read",
                    found=error,
                    expected="a readable file",
                    remedy="check that the file still exists and that you may read it",
                ) from error
        return records


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


def resolve_target(spec: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Find a target: an existing folder, an existing ``.gguf`` file, or a hub id ``org/name``.

    An existing local path wins over a hub id that is spelled the same. Raises
    :class:`~dflash_export.errors.SourceError` and :class:`~dflash_export.errors.CheckpointError`.
    """
    return _resolve(spec, revision, role="target", allow_gguf=True)


def resolve_drafter(spec: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Find a drafter: an existing folder or a hub id. Raises what :func:`resolve_target` raises."""
    return _resolve(spec, revision, role="drafter", allow_gguf=False)


def _resolve(spec: str | os.PathLike[str], revision: str | None, *, role: str, allow_gguf: bool) -> Source:
    text = os.fspath(spec)
    if not text.strip():
        raise SourceError(
            f"no {role} was named",
            found=repr(text),
            expected="a folder, a hub id org/name" + (", or a .gguf file" if allow_gguf else ""),
            remedy=f"name the {role}",
        )
    path = Path(text)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long; a user without a home
        raise SourceError(
            f"the {role} can't be looked for",
            found=f"{text!r:.200}: {getattr(error, 'strerror', None) or error}",
            expected="a path that you may read, or a hub id of the form org/name",
            remedy="check the spelling and the permissions of the folders on the way",
        ) from error
    if exists:
        source = _local(path, role=role, allow_gguf=allow_gguf)
        if revision is not None:
            raise SourceError(
                f"a revision can't be chosen for a local {role}",
                found=f"revision {revision!r} together with the local path {text!r}",
                expected="a revision only together with a hub id",
                remedy="leave out the revision, or name the hub id instead of the path",
            )
        return source
    if isinstance(spec, os.PathLike) or _looks_local(text):
        raise SourceError(
            f"the {role} doesn't exist",
            found=f"no file or folder at {text!r}",
            expected="an existing path",
            remedy="check the spelling; a hub id has the form org/name",
        )
    if not _HUB_ID.fullmatch(text):
        raise SourceError(
            f"the {role} is neither a path nor a hub id",
            found=repr(text),
            expected="an existing path, or a hub id of the form org/name",
            remedy="write ./NAME for a folder, or ORG/NAME for a hub id",
        )
    return _fetch(text, revision, role=role)


def _looks_local(text: str) -> bool:
    return (
        text.startswith((".", "~", os.sep))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith(("/", ".gguf", ".safetensors", *PICKLES))
    )


def _local(path: Path, *, role: str, allow_gguf: bool) -> Source:
    if path.is_dir():
        safetensors_files(path)
        return Source("folder", path.resolve().name or "model", None, path.resolve())
    if path.suffix.lower() == ".gguf" and allow_gguf:
        return Source("gguf", path.name, None, path.resolve())
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"the {role} is a pickle, and pickles are never loaded",
            found=path.name,
            expected="a folder with safetensors" + (", or a .gguf file" if allow_gguf else ""),
            remedy="convert the checkpoint to safetensors and name the folder that holds it",
        )
    raise SourceError(
        f"the {role} can't be read from this file",
        found=path.name,
        expected="a folder with safetensors" + (", or a .gguf file" if allow_gguf else "; no .gguf drafters"),
        remedy="name the folder that holds config.json and the safetensors",
    )


def _fetch(repo_id: str, revision: str | None, *, role: str) -> Source:
    """Two rounds: the index says which shards there are, so that nothing else is fetched."""
    first = _snapshot(repo_id, revision, [*_METADATA_FILES, INDEX_FILE, SINGLE_FILE], role)
    commit = first.name if _COMMIT.fullmatch(first.name) else None
    if not (first / INDEX_FILE).is_file() and not (first / SINGLE_FILE).is_file():
        raise CheckpointError(
            f"the {role} has no safetensors",
            found=f"neither {SINGLE_FILE} nor {INDEX_FILE} in {repo_id}",
            expected="weights as safetensors; pickles are never loaded",
            remedy="use a repository that has safetensors, or convert this one",
        )
    shards = safetensors_files(first)
    missing = [name for name in shards if not (first / name).is_file()]
    folder = _snapshot(repo_id, commit or revision, missing, role) if missing else first
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise CheckpointError(
            f"the {role} is incomplete",
            found=f"no {', '.join(absent[:5])} in {repo_id}",
            expected=f"all {len(shards)} files that {INDEX_FILE} lists",
            remedy="fetch the repository again while the hub can be reached, or tell its owner",
        )
    return Source("hub", repo_id, commit, folder)


def _snapshot(repo_id: str, revision: str | None, names: list[str], role: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(str(snapshot_download(repo_id, revision=revision, allow_patterns=names)))
    # The hub client raises a dozen unrelated types, some of an HTTP library that changes between its
    # releases. This block is that one call, so whatever it raises means that the model can't be fetched.
    except Exception as error:
        wanted = repo_id if revision is None else f"{repo_id} at revision {revision}"
        raise SourceError(
            f"the {role} can't be fetched",
            found=f"{wanted}: {type(error).__name__}: {_first_line(error)}",
            expected="a repository that exists, that you may read, and that can be reached",
            remedy="check the id, the revision, your login and the network, or name a local folder",
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
