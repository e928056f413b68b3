"""Which GPU engines are built on, and which ones they are built for."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_export.engines.devices import FP8_SINCE, Gpu, check_device, check_fp8, present_gpu
from dflash_export.engines.vendor import Vendor
from dflash_export.errors import EngineBuildError

__all__ = ["check_precision", "check_targets"]

_TURING = 75


def check_precision(precision: str, quantize: str | None) -> None:
    """Caches, activations and attention of a quantised target are in 16 bits.

    Raises:
        EngineBuildError: they would be in fp32.
    """
    if quantize is not None and precision == "fp32":
        raise EngineBuildError(
            f"no engines of a target in {quantize} with caches and activations in fp32",
            found="precision fp32",
            expected="bf16 or fp16: half the memory, and fused attention",
            remedy="build the bundle with --precision bf16",
        )


def check_targets(
    vendor: Vendor,
    device: str | None,
    compute_capabilities: Sequence[int],
    *,
    fp8: bool = False,
) -> tuple[Gpu | None, tuple[int, ...]]:
    """The GPU to build on (None: without one), and the compute capabilities to build for.

    Raises:
        EngineBuildError: the library can't build for these GPUs, or not here; or they have no FP8.
    """
    chosen = None if device is None else check_device(device, vendor.backend)
    if chosen is not None and fp8:
        check_fp8(chosen.title, chosen.compute_capability)
    if chosen is not None and compute_capabilities:
        raise EngineBuildError(
            "a device class and compute capabilities say the same thing",
            found=f"{chosen.name} and {', '.join(map(str, compute_capabilities))}",
            expected="one of them",
            remedy="leave one out",
        )
    if not vendor.needs_gpu:
        wanted = (chosen.compute_capability,) if chosen else tuple(sorted(set(compute_capabilities)))
        return None, _known_targets(vendor, wanted, fp8=fp8)
    if compute_capabilities:
        raise EngineBuildError(
            f"{vendor.backend} builds for the GPU that it runs on",
            found=f"compute capabilities {', '.join(map(str, compute_capabilities))}",
            expected="no choice",
            remedy="leave it out, or use the backend tensorrt-rtx",
        )
    gpu = present_gpu()
    if gpu is None:
        raise EngineBuildError(
            f"{vendor.backend} builds engines on the GPU that will run them",
            found="no GPU",
            expected="a CUDA device and its driver",
            remedy="compile on the machine that will run the engines, or use tensorrt-rtx",
        )
    if chosen is not None and chosen.compute_capability != gpu.compute_capability:
        raise EngineBuildError(
            f"this machine is not a {chosen.title}",
            found=f"{gpu.name} (sm{gpu.compute_capability})",
            expected=f"sm{chosen.compute_capability}",
            remedy="build on that machine; TensorRT can't build for another GPU",
        )
    if fp8:
        check_fp8(gpu.name, gpu.compute_capability)
    return gpu, (gpu.compute_capability,)


def _known_targets(vendor: Vendor, wanted: tuple[int, ...], *, fp8: bool) -> tuple[int, ...]:
    known = vendor.compute_capabilities
    unknown = [str(number) for number in wanted if number not in known]
    if unknown:
        raise EngineBuildError(
            f"{vendor.backend} {vendor.version} can't build for this GPU",
            found=", ".join(f"sm{number}" for number in unknown),
            expected=", ".join(f"sm{number}" for number in known),
            remedy="use the backend tensorrt on that machine",
        )
    # TensorRT-RTX has no fp32 products for Turing (sm75), and nearly every bundle has some: the feature
    # projection of an fp16 bundle runs in fp32.
    if fp8:
        for number in wanted:
            check_fp8(f"sm{number}", number)
    return wanted or tuple(number for number in known if number >= (FP8_SINCE if fp8 else _TURING + 1))
