"""Devices, plans and options without a graph; CUDA against a stand-in of its runtime."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dflash_rt import Bundle
from dflash_rt.backends import create_backend, takes_threads
from dflash_rt.backends.device.budget import Budget
from dflash_rt.backends.device.cuda import CudaDevice
from dflash_rt.backends.device.host import HostDevice
from dflash_rt.backends.device.memory import Memory
from dflash_rt.backends.device.plan import ALIGNMENT, Buffer, Copy, Layout
from dflash_rt.backends.device.planner import Planner, _prefill_rows
from dflash_rt.backends.device.protocols import Device
from dflash_rt.bundle.dtypes import as_float32
from dflash_rt.errors import BackendError, BackendUnavailableError, DeviceError, EngineError, RequestError
from tests.rt.bundle_maker import write_bundle
from tests.rt.fake_cuda import FakeRuntime


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_bundle(tmp_path / "bundle"))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setitem(sys.modules, "cuda", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.bindings", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture(params=["host", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "host":
        return HostDevice()
    request.getfixturevalue("runtime")
    return CudaDevice("tensorrt")


def pinned(device: Device, values: bytes) -> Any:
    memory = device.pinned(len(values))
    memory[:] = np.frombuffer(values, np.uint8)
    return memory


def read(device: Device, address: int, count: int) -> bytes:
    target = device.pinned(count)
    device.download(target, address)
    device.wait(device.record_event())
    return target.tobytes()


# --- Every device ---


def test_memory_is_zeroed_and_aligned(device: Device) -> None:
    first, second = device.allocate(10), device.allocate(300)
    assert first % ALIGNMENT == second % ALIGNMENT == 0
    assert read(device, second, 300) == bytes(300)
    assert device.pinned(7).tobytes() == bytes(7)


def test_copies_and_zeroing(device: Device) -> None:
    source, target = device.allocate(12), device.allocate(12)
    device.upload(source, pinned(device, b"abcdefghijkl"))
    device.copy(source, 4, target, 6, 2, 2)
    assert read(device, target, 12) == b"ab\0\0\0\0ef" + bytes(4)
    device.copy(source + 1, 4, target, 1, 3, 1)
    device.zero(target + 1, 1)
    assert read(device, target, 3) == b"b\0d"


def test_captured_work_is_done_when_it_is_launched_and_each_time(device: Device) -> None:
    first, second = device.allocate(1), device.allocate(1)
    before = pinned(device, b"x")
    captured = device.capture(lambda: device.copy(first, 1, second, 1, 1, 1))
    device.upload(first, before)
    assert read(device, second, 1) == b"\0"
    captured.launch()
    assert read(device, second, 1) == b"x"
    device.upload(first, pinned(device, b"y"))
    captured.launch()
    assert read(device, second, 1) == b"y"


def test_a_capture_that_fails_leaves_the_device_usable(device: Device) -> None:
    address = device.allocate(1)

    def record() -> None:
        device.zero(address, 1)
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        device.capture(record)
    device.upload(address, pinned(device, b"x"))
    assert read(device, address, 1) == b"x"


def test_closing_twice(device: Device) -> None:
    device.allocate(1)
    device.close()
    device.close()


def test_what_is_written_may_change_at_once(device: Device) -> None:
    memory = Memory(
        device, Layout.of([Buffer("a", "int64", (1, 2)), Buffer("b", "int64", (1, 2), "readback")])
    )
    values = np.array([[1, 2]])
    memory.write("a", values)
    memory.copy(Copy("a", 0, 16, "b", 0, 16, 16, 1))
    values[:] = 3
    memory.write("a", values)
    window = memory.new_readback()
    memory.read_back(window)
    device.wait(device.record_event())
    assert memory.readback(window).rows("b", 2).tolist() == [[1, 2]]


# --- The host ---


def test_the_host_works_later_as_a_stream_does() -> None:
    device = HostDevice()
    address = device.allocate(1)
    source = pinned(device, b"x")
    device.upload(address, source)
    source[0] = ord("y")  # too early: the copy hasn't been made
    assert read(device, address, 1) == b"y"


def test_what_fails_takes_the_queue_with_it() -> None:
    device = HostDevice()
    address = device.allocate(1)

    def fail() -> None:
        raise BackendError("a graph failed")

    device.call(fail)
    device.upload(address, pinned(device, b"x"))
    with pytest.raises(BackendError, match="a graph failed"):
        device.wait(device.record_event())
    assert read(device, address, 1) == b"\0"


def test_the_host_may_be_small() -> None:
    device = HostDevice(limit=1000)
    device.allocate(100)
    assert device.free_bytes() == 1000 - 100 - ALIGNMENT
    with pytest.raises(BackendError, match="out of memory"):
        device.allocate(1000)


# --- CUDA ---


def test_cuda_frees_all_that_it_made(runtime: FakeRuntime) -> None:
    device = CudaDevice("tensorrt")
    assert (device.name, device.compute_capability, device.free_bytes()) == ("Fake GPU", 89, 10**9)
    assert runtime.live[device.stream] == "stream"
    address = device.allocate(8)
    device.capture(lambda: device.zero(address, 8)).launch()
    device.wait(device.record_event())
    device.pinned(8)
    assert set(runtime.live.values()) == {"memory", "pinned", "stream", "event", "executable"}
    device.close()
    assert runtime.live == {}


def test_cuda_events_are_used_again(runtime: FakeRuntime) -> None:
    device = CudaDevice("tensorrt")
    for _ in range(5):
        device.wait(device.record_event())
    kept = [device.record_event(), device.record_event()]
    assert runtime.calls.count("cudaEventCreateWithFlags") == len(kept)


@pytest.mark.parametrize(
    "function",
    [
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaMemcpyAsync",
        "cudaMemcpy2DAsync",
        "cudaMemsetAsync",
        "cudaEventRecord",
        "cudaEventSynchronize",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphLaunch",
        "cudaMemGetInfo",
        "cudaEventCreateWithFlags",
    ],
)
def test_every_status_is_looked_at(function: str, runtime: FakeRuntime) -> None:
    device = CudaDevice("tensorrt")
    runtime.fail = {function}
    with pytest.raises(DeviceError, match=f"{function} failed") as caught:
        address, memory = device.allocate(8), device.pinned(8)
        device.upload(address, memory)
        device.copy(address, 4, address + 2, 4, 2, 2)
        device.capture(lambda: device.zero(address, 8)).launch()
        device.wait(device.record_event())
        device.free_bytes()
    assert "words of the driver" in str(caught.value)


def test_no_gpu_and_no_cuda_python(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.devices = 0
    with pytest.raises(BackendUnavailableError, match="needs a GPU") as caught:
        CudaDevice("tensorrt")
    assert "words of the driver" in str(caught.value)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailableError, match="needs cuda-python") as caught:
        CudaDevice("onnxruntime-cuda")
    assert "dflash-export[cuda]" in str(caught.value)


def test_the_stand_in_is_the_real_runtimes() -> None:
    """Names and numbers of arguments, where cuda-python is installed."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python isn't installed")
    for name, function in inspect.getmembers(FakeRuntime, inspect.isfunction):
        if name.startswith("cuda"):
            first_line = getattr(real, name).__doc__.split("\n")[0]
            arguments = first_line.partition("(")[2].rpartition(")")[0]
            count = len([each for each in arguments.split(",") if each.strip()])
            assert count == len(inspect.signature(function).parameters) - 1, first_line


