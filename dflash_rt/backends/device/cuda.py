"""A GPU behind the protocol of device/base.py, by cuda-python's runtime API; every status is checked."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dflash_rt.backends.device.protocols import Bytes, Captured, Event, Work
from dflash_rt.errors import BackendUnavailableError, DeviceError

__all__ = ["CudaDevice"]

_MODULE = "cuda.bindings.runtime"


class _CudaEvent:
    """A recorded event. It goes back to the pool when nobody can wait for it any more."""

    def __init__(self, handle: Any, pool: list[Any]) -> None:
        self.handle, self._pool = handle, pool

    def __del__(self) -> None:
        self._pool.append(self.handle)


@dataclass(frozen=True)
class _Graph:
    device: CudaDevice
    executable: Any

    def launch(self) -> None:
        self.device.check("cudaGraphLaunch", self.executable, self.device.handle)


class CudaDevice:
    """The first visible GPU, and one stream on it.

    Args:
        backend: the backend that wants it, for messages.

    Raises:
        BackendUnavailableError: cuda-python isn't installed, or there is no GPU or no driver.
        DeviceError: a call failed; so do all methods.
    """

    def __init__(self, backend: str) -> None:
        self._memory: list[Any] = []
        self._pinned: list[Any] = []
        self._graphs: list[Any] = []
        self._events: list[Any] = []
        self._idle_events: list[Any] = []
        self.handle: Any = None
        self._runtime = runtime = _import_runtime(backend)
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or not count:
            raise BackendUnavailableError(
                f"the backend {backend} needs a GPU",
                found=self._text(status) if count is None else "no GPU",
                expected="an NVIDIA GPU and its driver",
                remedy='check with nvidia-smi, or use backend="onnxruntime"',
            )
        self.check("cudaSetDevice", 0)
        properties = self.check("cudaGetDeviceProperties", 0)
        self.name = properties.name.decode("utf-8", "replace")
        self.compute_capability = 10 * int(properties.major) + int(properties.minor)
        self.handle = self.check("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle as a number."""
        return int(self.handle)

    def free_bytes(self) -> int | None:
        """What the driver says is free."""
        return int(self.check("cudaMemGetInfo"))  # and the total

    def allocate(self, nbytes: int) -> int:
        address = int(self.check("cudaMalloc", nbytes))
        self._memory.append(address)
        self.zero(address, nbytes)
        return address

    def pinned(self, nbytes: int) -> Bytes:
        address = int(self.check("cudaHostAlloc", nbytes, self._runtime.cudaHostAllocDefault))
        self._pinned.append(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        array[:] = 0
        return array

    def upload(self, address: int, source: Bytes) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.check("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self.handle)

    def download(self, target: Bytes, address: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.check("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self.handle)

    def copy(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int
    ) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if height == 1:  # a pitch has a limit of its own, and isn't needed
            self.check("cudaMemcpyAsync", target, source, width, kind, self.handle)
        else:
            self.check(
                "cudaMemcpy2DAsync",
                target,
                target_pitch,
                source,
                source_pitch,
                width,
                height,
                kind,
                self.handle,
            )

    def zero(self, address: int, nbytes: int) -> None:
        self.check("cudaMemsetAsync", address, 0, nbytes, self.handle)

    def call(self, work: Work) -> None:
        """Work puts itself on the stream."""
        work()

    def capture(self, record: Work) -> Captured:
        modes = self._runtime.cudaStreamCaptureMode
        # Relaxed: ONNX Runtime's arena may still ask for memory, which the other modes forbid. The graph may
        # use it: an arena keeps what it got, and the stream runs one thing at a time.
        self.check("cudaStreamBeginCapture", self.handle, modes.cudaStreamCaptureModeRelaxed)
        try:
            record()
        except BaseException:
            self._runtime.cudaStreamEndCapture(self.handle)  # the error that counts is on its way
            raise
        graph = self.check("cudaStreamEndCapture", self.handle)
        try:
            executable = self.check("cudaGraphInstantiate", graph, 0)
        finally:
            self.check("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        self.check("cudaGraphUpload", executable, self.handle)
        return _Graph(self, executable)

    def record_event(self) -> Event:
        if self._idle_events:
            handle = self._idle_events.pop()
        else:
            handle = self.check("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
            self._events.append(handle)
        event = _CudaEvent(handle, self._idle_events)
        self.check("cudaEventRecord", handle, self.handle)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self.check("cudaEventSynchronize", event.handle)

    def drain(self) -> None:
        """Wait for the stream. Nothing is raised, as in :meth:`close`."""
        if self.handle is not None:
            self._runtime.cudaStreamSynchronize(self.handle)

    def close(self) -> None:
        """Free everything. Nothing is raised: after a failed kernel every call fails, also these."""
        runtime, handle = self._runtime, self.handle
        if handle is None:
            return
        self.drain()
        self.handle = None
        for free, items in (
            (runtime.cudaGraphExecDestroy, self._graphs),
            (runtime.cudaEventDestroy, self._events),
            (runtime.cudaFree, self._memory),
            (runtime.cudaFreeHost, self._pinned),
        ):
            while items:
                free(items.pop())
        runtime.cudaStreamDestroy(handle)

    def check(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime; its value, if it has one. Raises DeviceError."""
        status, *values = getattr(self._runtime, function)(*arguments)
        self._require(function, status)
        return values[0] if values else None

    def _require(self, function: str, status: Any) -> None:
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise DeviceError(
                f"{function} failed",
                found=self._text(status),
                expected="success",
                remedy="check the GPU with nvidia-smi and its free memory; then make a new generator",
            )

    def _text(self, status: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(status)
        return f"{getattr(status, 'name', status)}: {text.decode('utf-8', 'replace')}"


def _import_runtime(backend: str) -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        extra = "cuda" if backend.startswith("onnxruntime") else backend
        raise BackendUnavailableError(
            f"the backend {backend} needs cuda-python",
            found=error,
            expected="the package cuda-python, version 13.0 or newer",
            remedy=f"pip install 'dflash-export[{extra}]'",
        ) from error
