"""Whether an engine set fits a machine and a bundle, and the choice of the set to load."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dflash_rt.bundle.engine_sets import BuildKey, EngineSet, engine_folders, read_engines
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import EngineError

__all__ = [
    "Difference",
    "Machine",
    "built_for",
    "bundle_differences",
    "compile_command",
    "differences",
    "find_engines",
]

_AMPERE = 80  # the oldest GPU of engines that are built hardware compatible


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that runs engines. ``compute_capability``: 89 is 8.9. ``None``: no GPU was found."""

    backend: str
    backend_version: str
    gpu: str | None
    compute_capability: int | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One reason why an engine set can't be used: the part, its value in the build, the present value."""

    part: str
    built: str
    present: str

    def __str__(self) -> str:
        return f"{self.part}: built for {self.built}, present is {self.present}"


def differences(
    engines: EngineSet,
    bundle: Bundle,
    machine: Machine,
    *,
    max_seq_len: int | None = None,
    batch: int = 1,
) -> tuple[Difference, ...]:
    """Every reason why ``engines`` can't serve ``bundle`` on ``machine``; empty if they fit.

    ``max_seq_len`` and ``batch`` are the least that the caller needs. Loads nothing and opens no device.
    """
    found = [*bundle_differences(engines, bundle), *_machine_differences(engines.build, machine)]
    if max_seq_len is not None and engines.limits.max_seq_len < max_seq_len:
        found.append(Difference("max_seq_len", str(engines.limits.max_seq_len), str(max_seq_len)))
    if engines.limits.max_batch < batch:
        found.append(Difference("batch", f"at most {engines.limits.max_batch}", str(batch)))
    return tuple(found)


def bundle_differences(engines: EngineSet, bundle: Bundle) -> Iterator[Difference]:
    """Every difference between ``bundle`` and the one that ``engines`` were built from."""
    manifest = bundle.manifest
    if engines.build.precision != manifest.precision:
        yield Difference("precision", engines.build.precision, manifest.precision)
    missing = [graph for graph in manifest.graphs if graph not in engines.engines]
    if missing:
        yield Difference("graphs", ", ".join(engines.engines), f"also {', '.join(missing)}")
    sources = {path: sha for spec in engines.engines.values() for path, sha in spec.sources.items()}
    for path, sha in sorted(sources.items()):
        record = manifest.files.get(path)
        if record is None or record.sha256 != sha:
            present = "no such file" if record is None else f"sha256 {record.sha256[:12]}…"
            yield Difference(f"the bundle's {path}", f"sha256 {sha[:12]}…", present)


def _machine_differences(build: BuildKey, machine: Machine) -> Iterator[Difference]:
    if build.backend != machine.backend:
        yield Difference("backend", build.backend, machine.backend)
        return
    if not _version_fits(build, machine.backend_version):
        built = build.backend_version + (" or newer of its major version" if build.version_compatible else "")
        yield Difference(f"{build.backend} version", built, machine.backend_version)
    if machine.gpu is None or machine.compute_capability is None:
        yield Difference("GPU", built_for(build), "none")
    elif not _gpu_fits(build, machine.gpu, machine.compute_capability):
        yield Difference("GPU", built_for(build), f"{machine.gpu} (sm{machine.compute_capability})")


def _version_fits(build: BuildKey, version: str) -> bool:
    if not build.version_compatible:
        return build.backend_version == version
    built, present = _numbers(build.backend_version), _numbers(version)
    return built[:1] == present[:1] and built <= present


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _gpu_fits(build: BuildKey, gpu: str, compute_capability: int) -> bool:
    if build.hardware_compatible:
        return compute_capability >= _AMPERE
    return compute_capability in build.compute_capabilities and build.gpu in (None, gpu)


def built_for(build: BuildKey) -> str:
    """The GPUs that engines were built for, in words."""
    if build.hardware_compatible:
        return f"any GPU of sm{_AMPERE} or newer"
    capabilities = ", ".join(f"sm{number}" for number in build.compute_capabilities)
    return capabilities if build.gpu is None else f"{build.gpu} ({capabilities})"


def compile_command(
    root: Path,
    machine: Machine,
    engines: EngineSet | None = None,
    *,
    max_seq_len: int | None = None,
    batch: int = 1,
) -> str:
    """The command that builds fitting engines, with the options of ``engines`` if given."""
    words = ["dflash-export", "compile", str(root), "--backend", machine.backend]
    length = max(filter(None, (max_seq_len, engines.limits.max_seq_len if engines else None)), default=None)
    if length is not None:
        words += ["--max-seq-len", str(length)]
    batch = max(batch, engines.limits.max_batch if engines else 1)
    if batch > 1:
        words += ["--max-batch", str(batch)]
    if engines is not None and engines.build.backend == machine.backend:
        build = engines.build
        words += ["--workspace", str(build.workspace)] if build.workspace is not None else []
        words += ["--version-compatible"] if build.version_compatible else []
        words += ["--hardware-compatible"] if build.hardware_compatible else []
    if machine.backend == "tensorrt-rtx" and machine.compute_capability is not None:
        words += ["--sm", str(machine.compute_capability)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def find_engines(
    bundle: Bundle, machine: Machine, *, max_seq_len: int | None = None, batch: int = 1
) -> tuple[Path, EngineSet]:
    """The engine set to load, and its folder.

    Of several that fit it is the one with the smallest caches if ``max_seq_len`` is given, and otherwise the
    one with the largest.

    Raises:
        EngineError: there is none, or none fits. Names the differences of the closest set, the command that
            builds one that fits, and sets that can't be read.
    """
    fitting: list[tuple[Path, EngineSet]] = []
    others: list[tuple[Path, EngineSet, tuple[Difference, ...]]] = []
    broken: list[str] = []
    for folder in engine_folders(bundle):
        try:
            engines = read_engines(folder)
        except EngineError as error:
            broken.append(f"{folder.name}: {error.problem.what}")
            continue
        reasons = differences(engines, bundle, machine, max_seq_len=max_seq_len, batch=batch)
        if reasons:
            others.append((folder, engines, reasons))
        else:
            fitting.append((folder, engines))
    if fitting:  # sorted by name, and min and max take the first of several that are equal
        choose = max if max_seq_len is None else min
        return choose(fitting, key=lambda item: item[1].limits.capacity)
    raise _no_engines(bundle, machine, others, broken, max_seq_len, batch)


def _no_engines(
    bundle: Bundle,
    machine: Machine,
    others: list[tuple[Path, EngineSet, tuple[Difference, ...]]],
    broken: list[str],
    max_seq_len: int | None,
    batch: int,
) -> EngineError:
    present = f"{machine.backend} {machine.backend_version} on {machine.gpu or 'no GPU'}"
    engines: EngineSet | None = None
    if others:  # another backend's engines are never the closest
        folder, engines, reasons = min(
            others, key=lambda item: (item[1].build.backend != machine.backend, len(item[2]))
        )
        what = f"no engines of the bundle {bundle.root} fit; the closest are in {folder.name}"
        found = "; ".join(map(str, reasons))
    else:
        what, found = f"the bundle {bundle.root} has no engines for {machine.backend}", "no engine set"
    if broken:
        found += "; can't be read: " + ", ".join(broken)
    command = compile_command(bundle.root, machine, engines, max_seq_len=max_seq_len, batch=batch)
    return EngineError(what, found=found, expected=f"engines for {present}", remedy=f"run: {command}")