# --- Layout and budget ---


def test_the_report_is_one_piece_and_nothing_overlaps() -> None:
    buffers = [
        Buffer("a", "int64", (3,), "readback"),
        Buffer("cache", "float16", (1, 2, 300, 4), "cache"),
        Buffer("b", "int64", (40,), "readback"),
        Buffer("c", "float32", (7,)),
    ]
    layout = Layout.of(buffers)
    ends = sorted((layout.offsets[b.name], layout.offsets[b.name] + b.nbytes) for b in buffers)
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets.values())
    begin, size = layout.readback
    assert {name for name, offset in layout.offsets.items() if begin <= offset < begin + size} == {"a", "b"}
    assert begin + size == layout.nbytes
    assert Budget.of(layout, weights=5, scratch=7).total == layout.nbytes + 12
    assert Budget.of(layout, weights=5).caches == 4800


def test_a_budget_is_refused_by_name() -> None:
    budget = Budget(weights=3_000_000, caches=2_000_000, activations=1_000_000, scratch=500_000)
    budget.check(free=6_500_000, limit=None)
    budget.check(free=1, limit=6_500_000)  # what is free leaves out what a system can give back
    with pytest.raises(BackendError, match=r"weights 3\.0 MB, caches 2\.0 MB") as caught:
        budget.check(free=6_499_999, limit=None)
    assert "(free)" in str(caught.value)
    assert "set memory_limit where more can be had" in str(caught.value)
    with pytest.raises(BackendError, match="memory_limit"):
        budget.check(free=None, limit=6_499_999)


