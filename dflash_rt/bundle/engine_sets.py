"""Built engines of a bundle: ``engines/<backend>-<key>/engines.json`` (docs/reference/engines.md).

A bundle's own files never change after its build, so manifest.json doesn't list engines. One folder is one
engine set: every graph of the bundle, built by one backend with one set of options. Its :class:`BuildKey` and
each engine's :class:`EngineSpec` hold everything that a build depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from dflash_rt.bundle.folder import Bundle
from dflash_rt.bundle.manifest import (
    ENGINES_FOLDER,
    Bytes,
    Count,
    FilePath,
    GraphName,
    Precision,
    Sha256,
    Text,
    UtcTime,
)
from dflash_rt.bundle.schema import (
    Bounds,
    Broken,
    Pattern,
    Problems,
    dump_json,
    load,
    parse_json,
    plain,
    shown,
)
from dflash_rt.errors import EngineError

__all__ = [
    "ENGINES_NAME",
    "AxisRange",
    "BuildKey",
    "EngineFile",
    "EngineLimits",
    "EngineSet",
    "EngineSpec",
    "ProfileSpec",
    "engine_folders",
    "folder_name",
    "read_engines",
]

ENGINES_NAME = "engines.json"
FORMAT = "dflash-engines"
FORMAT_VERSION = 1
MAX_BYTES = 2**20

EngineBackend: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
ProfileName: TypeAlias = Literal["prefill", "block"]
# Compute capability without its dot: 89 is 8.9, 120 is 12.0.
SmVersion: TypeAlias = Annotated[int, Bounds(10, 9999)]
EngineFileName: TypeAlias = Annotated[str, Pattern(r"[a-z_]{1,64}\.engine", "a name like target.engine")]

_REMEDY = "build the engines again with `dflash-export compile`; engines.json isn't meant to be edited"


@dataclass(frozen=True, slots=True)
class AxisRange:
    """Smallest and largest size of an axis in a profile, and ``opt``, the size that it is tuned for."""

    min: Count
    opt: Count
    max: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSpec:
    """One optimization profile. Its index in the engine is its place in the list."""

    name: ProfileName
    batch: AxisRange
    rows: AxisRange


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildKey:
    """Everything that all engines of a set share.

    ``gpu`` is the GPU that they were built on and for; null for engines that run on every GPU of their
    ``compute_capabilities`` (89 means 8.9). ``workspace`` is the builder's limit in bytes, null for its
    default.
    """

    backend: EngineBackend
    backend_version: Text
    gpu: Text | None
    compute_capabilities: tuple[SmVersion, ...]
    precision: Precision
    version_compatible: bool
    hardware_compatible: bool
    workspace: Bytes | None
    tool: Text


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine's file in its set's folder."""

    name: EngineFileName
    size: Bytes
    sha256: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Inputs of one engine's build: files of the bundle by SHA-256, rows of its caches, profiles."""

    sources: Mapping[FilePath, Sha256]
    capacity: Count | None
    profiles: tuple[ProfileSpec, ...]

    def digest(self, graph: str, build: BuildKey) -> str:
        """SHA-256 of everything that this engine depends on."""
        text = json.dumps([graph, plain(build), plain(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """``max_seq_len``: prompt and output tokens. ``capacity``: rows of a cache. ``max_batch``: sequences."""

    max_seq_len: Count
    capacity: Count
    max_batch: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSet:
    """A whole engines.json."""

    format: Literal["dflash-engines"]
    format_version: Annotated[int, Bounds(FORMAT_VERSION, FORMAT_VERSION)]
    created: UtcTime
    build: BuildKey
    limits: EngineLimits
    engines: Mapping[GraphName, EngineSpec]
    files: Mapping[GraphName, EngineFile]

    @classmethod
    def from_json(cls, text: str) -> EngineSet:
        """Read and check a record. Raises EngineError naming every problem."""
        document = parse_json(text, ENGINES_NAME, _REMEDY, EngineError, max_bytes=MAX_BYTES)
        _check_version(document)
        return load(cls, document, Problems(ENGINES_NAME, _REMEDY, EngineError), _broken_rules)

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads back as an equal record, or EngineError."""
        text = dump_json(plain(self)) + "\n"
        EngineSet.from_json(text)
        return text

    @property
    def folder(self) -> str:
        """Name of this set's folder in the bundle: the backend and the start of a hash over all keys."""
        return folder_name(self.build, self.engines)


def folder_name(build: BuildKey, engines: Mapping[str, EngineSpec]) -> str:
    """See :attr:`EngineSet.folder`; can be computed before a build."""
    digests = sorted(spec.digest(graph, build) for graph, spec in engines.items())
    return f"{build.backend}-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}"


def _check_version(document: Any) -> None:
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise EngineError(
            f"{ENGINES_NAME} has a format version that this package can't read",
            found=f"format_version {shown(version)}, which is newer",
            expected=f"format_version {FORMAT_VERSION}",
            remedy="upgrade dflash_rt, or build the engines again with `dflash-export compile`",
        )


def _broken_rules(engines: EngineSet) -> Iterator[Broken]:
    """Rules between fields."""
    if engines.files.keys() != engines.engines.keys():
        yield "files", ", ".join(engines.files), "one file for each of engines"
    if not engines.build.compute_capabilities:
        yield "build.compute_capabilities", "an empty list", "at least one"
    for graph, spec in engines.engines.items():
        if spec.capacity not in (None, engines.limits.capacity):
            expected = f"{engines.limits.capacity} or null"
            yield f"engines.{graph}.capacity", str(spec.capacity), expected
        if not spec.profiles:
            yield f"engines.{graph}.profiles", "an empty list", "at least one"
        for i, profile in enumerate(spec.profiles):
            for axis, sizes in (("batch", profile.batch), ("rows", profile.rows)):
                if not sizes.min <= sizes.opt <= sizes.max:
                    where = f"engines.{graph}.profiles[{i}].{axis}"
                    yield where, f"{sizes.min}, {sizes.opt}, {sizes.max}", "min <= opt <= max"


def read_engines(folder: Path) -> EngineSet:
    """The set in ``folder``, once its files are known to exist with the recorded sizes.

    Raises:
        EngineError: engines.json is missing or malformed, or a file is missing or has another size.
    """
    path = folder / ENGINES_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
        engines = EngineSet.from_json(text)
        wrong = [f"{file.name}: {found}" for file, found in _file_problems(folder, engines)]
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(
            f"{path} can't be read", found=error, expected="the record of an engine set", remedy=_REMEDY
        ) from error
    if wrong:
        raise EngineError(
            f"the engines in {folder} differ from {ENGINES_NAME}",
            found="; ".join(wrong),
            expected="every engine, unchanged, inside the folder",
            remedy="build the engines again with `dflash-export compile`",
        )
    return engines


def _file_problems(folder: Path, engines: EngineSet) -> Iterator[tuple[EngineFile, str]]:
    for file in engines.files.values():
        path = folder / file.name
        if path.is_symlink() or not path.is_file():
            yield file, "missing, or not a regular file"
        elif path.stat().st_size != file.size:
            yield file, f"{path.stat().st_size} bytes instead of {file.size}"


def engine_folders(bundle: Bundle) -> tuple[Path, ...]:
    """Folders of all engine sets of a bundle, sorted, without hidden (unfinished) ones."""
    parent = bundle.root / ENGINES_FOLDER
    try:
        entries = sorted(os.listdir(parent))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise EngineError(
            f"{parent} can't be read",
            found=error.strerror,
            expected="a folder",
            remedy="check its permissions",
        ) from error
    return tuple(parent / name for name in entries if not name.startswith(".") and (parent / name).is_dir())
