"""Which GPU is here, and the device classes that engines can be built for by name."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from dflash_export.errors import EngineBuildError

__all__ = ["DEVICE_CLASSES", "FP8_SINCE", "DeviceClass", "Gpu", "check_device", "check_fp8", "present_gpu"]

# CUdevice_attribute of the driver API.
_MAJOR, _MINOR = 75, 76
_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True)
class DeviceClass:
    """A kind of machine: its compute capability (89 is 8.9), and the libraries that run on it.

    All of them compute in fp32, fp16 and bf16; FP8 is for some.
    """

    name: str
    title: str
    compute_capability: int
    backends: tuple[str, ...]

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores compute in FP8."""
        return self.compute_capability >= FP8_SINCE


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
