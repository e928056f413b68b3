"""Which GPU is here, and which ones engines are built for: by compute capability or by device class."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass

from dflash_export.engines.vendor import Vendor
from dflash_export.errors import EngineBuildError

__all__ = ["DEVICE_CLASSES", "Gpu", "check_fp8", "check_precision", "check_targets", "present_gpu"]

# CUdevice_attribute of the driver API.
_MAJOR, _MINOR = 75, 76
_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True)
class DeviceClass:
    """A kind of machine: its compute capability (89 is 8.9), and the libraries that run on it."""

    name: str
    title: str
    compute_capability: int
    backends: tuple[str, ...]


_TURING = 75
FP8_SINCE = 89  # Ada; kernels for it can't even be compiled for an older GPU
DEVICE_CLASSES = {
    device.name: device
    for device in (
        DeviceClass("rtx-4090", "GeForce RTX 4090 (Ada)", 89, ("tensorrt", "tensorrt-rtx")),
        DeviceClass("h100", "H100, H200 (Hopper)", 90, ("tensorrt",)),
        DeviceClass("jetson-thor", "Jetson Thor (Blackwell)", 110, ("tensorrt",)),
        DeviceClass("jetson-orin", "Jetson Orin (Ampere)", 87, ("tensorrt",)),
    )
}


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU: its name and compute capability (89 is 8.9)."""

    name: str
    compute_capability: int


def present_gpu() -> Gpu | None:
    """The GPU that the CUDA driver counts first, or None without a driver or a device.

    Asks the driver itself, so that no CUDA package is needed to build.
    """
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    succeeded = (
        cuda.cuInit(0) == 0
        and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
        and cuda.cuDeviceGetName(name, len(name), device) == 0
        and cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device) == 0
        and cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device) == 0
    )
    if not succeeded:
        return None
    return Gpu(name.value.decode("utf-8", "replace"), 10 * major.value + minor.value)


def check_device(name: str, backend: str) -> DeviceClass:
    """The device class called ``name``.

    Raises:
        EngineBuildError: there is none, or it can't run engines of this backend.
    """
    device = DEVICE_CLASSES.get(name)
    if device is None:
        raise EngineBuildError(
            "unknown device class",
            found=name,
            expected=", ".join(DEVICE_CLASSES),
            remedy="choose one of these, or give --sm with the GPU's compute capability",
        )
    if backend not in device.backends:
        raise EngineBuildError(
            f"{device.title} can't run engines of {backend}",
            found=backend,
            expected=", ".join(device.backends),
            remedy=f"choose --backend {device.backends[0]}",
        )
    return device


def check_fp8(name: str, compute_capability: int) -> None:
    """Refuse FP8 for a GPU without it.

    Raises:
        EngineBuildError: ``compute_capability`` is too low.
    """
    if compute_capability < FP8_SINCE:
        raise EngineBuildError(
            f"{name} has no FP8",
            found=f"compute capability {compute_capability // 10}.{compute_capability % 10}",
            expected="8.9 (Ada) or newer",
            remedy="build the bundle with --int8 or --int4 instead of --fp8",
        )


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
    unknown = [number for number in wanted if number not in known]
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
