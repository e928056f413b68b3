"""The backends on engines, as far as they go without a GPU: which set, which errors, which calls."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dflash_export import build, compile_engines
from dflash_export.engines.devices import present_gpu
from dflash_rt import Bundle, Generator
from dflash_rt.backends.device.plan import Run
from dflash_rt.backends.device.planner import Planner
from dflash_rt.backends.device.tensorrt import KernelCache, TensorRTEngines
from dflash_rt.errors import BackendError, BackendUnavailableError, EngineError
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target
from tests.rt.fake_cuda import FakeRuntime

trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'dflash-export[tensorrt-rtx]'")
SPEC = TargetSpec("qwen3", layers=2)
ADA = SimpleNamespace(name="some Ada", compute_capability=89, stream=7)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("pair")
    make_target(folder / "target", SPEC)
    make_drafter(folder / "drafter", drafter_config(SPEC, layers=1))
    bundle = build(folder / "target", folder / "drafter", folder / "bundle", max_seq_len=60, prefill_chunk=16)
    compile_engines(bundle, backend="tensorrt-rtx", compute_capabilities=(89,), max_seq_len=40)
    return bundle


@pytest.fixture
def engines(bundle: Bundle) -> TensorRTEngines:
    engines = TensorRTEngines(bundle, "tensorrt-rtx")
    engines.find(ADA, max_seq_len=None)  # type: ignore[arg-type]
    return engines


def test_the_set_says_how_long_and_how_large(bundle: Bundle, engines: TensorRTEngines) -> None:
    assert engines.max_seq_len == 40
    files = list((bundle.root / "engines").rglob("*.engine"))
    assert engines.weight_bytes == sum(path.stat().st_size for path in files) > 0


def test_engines_for_another_gpu_or_a_longer_context(bundle: Bundle) -> None:
    hopper = SimpleNamespace(name="some Hopper", compute_capability=90)
    with pytest.raises(EngineError, match="built for sm89, present is some Hopper"):
        TensorRTEngines(bundle, "tensorrt-rtx").find(hopper, max_seq_len=None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="--max-seq-len 50"):
        TensorRTEngines(bundle, "tensorrt-rtx").find(ADA, max_seq_len=50)  # type: ignore[arg-type]


@pytest.mark.skipif(present_gpu() is not None, reason="there is a GPU: see tests/gpu")
def test_loading_without_a_gpu_says_so(
    bundle: Bundle, engines: TensorRTEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own words are in ours; before that, the device says what is missing."""
    with pytest.raises(BackendError, match="can't be loaded") as caught:
        engines.load(ADA)  # type: ignore[arg-type]
    assert "CUDA driver version is insufficient" in str(caught.value)
    for backend in ("tensorrt-rtx", "onnxruntime-cuda"):
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeRuntime(devices=0))  # type: ignore[arg-type]
        with pytest.raises(BackendUnavailableError, match="needs a GPU"):
            Generator(bundle, backend)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)  # type: ignore[arg-type]
        with pytest.raises(BackendUnavailableError, match="needs cuda-python"):
            Generator(bundle, backend)


def test_a_library_that_isnt_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailableError, match="tensorrt library can't be imported"):
        Generator(bundle, "tensorrt")


# --- Loading, with stand-ins for what needs a GPU ---


class Cache:
    """A cache of kernels: what was loaded into it, and one more for each use."""

    def __init__(self) -> None:
        self.blob = b""

    def deserialize(self, blob: bytes) -> bool:
        self.blob = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self.blob + b"+"


class Runtime:
    """Takes what the real one takes."""

    def __init__(self, logger: Any) -> None:
        self.engine_host_code_allowed = False
        self.taken: list[tuple[Any, bytes]] = []
        assert hasattr(trt.Runtime, "engine_host_code_allowed")

    def deserialize_cuda_engine(self, blob: Any) -> Any:
        self.taken.append((type(blob), bytes(blob)))
        return SimpleNamespace(device_memory_size_v2=8)


def stand_in(**names: Any) -> Any:
    """The library, with some of its names replaced."""
    return SimpleNamespace(**{**vars(trt), **names})


@pytest.mark.parametrize("compatible", [True, False])
def test_code_for_the_host_is_allowed_to_engines_that_bring_it(
    compatible: bool, engines: TensorRTEngines
) -> None:
    assert engines._set is not None
    build = replace(engines._set.build, version_compatible=compatible)
    engines._set = replace(engines._set, build=build)
    engines._trt = stand_in(Runtime=Runtime)
    assert engines.load(ADA) == 8  # type: ignore[arg-type]
    assert engines._runtime.engine_host_code_allowed is compatible


def test_engines_are_mapped_and_not_read(engines: TensorRTEngines) -> None:
    """Where a GPU shares the host's memory, a copy of the file would need that of a second engine."""
    engines._trt = stand_in(Runtime=Runtime)
    engines.load(ADA)  # type: ignore[arg-type]
    taken = engines._runtime.taken
    assert {kind for kind, _ in taken} == {mmap.mmap}
    assert engines._set is not None
    assert [len(blob) for _, blob in taken] == [file.size for file in engines._set.files.values()]


