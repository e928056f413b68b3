"""Backends by name. A vendor's library is imported when its backend is made, not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dflash_rt.errors import BackendUnavailableError, RequestError

if TYPE_CHECKING:
    from dflash_rt.backends.base import Backend
    from dflash_rt.backends.device.backend import DeviceOptions
    from dflash_rt.bundle.folder import Bundle

__all__ = ["BACKEND_NAMES", "create_backend", "takes_threads"]


def _on_cpu(name: str, bundle: Bundle, threads: int | None, options: Mapping[str, Any]) -> Backend:
    _refuse_options(name, options, ("fast_plain", "fused", "integer_activations"))
    for option, value in options.items():
        if type(value) is not bool:
            raise _wrong_option(option, value, "true or false")
    with _importing("onnxruntime", name):
        from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
    return OnnxRuntimeBackend(bundle, threads=threads, **options)


def _on_device(name: str, bundle: Bundle, threads: int | None, options: Mapping[str, Any]) -> Backend:
    from dflash_rt.backends.device.backend import DeviceBackend
    from dflash_rt.backends.device.cuda import CudaDevice
    from dflash_rt.backends.device.host import HostDevice

    checked = _device_options(name, options)
    on_gpu = name == "onnxruntime-cuda"
    with _importing("onnxruntime-gpu" if on_gpu else "onnxruntime", name):
        from dflash_rt.backends.device.onnxruntime import OnnxRuntimeEngines
    engines = OnnxRuntimeEngines(bundle, cuda=on_gpu, threads=threads, fused=checked.fused)
    return DeviceBackend(
        bundle, CudaDevice(name) if on_gpu else HostDevice(), engines, name=name, options=checked
    )


def _tensorrt(name: str, bundle: Bundle, _: int | None, options: Mapping[str, Any]) -> Backend:
    from dflash_rt.backends.device.backend import DeviceBackend
    from dflash_rt.backends.device.cuda import CudaDevice
    from dflash_rt.backends.device.tensorrt import TensorRTEngines

    checked = _device_options(name, options)
    engines = TensorRTEngines(bundle, name)
    device = CudaDevice(name)
    try:
        engines.find(device, max_seq_len=checked.max_seq_len)
    except BaseException:
        device.close()
        raise
    return DeviceBackend(bundle, device, engines, name=name, options=checked)


_FACTORIES: dict[str, Callable[[str, Bundle, int | None, Mapping[str, Any]], Backend]] = {
    "onnxruntime": _on_cpu,
    "onnxruntime-cuda": _on_device,
    "onnxruntime-device": _on_device,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}

BACKEND_NAMES = tuple(sorted(_FACTORIES))
"""Every name that :func:`create_backend` knows; also the choices of the command line."""


def takes_threads(name: str) -> bool:
    """Whether a backend has kernels on the CPU; TensorRT's run on the GPU alone."""
    return _FACTORIES.get(name) is not _tensorrt


def create_backend(
    name: str, bundle: Bundle, *, threads: int | None = None, options: Mapping[str, Any] | None = None
) -> Backend:
    """Make the backend called ``name`` for a bundle.

    ``threads`` is the number of CPU threads a backend may use; ``None`` leaves it to the backend. ``options``
    are the backend's own: fields of :class:`~dflash_rt.backends.device.backend.DeviceOptions` on a device
    (docs/guide/gpu.md), and for ``onnxruntime`` ``integer_activations`` and ``fast_plain``
    (docs/guide/quantize.md).

    Raises:
        BackendUnavailableError: the name is unknown, or the vendor's library or device isn't there.
        BackendError: the backend can't load the bundle.
        RequestError: an option is unknown to this backend, or wrong.
    """
    try:
        factory = _FACTORIES[name]
    except (KeyError, TypeError):
        raise BackendUnavailableError(
            "unknown backend",
            found=repr(name),
            expected="one of " + ", ".join(BACKEND_NAMES),
            remedy="check the spelling, or upgrade dflash_rt",
        ) from None
    if threads is not None and not takes_threads(name):
        raise RequestError(
            f"threads has no effect on the backend {name}",
            found=f"threads={threads}",
            expected="no number of CPU threads",
            remedy="leave it out",
        )
    return factory(name, bundle, threads, dict(options or {}))


def _device_options(name: str, options: Mapping[str, Any]) -> DeviceOptions:
    from dflash_rt.backends.device.backend import DeviceOptions

    known = (field.name for field in fields(DeviceOptions))
    # TensorRT's engines are made of the plain graphs.
    fuses = _FACTORIES[name] is not _tensorrt
    _refuse_options(name, options, tuple(option for option in known if option != "fused" or fuses))
    for option, value in options.items():
        if option in ("cuda_graph", "fused", "run_ahead"):
            right, expected = type(value) is bool, "true or false"
        else:
            right, expected = (
                value is None or (type(value) is int and value > 0),
                "a whole number of at least 1",
            )
        if not right:
            raise _wrong_option(option, value, expected)
    return DeviceOptions(**options)


def _wrong_option(option: str, value: object, expected: str) -> RequestError:
    return RequestError(
        f"the backend option {option} is wrong", found=repr(value), expected=expected, remedy="mend it"
    )


def _refuse_options(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [str(option) for option in options if option not in known]
    if unknown:
        raise RequestError(
            f"the backend {name} has no such option",
            found=", ".join(unknown),
            expected=", ".join(known) or "no options",
            remedy="leave it out, or check its spelling",
        )


@contextmanager
def _importing(package: str, backend: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise BackendUnavailableError(
            f"the {backend} backend can't be imported",
            found=error,
            expected=f"the {package} package, in a version that dflash_rt's setup asks for",
            remedy=f"pip install {package}",
        ) from error
