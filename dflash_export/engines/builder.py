"""From one graph to one engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_export.engines.devices import Gpu
from dflash_export.engines.header import GraphHeader
from dflash_export.engines.monitor import BuildMonitor, make_logger, make_monitor
from dflash_export.engines.network import Network, parse
from dflash_export.engines.refusals import check_network, check_parsed_whole
from dflash_export.engines.timing import use_timings
from dflash_export.engines.vendor import Vendor
from dflash_export.errors import EngineBuildError
from dflash_export.progress import Progress
from dflash_rt.bundle.engine_sets import BuildKey, ProfileSpec
from dflash_rt.bundle.manifest import GraphSpec

__all__ = ["EngineJob", "build_engine", "prepare"]

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
    builder = _start(vendor, logger)
    network, parser = parse(trt, builder, logger, job.header)
    check_parsed_whole(network, job.graph)
    network.read_caches_directly()
    network.limit_attention_to_valid_rows()
    if not job.fused:
        network.allow_unfused_attention()
    check_network(network, job.graph, job.spec, job.header.shapes, fused=job.fused)
    return Prepared(logger, builder, parser, network)


def _start(vendor: Vendor, logger: Any) -> Any:
    """``trt.Builder``. Where CUDA fails the bindings raise TypeError: "factory function returned nullptr"."""
    try:
        return vendor.trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        raise EngineBuildError(
            f"{vendor.backend} can't start",
            found="; ".join(logger.errors) or error,
            expected="a working GPU and driver" if vendor.needs_gpu else "a working library",
            remedy="check the driver with nvidia-smi",
        ) from error


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
    _set_flag_if_known(trt, config, "REQUIRE_USER_ALLOCATION")
    if job.graph in _CHECKS_NUMBERS:
        _set_flag_if_known(trt, config, "STRICT_NANS")
    for index, profile in enumerate(job.profiles):
        _add_profile(config, _profile(ready, job, profile), job, index, ready.logger.errors)
    return config


def _set_flag_if_known(trt: Any, config: Any, name: str) -> None:
    """TensorRT and TensorRT-RTX, and their versions, don't have the same flags."""
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is not None:
        config.set_flag(flag)


def _add_profile(config: Any, profile: Any, job: EngineJob, index: int, errors: list[str]) -> None:
    found = config.add_optimization_profile(profile)
    if found != index:  # -1: refused
        raise EngineBuildError(
            f"no engine for {job.graph}: its profile {job.profiles[index].name} was not taken",
            found="; ".join(errors) or f"index {found}",
            expected=f"index {index}",
            remedy="report this graph, with the options that it was built with",
        )


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
