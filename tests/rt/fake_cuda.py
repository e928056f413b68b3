"""``cuda.bindings.runtime`` without a GPU: the functions that we call, on the host's memory, in order, later.

Names, order of arguments and kinds of results are those of cuda-bindings 13.5.
"""

# ruff: noqa: N802, N815
from __future__ import annotations

import ctypes
import enum
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class FakeRuntime:
    """``fail``: names of functions that fail. Whatever isn't freed at the end is in ``live``."""

    cudaError_t = Status
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)
    cudaStreamNonBlocking, cudaHostAllocDefault, cudaEventDisableTiming = 1, 0, 2

    def __init__(self, *, devices: int = 1) -> None:
        self.devices = devices
        self.fail: set[str] = set()
        self.live: dict[Any, str] = {}
        self.calls: list[str] = []
        self._memory: dict[int, Any] = {}
        self._captured: list[Callable[[], object]] | None = None
        self._queue: deque[Callable[[], object] | int] = deque()  # a number is a place that was marked
        self._places: dict[int, int] = {}
        self._next = 100

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.fail:
                return (Status.cudaErrorInvalidValue, None)
            return found(*arguments)

        return call

    def cudaGetDeviceCount(self) -> Any:
        if not self.devices:
            return (Status.cudaErrorInsufficientDriver, None)
        return (Status.cudaSuccess, self.devices)

    def cudaSetDevice(self, device: int) -> Any:
        return (Status.cudaSuccess,)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return (Status.cudaSuccess, SimpleNamespace(name=b"Fake GPU", major=8, minor=9))

    def cudaGetErrorString(self, error: Status) -> Any:
        return (Status.cudaSuccess, b"words of the driver")

    def cudaMemGetInfo(self) -> Any:
        return (Status.cudaSuccess, 10**9, 2 * 10**9)

    def cudaMalloc(self, size: int) -> Any:
        return self._allocate("memory", size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self._allocate("pinned", size)

    def cudaFree(self, address: int) -> Any:
        return self._free("memory", address)

    def cudaFreeHost(self, address: int) -> Any:
        return self._free("pinned", address)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._new("stream")

    def cudaStreamDestroy(self, stream: int) -> Any:
        return self._free("stream", stream)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        self._work_until(-1)
        return self._known("stream", stream)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return self._new("event")

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        self._next += 1
        self._places[event] = self._next
        self._queue.append(self._next)
        return self._known("event", event, "stream", stream)

    def cudaEventSynchronize(self, event: int) -> Any:
        self._work_until(self._places[event])
        return self._known("event", event)

    def cudaEventDestroy(self, event: int) -> Any:
        return self._free("event", event)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> Any:
        return self.enqueue(stream, lambda: ctypes.memmove(target, source, count))

    def cudaMemcpy2DAsync(
        self,
        target: int,
        pitch: int,
        source: int,
        other: int,
        width: int,
        height: int,
        kind: int,
        stream: int,
    ) -> Any:
        def work() -> None:
            for row in range(height):
                ctypes.memmove(target + row * pitch, source + row * other, width)

        if width > pitch or width > other:
            return (Status.cudaErrorInvalidValue,)
        return self.enqueue(stream, work)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> Any:
        return self.enqueue(stream, lambda: ctypes.memset(address, value, count))

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        assert self._captured is None
        self._captured = []
        return self._known("stream", stream)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        status, graph = self._new("graph")
        self._memory[graph], self._captured = self._captured, None
        return (status, graph)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        status, executable = self._new("executable")
        self._memory[executable] = self._memory[graph]
        return (status, executable)

    def cudaGraphDestroy(self, graph: int) -> Any:
        return self._free("graph", graph)

    def cudaGraphUpload(self, executable: int, stream: int) -> Any:
        return self._known("executable", executable, "stream", stream)

    def cudaGraphLaunch(self, executable: int, stream: int) -> Any:
        assert self._captured is None
        self._queue.extend(self._memory[executable])
        return self._known("executable", executable, "stream", stream)

    def cudaGraphExecDestroy(self, executable: int) -> Any:
        return self._free("executable", executable)

    def enqueue(self, stream: int, work: Callable[[], object]) -> Any:
        """Put a kernel on the stream, or into the graph that is being captured."""
        (self._queue if self._captured is None else self._captured).append(work)
        return self._known("stream", stream)

    def _work_until(self, place: int) -> None:
        """Do what was enqueued before ``place``; all of it, if that is nowhere."""
        if place > 0 and place not in self._queue:
            return  # passed already
        while self._queue:
            item = self._queue.popleft()
            if callable(item):
                item()
            elif item == place:
                return

    def _allocate(self, kind: str, size: int) -> Any:
        array = np.full(size + 256, 0xAB, np.uint8)  # not zeros, as on a GPU
        address = -(-array.ctypes.data // 256) * 256
        self._memory[address], self.live[address] = array, kind
        return (Status.cudaSuccess, address)

    def _new(self, kind: str) -> Any:
        self._next += 1
        self.live[self._next] = kind
        return (Status.cudaSuccess, self._next)

    def _known(self, *pairs: Any) -> Any:
        for kind, handle in zip(pairs[::2], pairs[1::2], strict=True):
            assert self.live.get(handle) == kind, (kind, handle)
        return (Status.cudaSuccess,)

    def _free(self, kind: str, handle: int) -> Any:
        assert self.live.pop(handle) == kind
        return (Status.cudaSuccess,)