# --- Loading ---


def test_a_device_is_closed_if_no_engines_fit(
    bundle: Bundle, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(__version__="11.4", ILogger=type("ILogger", (), {"ERROR": 1}))
    monkeypatch.setitem(sys.modules, "tensorrt", library)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no engines for tensorrt"):
        create_backend("tensorrt", bundle)
    assert "cudaStreamCreateWithFlags" in runtime.calls
    assert runtime.live == {}


# --- Prefill ---


@pytest.mark.parametrize(("chunk", "block", "sizes"), [(256, 16, 5), (100, 7, 6), (4, 8, 1), (1, 1, 1)])
def test_a_prefill_has_few_sizes(chunk: int, block: int, sizes: int) -> None:
    """Whatever is fed stays in the caches, and every prompt row is fed once, in order."""
    planner = Planner.__new__(Planner)
    planner.prefill_rows = _prefill_rows(chunk, block)
    assert len(planner.prefill_rows) == sizes
    assert planner.prefill_rows[-1] == chunk
    for rows in range(1, chunk + 1):
        for room in range(rows + block, rows + 2 * chunk):
            pieces = list(planner.pieces(rows, room))
            assert sum(used for _, used in pieces) == rows
            at = 0
            for size, used in pieces:
                assert size in planner.prefill_rows
                assert used <= size <= room - at
                at += used
            if room >= 2 * chunk:
                assert len(pieces) == 1


# --- Options ---


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnxruntime", {"cuda_graph": False}, "no such option"),
        ("onnxruntime-device", {"cuda_graf": False}, "cuda_graf"),
        ("onnxruntime-device", {"cuda_graph": 1}, "cuda_graph is wrong"),
        ("onnxruntime-device", {"run_ahead": None}, "run_ahead is wrong"),
        ("onnxruntime-device", {"memory_limit": 0}, "memory_limit is wrong"),
        ("onnxruntime-device", {"memory_limit": 1.5}, "memory_limit is wrong"),
        ("onnxruntime-device", {"max_seq_len": True}, "max_seq_len is wrong"),
    ],
)
def test_options_are_refused(backend: str, options: dict[str, Any], message: str, bundle: Bundle) -> None:
    with pytest.raises(RequestError, match=message):
        create_backend(backend, bundle, options=options)


def test_threads_are_refused_where_they_do_nothing(bundle: Bundle) -> None:
    assert not takes_threads("tensorrt")
    with pytest.raises(RequestError, match="threads has no effect"):
        create_backend("tensorrt", bundle, threads=2)


# --- Comparing ---


def test_bfloat16_is_compared_by_value() -> None:
    """It comes as its bits: 1.5, -2 and infinity."""
    bits = np.array([0x3FC0, 0xC000, 0x7F80], np.uint16)
    assert as_float32(bits).tolist() == [1.5, -2.0, float("inf")]
    assert as_float32(np.array([0.5], np.float16)).tolist() == [0.5]
