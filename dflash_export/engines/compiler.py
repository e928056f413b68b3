"""From a bundle to an engine set in its ``engines/`` folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dflash_export.engines.builder import EngineJob, build_engine
from dflash_export.engines.devices import Gpu, check_precision, check_targets
from dflash_export.engines.network import data_files, load_header, read_header
from dflash_export.engines.options import EngineOptions, out_of_range
from dflash_export.engines.vendor import Vendor, has_lengths, load_vendor
from dflash_export.errors import EngineBuildError
from dflash_export.options import taking
from dflash_export.progress import SILENT, Progress
from dflash_export.publish import new_folder
from dflash_rt import Bundle
from dflash_rt.bundle.engine_sets import (
    ENGINES_NAME,
    FORMAT_VERSION,
    AxisRange,
    BuildKey,
    EngineFile,
    EngineLimits,
    EngineSet,
    EngineSpec,
    ProfileSpec,
    engine_folders,
    folder_name,
    read_engines,
)
from dflash_rt.bundle.folder import hash_file
from dflash_rt.bundle.manifest import ENGINES_FOLDER, Manifest
from dflash_rt.errors import EngineError, OutputError
from dflash_rt.files import utc_now
from dflash_rt.version import __version__

__all__ = ["CompiledEngines", "check_options", "compile_engines", "graph_profiles", "link_engine"]

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_LOCK = ".lock"


@dataclass(frozen=True)
class CompiledEngines:
    """What :func:`compile_engines` did. ``built`` and ``reused`` are names of graphs, in order.

    ``notes`` is what a user should know of these engines.
    """

    folder: Path
    engines: EngineSet
    built: tuple[str, ...]
    reused: tuple[str, ...]
    notes: tuple[str, ...] = ()


@taking(EngineOptions)
def compile_engines(options: EngineOptions) -> CompiledEngines:
    """Build the engines of a bundle, and keep them in the bundle: ``compile_engines(bundle, backend=...)``.

    The arguments are the fields of :class:`~dflash_export.engines.options.EngineOptions`. ``"tensorrt"``
    builds on the GPU that will run the engines; ``"tensorrt-rtx"`` needs no GPU. Engines whose key and
    SHA-256 are unchanged are not built again: a whole set is left as it is, a single engine is taken over
    from another set. The set appears when all of it is on disk, or not at all.

    Raises:
        BackendUnavailableError: the library isn't installed or doesn't load.
        EngineBuildError: an option is wrong, a graph would become a wrong engine, or it can't be built.
        OutputError: the bundle's folder can't be written.
        BundleError: ``bundle`` can't be used, or a file isn't the one that was recorded.
    """
    progress = options.progress or SILENT
    bundle = options.bundle if isinstance(options.bundle, Bundle) else Bundle.open(options.bundle)
    manifest, quantization = bundle.manifest, bundle.manifest.quantization
    quantize = None if quantization is None else quantization.weights
    vendor, gpu, targets = check_options(options, manifest.precision, quantize)
    limits = _limits(manifest, options)
    build = BuildKey(
        backend=vendor.backend,  # type: ignore[arg-type]  # load_vendor knows no other
        backend_version=vendor.version,
        gpu=None if gpu is None or options.hardware_compatible else gpu.name,
        compute_capabilities=targets,
        precision=manifest.precision,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        workspace=options.workspace,
        tool=f"dflash-export {__version__}",
    )
    specs = {graph: _engine_spec(bundle, graph, limits) for graph in manifest.graphs}
    output = bundle.root / ENGINES_FOLDER / folder_name(build, specs)
    with _only_builder(output.parent, progress):
        present = present_set(output, progress)
        if present is not None:
            return CompiledEngines(output, present, (), tuple(specs), _notes(vendor))
        timings = None if options.timing_folder is None else Path(options.timing_folder)
        work = _Work(vendor, bundle, build, limits, specs, gpu, timings)
        return _build_set(work, output, progress)


def check_options(
    options: EngineOptions, precision: str, quantize: str | None
) -> tuple[Vendor, Gpu | None, tuple[int, ...]]:
    """The library, the GPU to build on (None: without one) and the compute capabilities to build for.

    Asks nothing of the bundle, which needs not be there yet.

    Raises:
        BackendUnavailableError: the library isn't installed or doesn't load.
        EngineBuildError: an option can't be met.
    """
    vendor = load_vendor(options.backend)
    vendor.check_options(
        version_compatible=options.version_compatible, hardware_compatible=options.hardware_compatible
    )
    check_precision(precision, quantize)
    gpu, targets = check_targets(vendor, options.device, options.compute_capabilities, fp8=quantize == "fp8")
    return vendor, gpu, targets


@dataclass(frozen=True)
class _Work:
    vendor: Vendor
    bundle: Bundle
    build: BuildKey
    limits: EngineLimits
    specs: Mapping[str, EngineSpec]
    gpu: Gpu | None
    timing_folder: Path | None


def _limits(manifest: Manifest, options: EngineOptions) -> EngineLimits:
    longest = manifest.limits.max_seq_len
    length = longest if options.max_seq_len is None else options.max_seq_len
    if length > longest:
        raise out_of_range("max_seq_len", length, f"from 1 to {longest}, the bundle's own limit")
    # A block is written whole, beyond the last row that a request may commit.
    capacity = length + manifest.drafter.block_size
    return EngineLimits(max_seq_len=length, capacity=capacity, max_batch=options.max_batch)


def _notes(vendor: Vendor) -> tuple[str, ...]:
    if has_lengths(vendor.trt):
        return ()
    unlimited = f"{vendor.backend} {vendor.version} can't be told how much of a cache is valid"
    return (f"{unlimited}: attention costs the whole of --max-seq-len at every length; 11.4 can be told",)


def _engine_spec(bundle: Bundle, graph: str, limits: EngineLimits) -> EngineSpec:
    manifest = bundle.manifest
    spec = manifest.graphs[graph]
    folder = Path(spec.path).parent
    data = data_files(read_header(bundle.graph_path(graph)))
    names = [spec.path, *((folder / name).as_posix() for name in data)]
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise EngineBuildError(
            f"{spec.path} reads files that the bundle doesn't list",
            found=", ".join(unlisted),
            expected="files of the bundle",
            remedy="copy the bundle again, or build it again with `dflash-export build --force`",
        )
    return EngineSpec(
        sources={name: manifest.files[name].sha256 for name in sorted(names)},
        capacity=limits.capacity if spec.aliases else None,
        profiles=graph_profiles(graph, manifest, limits),
    )


@contextlib.contextmanager
def _only_builder(parent: Path, progress: Progress) -> Iterator[None]:
    """One build at a time in a bundle: the second of two equal ones then finds everything done.

    Different ones wait as well: TensorRT times kernels, and two builds would disturb each other.
    """
    try:
        parent.mkdir(exist_ok=True)
        lock = FileLock(parent / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with progress.stage("waiting for another build in this bundle"):
                lock.acquire()
    except OSError as error:
        raise OutputError(
            f"can't write to {parent}",
            found=error.strerror or error,
            expected="a writable bundle: its engines are kept in it",
            remedy="mend the permissions, or copy the bundle to where it can be written",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _build_set(work: _Work, output: Path, progress: Progress) -> CompiledEngines:
    others = reusable_engines(work.bundle, work.build, work.specs, progress)
    missing = [graph for graph in work.specs if graph not in others]
    if missing:
        with progress.stage("checking the bundle's files", total=work.bundle.total_bytes) as stage:
            work.bundle.verify_files(lambda _, amount: stage.advance(amount))
    files: dict[str, EngineFile] = {}
    with new_folder(output, force=False) as folder:
        for graph in work.specs:
            path = folder / f"{graph}.engine"
            if graph in others:
                files[graph] = link_engine(*others[graph], path)
            else:
                path.write_bytes(_build(work, graph, progress))
                record = hash_file(path)
                files[graph] = EngineFile(path.name, record.size, record.sha256)
        engines = EngineSet(
            format="dflash-engines",
            format_version=FORMAT_VERSION,
            created=utc_now(),
            build=work.build,
            limits=work.limits,
            engines=dict(work.specs),
            files=files,
        )
        (folder / ENGINES_NAME).write_text(engines.to_json(), encoding="utf-8", newline="\n")
    reused = tuple(graph for graph in work.specs if graph in others)
    return CompiledEngines(output, engines, tuple(missing), reused, _notes(work.vendor))


def _build(work: _Work, graph: str, progress: Progress) -> Any:
    bundle, spec = work.bundle, work.bundle.manifest.graphs[graph]
    dtype = _DTYPES[work.build.precision]
    header = load_header(bundle.graph_path(graph), capacity=work.limits.capacity, cache_dtype=dtype)
    profiles = work.specs[graph].profiles
    job = EngineJob(graph, spec, header, profiles, work.build, work.gpu, work.timing_folder)
    return build_engine(work.vendor, job, progress)


# Which passes each graph takes part in. The head sees a prefill's last rows only, and looking up embeddings
# depends on no size, so one profile serves it for everything. Graphs of some drafters only see blocks.
_PASSES = {
    "embed": ("prefill",),
    "target": ("prefill", "block"),
    "lm_head": ("block",),
    "inject": ("prefill", "block"),
    "draft": ("block",),
    "accept": ("block",),
    "draft_check": ("block",),
}


def graph_profiles(graph: str, manifest: Manifest, limits: EngineLimits) -> tuple[ProfileSpec, ...]:
    """The profiles of one graph, in the order of their indices in the engine.

    ``prefill`` takes 1 to prefill_chunk rows (fewer where max_seq_len is less), ``block`` 1 to block_size,
    both tuned for their maximum and for one sequence, which is what the backends decode. Plain decoding, one
    row at a time, uses ``block`` as well: a profile for exactly one row would get a second copy of every
    weight, in the layout of its own kernels. TensorRT-RTX 1.7 made the target of SmolLM2-135M in bf16 445 MB
    with it and 227 MB without.
    """
    block = manifest.drafter.block_size
    # TensorRT refuses a pass with more rows than the caches have.
    chunk = min(manifest.limits.prefill_chunk, limits.max_seq_len)
    if graph == "embed":
        chunk = max(chunk, block)  # its only profile serves blocks too
    rows = {"prefill": AxisRange(1, chunk, chunk), "block": AxisRange(1, block, block)}
    batch = AxisRange(1, 1, limits.max_batch)
    return tuple(
        ProfileSpec(name=name, batch=batch, rows=rows[name])  # type: ignore[arg-type]  # names of the table
        for name in _PASSES.get(graph, ("block",))
    )


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
