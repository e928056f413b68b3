"""What ``dflash-export inspect`` says of the engine sets in a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_export.progress import SILENT, Progress
from dflash_rt import Bundle
from dflash_rt.bundle.engine_match import built_for, bundle_differences
from dflash_rt.bundle.engine_sets import EngineSet, engine_folders, read_engines
from dflash_rt.bundle.folder import hash_file
from dflash_rt.errors import EngineError

__all__ = ["EngineStatus", "inspect_engines"]


@dataclass(frozen=True)
class EngineStatus:
    """One engine set, and what keeps it from serving its bundle.

    ``engines`` is None if the set's record can't be read. ``problems`` are the same on every machine: a
    damaged set, or one of another bundle's graphs. ``changed`` are engines with another SHA-256 than the
    recorded one.
    """

    folder: str
    engines: EngineSet | None
    problems: tuple[str, ...]
    changed: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all engines."""
        return 0 if self.engines is None else sum(file.size for file in self.engines.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the record's main facts."""
        facts: dict[str, Any] = {}
        if self.engines is not None:
            build, limits = self.engines.build, self.engines.limits
            facts = {
                "backend": build.backend,
                "backend_version": build.backend_version,
                "built_for": built_for(build),
                "precision": build.precision,
                "max_seq_len": limits.max_seq_len,
                "max_batch": limits.max_batch,
                "bytes": self.total_bytes,
            }
        return {
            "folder": self.folder,
            **facts,
            "problems": list(self.problems),
            "changed": list(self.changed),
        }

    def row(self) -> tuple[str, str, str]:
        """Folder, facts and state, for people."""
        state = (
            "; ".join((*self.problems, *(f"{name} changed" for name in self.changed))) or "fits this bundle"
        )
        if self.engines is None:
            return self.folder, "", state
        build, limits = self.engines.build, self.engines.limits
        facts = (
            f"{build.backend} {build.backend_version}, {built_for(build)}, {build.precision}, "
            f"{limits.max_seq_len} tokens, batch {limits.max_batch}, {self.total_bytes / 1e6:.1f} MB"
        )
        return self.folder, facts, state


def inspect_engines(
    bundle: Bundle, *, verify_files: bool = True, progress: Progress = SILENT
) -> tuple[EngineStatus, ...]:
    """Look at every engine set of ``bundle``; with ``verify_files`` every engine is read and hashed."""
    return tuple(_inspect(bundle, folder, verify_files, progress) for folder in engine_folders(bundle))


def _inspect(bundle: Bundle, folder: Path, verify_files: bool, progress: Progress) -> EngineStatus:
    try:
        engines = read_engines(folder)
    except EngineError as error:
        problem = error.problem
        return EngineStatus(folder.name, None, (f"{problem.what}: {problem.found}",))
    problems = tuple(map(str, bundle_differences(engines, bundle)))
    changed = []
    if verify_files:
        total = sum(file.size for file in engines.files.values())
        with progress.stage(f"hashing {folder.name}", total=total) as stage:
            for file in engines.files.values():
                path = folder / file.name
                found = hash_file(path, name=file.name, progress=lambda _, size: stage.advance(size))
                if found.sha256 != file.sha256:
                    changed.append(file.name)
    return EngineStatus(folder.name, engines, problems, tuple(changed))
