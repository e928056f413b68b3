"""The backends on engines, as far as they go without a GPU: which set, which errors, which calls."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dflash_export import compile_engines
from dflash_export.engine_builder.devices import present_gpu
from dflash_rt import Bundle, Generator
from dflash_rt.backends._tensorrt_engines import TensorRTEngines
from dflash_rt.device.planner import Planner
from dflash_rt.errors import BackendError, BackendUnavailableError, EngineError
from tests.export._pairs import TargetSpec, build, drafter_config, make_drafter, make_target
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


class Context:
    """Takes the calls that the real class has, and remembers them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        assert hasattr(trt.IExecutionContext, name), f"IExecutionContext has no {name}"

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return [] if name == "infer_shapes" else True

        return call

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


def test_every_tensor_of_every_run_is_bound(
    bundle: Bundle, engines: TensorRTEngines, made: list[tuple[Config, Context]]
) -> None:
    """A context for each graph and shape; profiles by pass; caches in place; kernels for a shape at once."""
    planner = Planner(bundle.manifest, capacity=44, prefill_chunk=16)
    addresses = {name: 1000 + offset for name, offset in planner.layout.offsets.items()}
    operations = [*planner.prefill(9, inject=True), *planner.step(4, 4)]
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
