"""The two libraries behind one builder: their modules, versions, and what only one of them can do."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from dflash_export.errors import EngineBuildError
from dflash_rt.errors import BackendUnavailableError

__all__ = ["BACKENDS", "Vendor", "has_lengths", "load_vendor"]

# The module of each backend, and its first version with IKVCacheUpdateLayer and IAttention.
_LIBRARIES = {"tensorrt": ("tensorrt", (10, 15)), "tensorrt-rtx": ("tensorrt_rtx", (1, 7))}
BACKENDS = tuple(_LIBRARIES)


@dataclass(frozen=True)
class Vendor:
    """A loaded library. ``trt`` is ``tensorrt`` or ``tensorrt_rtx``."""

    backend: str
    trt: ModuleType

    @property
    def version(self) -> str:
        """Like ``1.7.1.116``."""
        return str(self.trt.__version__)

    @property
    def needs_gpu(self) -> bool:
        """TensorRT times kernels on the GPU that it builds for; TensorRT-RTX compiles without one."""
        return self.backend == "tensorrt"

    @property
    def compute_capabilities(self) -> tuple[int, ...]:
        """GPUs that TensorRT-RTX can build for, without any being there: 89 is 8.9. Empty for TensorRT."""
        known = getattr(self.trt, "ComputeCapability", None)
        if self.needs_gpu or known is None:
            return ()
        names = known.__members__
        return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit()))

    def check_options(self, *, version_compatible: bool, hardware_compatible: bool) -> None:
        """Refuse what this library can't build. TensorRT-RTX ignores or fails on both options.

        Raises:
            EngineBuildError: an option is not for this backend.
        """
        if not self.needs_gpu and (version_compatible or hardware_compatible):
            name = "--version-compatible" if version_compatible else "--hardware-compatible"
            raise EngineBuildError(
                f"{name} is not for {self.backend}",
                found="an option of TensorRT",
                expected="engines for the listed GPUs and for this version of TensorRT-RTX",
                remedy="leave it out; without --sm the engines are for every GPU that TensorRT-RTX knows",
            )


def has_lengths(trt: ModuleType) -> bool:
    """Whether an ``IAttention`` of this library can be told how many rows are valid. TensorRT 10's can't."""
    return hasattr(getattr(trt, "IAttention", None), "key_value_lengths")


def load_vendor(backend: str) -> Vendor:
    """Import the library of ``backend``.

    Raises:
        EngineBuildError: no such backend.
        BackendUnavailableError: its package isn't installed, doesn't load, or is too old.
    """
    if backend not in _LIBRARIES:
        raise EngineBuildError(
            "unknown engine backend",
            found=backend,
            expected=", ".join(BACKENDS),
            remedy="choose one of these",
        )
    name, oldest = _LIBRARIES[backend]
    expected = f"{oldest[0]}.{oldest[1]} or newer"
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the {backend} library can't be imported",
            found=error,
            expected=f"the package {name}, version {expected}",
            remedy=f"pip install 'dflash-export[{backend}]'",
        ) from error
    vendor = Vendor(backend, module)
    if tuple(int(part) for part in vendor.version.split(".")[:2] if part.isdigit()) < oldest:
        raise BackendUnavailableError(
            f"{backend} is too old",
            found=vendor.version,
            expected=f"{expected}: the first with caches that are updated in place",
            remedy=f"pip install --upgrade 'dflash-export[{backend}]'",
        )
    return vendor
