"""CUDA's calls on a stand-in of its runtime, and graphs that aren't the step that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dflash_rt import Bundle
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.backends.device.backend import DeviceBackend, DeviceOptions
from dflash_rt.backends.device.cuda import CudaDevice
from dflash_rt.backends.device.host import HostDevice, Recorded
from dflash_rt.backends.device.onnxruntime import OnnxRuntimeEngines
from dflash_rt.backends.device.plan import Run as DeviceRun
from dflash_rt.backends.device.protocols import Captured, Work
from dflash_rt.errors import BackendError
from tests.end_to_end.device_pairs import PROMPT, TELLING, device_bundles, tokens_of
from tests.pairs import run_loop
from tests.rt.fake_cuda import FakeRuntime


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    return device_bundles(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles("full")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, threads=1)


# --- CUDA's calls, on a stand-in of its runtime ---


class Streamed(OnnxRuntimeEngines):
    """Puts its runs on the stand-in's stream, as a GPU's library does: they are done later, and captured."""

    def __init__(self, bundle: Bundle, runtime: FakeRuntime) -> None:
        super().__init__(bundle, cuda=False, threads=1)
        self.runtime, self.stream = runtime, 0

    def load(self, device: Any) -> int:
        self.stream = device.stream
        return super().load(device)

    def prepare(self, run: Any, address: Callable[[str], int], scratch: int) -> Work:
        work = super().prepare(run, address, scratch)
        return lambda: self.runtime.enqueue(self.stream, work)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", ["full", "own vocabulary, from the anchor"])
def test_the_loop_by_cudas_calls(
    name: str, graph: bool, bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)  # type: ignore[arg-type]
    bundle = bundles(name)
    options = DeviceOptions(cuda_graph=graph)
    engines = Streamed(bundle, runtime)
    backend = DeviceBackend(bundle, CudaDevice("test"), engines, name="test", options=options)
    reference = OnnxRuntimeBackend(bundle, threads=1)
    for prompt in (PROMPT, [2]):
        wanted = run_loop(reference, bundle, prompt, 40, 3)
        assert run_loop(backend, bundle, prompt, 40, 3) == wanted
    assert runtime.calls.count("cudaGraphInstantiate") == graph
    assert (runtime.calls.count("cudaGraphLaunch") > 8) is graph
    backend.close()
    assert runtime.live == {}


# --- A graph that isn't the step ---


class Forgetful(HostDevice):
    """Leaves one operation out of every graph, as a wrong capture would."""

    def __init__(self, left_out: int) -> None:
        super().__init__()
        self.left_out = left_out
        self.sizes: set[int] = set()

    def capture(self, record: Work) -> Captured:
        captured = super().capture(record)
        assert isinstance(captured, Recorded)
        work = captured.work
        self.sizes.add(len(work))
        return Recorded(captured.queue, tuple(w for i, w in enumerate(work) if i != self.left_out))


class Loaded(OnnxRuntimeEngines):
    """Keeps its sessions from one backend to the next."""

    def load(self, device: Any) -> int:
        return 0 if self._sessions else super().load(device)

    def close(self) -> None:
        pass


def test_every_operation_that_a_graph_forgets_is_noticed(bundle: Bundle) -> None:
    """A step's start that isn't moved on, a block that keeps old drafts, features that aren't injected, …"""
    engines = Loaded(bundle, cuda=False, threads=1)
    options = DeviceOptions()
    whole = Forgetful(-1)
    tokens_of(DeviceBackend(bundle, whole, engines, name="test", options=options), TELLING, 60, [4])
    (size,) = whole.sizes
    assert size > 12
    for left_out in range(size):
        backend = DeviceBackend(bundle, Forgetful(left_out), engines, name="test", options=options)
        with pytest.raises(BackendError, match="isn't that step"):
            tokens_of(backend, TELLING, 60, [4])
        # Without graphs it is the same device, and right.
        backend = DeviceBackend(
            bundle, Forgetful(left_out), engines, name="test", options=DeviceOptions(cuda_graph=False)
        )
        assert len(tokens_of(backend, PROMPT, 9, [4]).token_ids) == 9


def test_onnx_runtime_is_told_what_captures_on_a_gpu_need(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found on an H200: without each of these a capture fails there, or closing ends the process."""
    made: list[Any] = []

    def session(path: str, options: Any, *, providers: Any) -> mock.MagicMock:
        new = mock.MagicMock()
        new.given = options, dict(providers[:1])["CUDAExecutionProvider"]
        new.get_providers.return_value = ["CUDAExecutionProvider"]
        made.append(new)
        return new

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    engines = OnnxRuntimeEngines(bundle, cuda=True)
    engines.load(SimpleNamespace(stream=7))  # type: ignore[arg-type]
    for each in made:
        _, cuda = each.given
        assert (cuda["enable_cuda_graph"], cuda["user_compute_stream"]) == ("1", "7")
    engines.prepare(DeviceRun("embed", (), ()), lambda name: 0, 0)()
    ((_, run),) = [call.args for each in made for call in each.run_with_iobinding.call_args_list]
    assert run.get_run_config_entry("gpu_graph_id") == "-1"  # it captures nothing itself
    assert run.get_run_config_entry("disable_synchronize_execution_providers") == "1"
