"""From one graph to one engine: its network, configuration and kernel timings, and how far the build is."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from dflash_export.engines.devices import Gpu
from dflash_export.engines.network import GraphHeader, Network, parse
from dflash_export.engines.refusals import check_network, check_parsed_whole
from dflash_export.engines.vendor import Vendor
from dflash_export.errors import EngineBuildError
from dflash_export.progress import Progress, Stage
from dflash_rt.bundle.engine_sets import BuildKey, ProfileSpec
from dflash_rt.bundle.manifest import GraphSpec
from dflash_rt.files import write_atomically

__all__ = ["BuildMonitor", "EngineJob", "build_engine", "make_logger", "prepare"]

# Graphs that ask whether numbers are finite: 0 * x must not become 0 there, nor x - x.
_CHECKS_NUMBERS = ("accept", "draft_check")


@dataclass(frozen=True)
class EngineJob:
    """One engine to build. ``gpu`` is where TensorRT times its kernels; None for TensorRT-RTX."""

    graph: str
    spec: GraphSpec
    header: GraphHeader
    profiles: tuple[ProfileSpec, ...]
    build: BuildKey
    gpu: Gpu | None = None
    timing_folder: Path | None = None

    @property
    def fused(self) -> bool:
        """Fused attention exists in 16 bits only, and is required there."""
        return self.build.precision != "fp32"


@dataclass(frozen=True)
class Prepared:
    """A checked network with all that has to live until it is built."""

    logger: Any
    builder: Any
    parser: Any
    network: Network


def prepare(vendor: Vendor, job: EngineJob) -> Prepared:
    """Parse, edit and check. Raises EngineBuildError for what must not become an engine."""
    trt = vendor.trt
    logger = make_logger(trt)
    try:
        builder = trt.Builder(logger)
    except (
        TypeError,
        RuntimeError,
    ) as error:  # TypeError where CUDA fails: "factory function returned nullptr"
        raise EngineBuildError(
            f"{vendor.backend} can't start",
            found="; ".join(logger.errors) or error,
            expected="a working GPU and driver" if vendor.needs_gpu else "a working library",
            remedy="check the driver with nvidia-smi",
        ) from error
    network, parser = parse(trt, builder, logger, job.header)
    check_parsed_whole(network, job.graph)
    network.read_caches_directly()
    network.limit_attention_to_valid_rows()
    if not job.fused:
        network.allow_unfused_attention()
    check_network(network, job.graph, job.spec, job.header.shapes, fused=job.fused)
    return Prepared(logger, builder, parser, network)


def build_engine(vendor: Vendor, job: EngineJob, progress: Progress) -> Any:
    """The serialized engine, as a buffer.

    Raises:
        EngineBuildError: the network is refused, or the library can't build it.
    """
    ready = prepare(vendor, job)
    config = _configure(vendor, job, ready)
    with progress.stage(f"building {job.graph}", total=1.0) as stage:
        monitor = BuildMonitor(stage)
        listener = make_monitor(vendor.trt, monitor)
        config.progress_monitor = listener
        with use_timings(config, vendor, job.gpu, job.timing_folder):
            plan = ready.builder.build_serialized_network(ready.network.definition, config)
        if monitor.cancelled:
            raise KeyboardInterrupt
        if plan is None:
            raise _failed(job, ready.logger.errors)
    return plan


def _configure(vendor: Vendor, job: EngineJob, ready: Prepared) -> Any:
    trt, build = vendor.trt, job.build
    config = ready.builder.create_builder_config()
    # fp32 means fp32: parity with PyTorch is promised for it.
    config.clear_flag(trt.BuilderFlag.TF32)
    if build.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace)
    if build.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if build.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if vendor.compute_capabilities:
        config.num_compute_capabilities = len(build.compute_capabilities)
        for index, number in enumerate(build.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)
    # So that a step can be captured: without it TensorRT-RTX may allocate while it runs.
    flags = ["REQUIRE_USER_ALLOCATION", *(["STRICT_NANS"] if job.graph in _CHECKS_NUMBERS else [])]
    for flag in flags:
        if hasattr(trt.BuilderFlag, flag):  # the two libraries, and their versions, don't have the same
            config.set_flag(getattr(trt.BuilderFlag, flag))
    for index, profile in enumerate(job.profiles):
        found = config.add_optimization_profile(_profile(ready, job, profile))
        if found != index:  # -1: refused
            raise EngineBuildError(
                f"no engine for {job.graph}: its profile {profile.name} was not taken",
                found="; ".join(ready.logger.errors) or f"index {found}",
                expected=f"index {index}",
                remedy="report this graph, with the options that it was built with",
            )
    return config


def _profile(ready: Prepared, job: EngineJob, profile: ProfileSpec) -> Any:
    made = ready.builder.create_optimization_profile()
    for tensor in ready.network.inputs:
        axes = job.header.shapes[tensor.name]
        if any(isinstance(axis, str) for axis in axes):
            sizes = [
                [getattr(getattr(profile, axis), bound) if isinstance(axis, str) else axis for axis in axes]
                for bound in ("min", "opt", "max")
            ]
            made.set_shape(tensor.name, *sizes)
    return made


def _failed(job: EngineJob, errors: list[str]) -> EngineBuildError:
    text = "; ".join(errors) or "no message"
    if "is_decomposable" in text:
        return EngineBuildError(
            f"no engine for {job.graph}: its attention has no fused kernel in {job.build.precision}",
            found=text,
            expected="a head size that is fused, such as 64, 128 or 256",
            remedy="build the bundle in fp32, or use another backend",
        )
    return EngineBuildError(
        f"the engine for {job.graph} can't be built",
        found=text,
        expected="a network that this version of the library compiles",
        remedy="try a newer version of the library, more --workspace, or report this graph",
    )


def default_timing_folder() -> Path:
    """``$XDG_CACHE_HOME/dflash-export/timings``, by default below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "dflash-export" / "timings"


