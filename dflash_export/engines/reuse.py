"""Engines that are in a bundle already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dflash_export.progress import Progress
from dflash_rt import Bundle
from dflash_rt.bundle.engine_sets import (
    BuildKey,
    EngineFile,
    EngineSet,
    EngineSpec,
    engine_folders,
    read_engines,
)
from dflash_rt.bundle.folder import hash_file
from dflash_rt.errors import EngineError, OutputError

__all__ = ["link_engine", "present_set", "reusable_engines"]


def present_set(output: Path, progress: Progress) -> EngineSet | None:
    """The set if it is there and unchanged. One that is damaged is removed, to be built again."""
    if not os.path.lexists(output):
        return None
    try:
        engines = read_engines(output)
        if engines.folder == output.name and all(
            _is_unchanged(output / file.name, file, progress) for file in engines.files.values()
        ):
            return engines
    except EngineError:
        pass
    try:
        shutil.rmtree(output)
    except OSError as error:
        raise OutputError(
            f"the damaged engines in {output} can't be removed",
            found=error.strerror or error,
            expected="a writable bundle",
            remedy="remove that folder",
        ) from error
    return None


def _is_unchanged(path: Path, file: EngineFile, progress: Progress) -> bool:
    """Whether it still has its recorded SHA-256: reading it takes far less than building it."""
    with progress.stage(f"checking {file.name}", total=file.size) as stage:
        found = hash_file(path, name=file.name, progress=lambda _, size: stage.advance(size))
    return found.sha256 == file.sha256


def reusable_engines(
    bundle: Bundle, build: BuildKey, specs: Mapping[str, EngineSpec], progress: Progress
) -> dict[str, tuple[Path, EngineFile]]:
    """Engines of other sets of this bundle that have the keys that are wanted, and are unchanged."""
    wanted = {spec.digest(graph, build): graph for graph, spec in specs.items()}
    found: dict[str, tuple[Path, EngineFile]] = {}
    for folder in engine_folders(bundle):
        try:
            engines = read_engines(folder)
        except EngineError:
            continue
        for graph, spec in engines.engines.items():
            file = engines.files[graph]
            if graph in found or wanted.get(spec.digest(graph, engines.build)) != graph:
                continue
            if _is_unchanged(folder / file.name, file, progress):
                found[graph] = (folder / file.name, file)
    return found


def link_engine(source: Path, file: EngineFile, path: Path) -> EngineFile:
    """The same engine in another set; the same file where the disk can do that, as neither ever changes."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
    return EngineFile(path.name, file.size, file.sha256)