def test_no_runtime_without_a_driver(engines: TensorRTEngines) -> None:
    """How the bindings say it, and a command to copy: quoted, with the options of the engines."""

    def fails(_: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    engines._trt = stand_in(Runtime=fails)
    engines._bundle = replace(engines._bundle, root=Path("/a b"))
    with pytest.raises(BackendError, match="runtime can't be made") as caught:
        engines.load(ADA)  # type: ignore[arg-type]
    assert "returned nullptr" in str(caught.value)
    assert "compile '/a b' --backend tensorrt-rtx --max-seq-len 40 --sm 89" in str(caught.value)


def test_kernels_are_kept_beside_the_engines(tmp_path: Path) -> None:
    """One cache for all contexts of an engine; what is kept is taken the next time."""
    assert all(hasattr(trt.IRuntimeCache, name) for name in ("serialize", "deserialize"))
    assert all(hasattr(trt.IRuntimeConfig, f"{name}_runtime_cache") for name in ("create", "set"))
    given: list[Cache] = []

    def take(cache: Cache) -> bool:
        given.append(cache)
        return True

    config = SimpleNamespace(create_runtime_cache=Cache, set_runtime_cache=take)
    path = tmp_path / "target.kernels"
    for kept in (b"+", b"++"):
        cache = KernelCache(path)
        cache.use(config)
        cache.use(config)
        assert given[-1] is given[-2]
        cache.save()
        assert path.read_bytes() == kept
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_kernels_that_cannot_be_kept_are_no_error(tmp_path: Path) -> None:
    config = SimpleNamespace(create_runtime_cache=Cache, set_runtime_cache=lambda cache: False)
    cache = KernelCache(tmp_path / "gone" / "target.kernels")
    cache.use(config)
    cache.save()
    cache.use(SimpleNamespace())  # a version without such caches
    cache.save()
    assert list(tmp_path.iterdir()) == []


class Context:
    """Takes the calls that the real class has, and remembers them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.capturable = True

    def __getattr__(self, name: str) -> Any:
        assert hasattr(trt.IExecutionContext, name), f"IExecutionContext has no {name}"

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return [] if name == "infer_shapes" else True

        return call

    def is_stream_capturable(self, stream: int) -> bool:
        self.calls.append(("is_stream_capturable", stream))
        return self.capturable

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Config:
    """A runtime configuration that has the real one's names only."""

    def __setattr__(self, name: str, value: Any) -> None:
        assert hasattr(trt.IRuntimeConfig, name), f"IRuntimeConfig has no {name}"
        object.__setattr__(self, name, value)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        object.__setattr__(self, "strategy", strategy)


@pytest.fixture
def made(engines: TensorRTEngines) -> list[tuple[Config, Context]]:
    """``engines`` with stand-ins for what only a GPU can deserialize."""
    made: list[tuple[Config, Context]] = []

    def create(config: Config) -> Context:
        made.append((config, Context()))
        return made[-1][1]

    engine = SimpleNamespace(create_runtime_config=Config, create_execution_context=create)
    assert all(hasattr(trt.ICudaEngine, name) for name in (*vars(engine), "device_memory_size_v2"))
    assert engines._set is not None
    engines._engines = dict.fromkeys(engines._set.files, engine)
    engines._stream, engines._scratch_bytes = 7, 4096
    return made


def test_a_context_is_asked_whether_it_can_be_captured(
    bundle: Bundle, engines: TensorRTEngines, made: list[tuple[Config, Context]]
) -> None:
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")
    planner = Planner(bundle.manifest, capacity=44, prefill_chunk=16)
    runs = [each for each in planner.step(4, inject=True) if isinstance(each, Run)]
    engines.prepare(runs[0], lambda name: 1000, 256)
    engines.require_capturable()
    engines.require_capturable()
    assert made[-1][1].called("is_stream_capturable") == [(7,)]  # once
    engines.prepare(runs[1], lambda name: 1000, 256)
    made[-1][1].capturable = False
    with pytest.raises(BackendError, match="can't be captured") as caught:
        engines.require_capturable()
    assert "cuda_graph=false" in str(caught.value)


def test_every_tensor_of_every_run_is_bound(
    bundle: Bundle, engines: TensorRTEngines, made: list[tuple[Config, Context]]
) -> None:
    """A context for each graph and shape; profiles by pass; caches in place; kernels for a shape at once."""
    planner = Planner(bundle.manifest, capacity=44, prefill_chunk=16)
    addresses = {name: 1000 + offset for name, offset in planner.layout.offsets.items()}
    operations = [*planner.prefill(16, 9, inject=True), *planner.step(4, inject=True)]
    profiles = {}
    for run in (each for each in operations if hasattr(each, "graph")):
        work = engines.prepare(run, addresses.__getitem__, 256)  # type: ignore[arg-type]
        config, context = made[-1]
        assert config.strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED  # type: ignore[attr-defined]
        assert config.dynamic_shapes_kernel_specialization_strategy == (  # type: ignore[attr-defined]
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        spec = bundle.manifest.graphs[run.graph]  # type: ignore[union-attr]
        bound = dict(context.called("set_tensor_address"))
        assert set(bound) == {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        assert all(bound[output] == bound[source] for output, source in spec.aliases.items())
        shapes = dict(context.called("set_input_shape"))
        assert set(shapes) == {tensor.name for tensor in spec.inputs}
        assert context.called("set_device_memory") == [(256, 4096)]
        ((index, stream),) = context.called("set_optimization_profile_async")
        assert stream == 7
        profiles[run.graph, run.prefill] = index  # type: ignore[union-attr]
        assert context.called("execute_async_v3") == []
        work()
        assert context.called("execute_async_v3") == [(7,)]
    assert profiles["target", True] == profiles["inject", True] == profiles["embed", True] == 0
    assert profiles["target", False] == profiles["inject", False] == 1
    assert profiles["embed", False] == profiles["draft", False] == profiles["accept", False] == 0