def timing_path(folder: Path, vendor: Vendor, gpu: Gpu) -> Path:
    """Where the timings of one library version and GPU are."""
    name = f"{vendor.backend}-{vendor.version}-{gpu.name}-sm{gpu.compute_capability}"
    return folder / (re.sub(r"[^A-Za-z0-9.-]+", "-", name) + ".timings")


@contextlib.contextmanager
def use_timings(config: Any, vendor: Vendor, gpu: Gpu | None, folder: Path | None) -> Iterator[None]:
    """While open, ``config`` builds with the kept timings; new ones are added to them at the end.

    A cache that can't be read or written is only slower, so it never fails a build.
    """
    if gpu is None or not vendor.needs_gpu:  # the timing cache of TensorRT-RTX is a deprecated no-op
        yield
        return
    path = timing_path(folder or default_timing_folder(), vendor, gpu)
    cache = config.create_timing_cache(_read_timings(path))
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            # Another build may have added its own meanwhile.
            others = config.create_timing_cache(_read_timings(path))
            if others is not None:
                cache.combine(others, True)
            write_atomically(path, bytes(cache.serialize()))


def _read_timings(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


_KEPT = 20


def make_logger(trt: ModuleType) -> Any:
    """A ``trt.ILogger`` that keeps the last errors in ``.errors`` and prints nothing."""

    class _Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors = [*self.errors[1 - _KEPT :], message]

    return _Logger()


class BuildMonitor:
    """Turns the phases of a build into one fraction between 0 and 1.

    Phases are nested: a phase of n steps is as far as the steps that it finished, plus the share of the step
    that its furthest child is in. Called from several threads.
    """

    def __init__(self, stage: Stage) -> None:
        self.cancelled = False
        self._stage = stage
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._told = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> bool:
        """Step ``step`` (from 0) of a phase is done. False asks the builder to stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = max(self._phases[name].done, step + 1)
                fraction = self._furthest(None)
                if fraction > self._told:
                    self._stage.advance(fraction - self._told)
                    self._told = fraction
        return not self.cancelled

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(name, None)

    def _furthest(self, parent: str | None) -> float:
        """How far the furthest of the phases in ``parent`` is."""
        children = [(name, phase) for name, phase in self._phases.items() if phase.parent == parent]
        return max(
            (min((phase.done + self._furthest(name)) / phase.steps, 1.0) for name, phase in children),
            default=0.0,
        )


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


def make_monitor(trt: ModuleType, monitor: BuildMonitor) -> Any:
    """``monitor`` as the library wants it. An interrupt stops the build instead of passing through C++."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                monitor.start(phase_name, parent_phase, num_steps)
            except KeyboardInterrupt:
                monitor.cancelled = True

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return monitor.step(phase_name, step)
            except KeyboardInterrupt:
                monitor.cancelled = True
                return False

        def phase_finish(self, phase_name: str) -> None:
            try:
                monitor.finish(phase_name)
            except KeyboardInterrupt:
                monitor.cancelled = True

    return _Monitor()
