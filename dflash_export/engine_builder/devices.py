"""Which GPU is here, and the device classes that engines can be built for by name."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from dflash_rt.errors import EngineBuildError

__all__ = ["DEVICE_CLASSES", "FP8_SINCE", "DeviceClass", "Gpu", "check_device", "check_fp8", "present_gpu"]

# CUdevice_attribute of the driver API.
_MAJOR, _MINOR = 75, 76
_DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class DeviceClass:
    """A kind of machine: its compute capability (89 is 8.9), and what runs on it.

    ``precisions`` are those that its tensor cores compute in; others would only be slow.
    """

    name: str
    title: str
    compute_capability: int
    backends: tuple[str, ...]
    precisions: tuple[str, ...]

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores compute in FP8."""
        return self.compute_capability >= FP8_SINCE


FP8_SINCE = 89  # Ada; kernels for it can't even be compiled for an older GPU
_ALL = ("fp32", "fp16", "bf16")
DEVICE_CLASSES = {
    device.name: device
    for device in (
        DeviceClass("rtx-4090", "GeForce RTX 4090 (Ada)", 89, ("tensorrt", "tensorrt-rtx"), _ALL),
        DeviceClass("h100", "H100, H200 (Hopper)", 90, ("tensorrt",), _ALL),
        DeviceClass("jetson-thor", "Jetson Thor (Blackwell)", 110, ("tensorrt",), _ALL),
        DeviceClass("jetson-orin", "Jetson Orin (Ampere)", 87, ("tensorrt",), _ALL),
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


def check_device(name: str, backend: str, precision: str) -> DeviceClass:
    """The device class called ``name``.

    Raises:
        EngineBuildError: there is none, or it can't run engines of this backend or precision.
    """
    device = DEVICE_CLASSES.get(name)
    if device is None:
        raise EngineBuildError(
            "unknown device class",
            found=name,
            expected=", ".join(DEVICE_CLASSES),
            todo="choose one of these, or give --sm with the GPU's compute capability",
        )
    if backend not in device.backends:
        raise EngineBuildError(
            f"{device.title} can't run engines of {backend}",
            found=backend,
            expected=", ".join(device.backends),
            todo=f"choose --backend {device.backends[0]}",
        )
    if precision not in device.precisions:
        raise EngineBuildError(
            f"{device.title} has no hardware for {precision}",
            found=precision,
            expected=", ".join(device.precisions),
            todo="export a bundle in one of these precisions",
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
            todo="build the bundle with --int8 or --int4 instead of --fp8",
        )
