"""What only a GPU can show. Elsewhere everything here is skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_export import build, compile_engines
from dflash_export.engines.devices import present_gpu
from dflash_rt import Bundle, Generator
from dflash_rt.backends import create_backend
from dflash_rt.backends.device.cuda import CudaDevice
from dflash_rt.errors import NumericalError
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target, run_loop

pytestmark = pytest.mark.skipif(present_gpu() is None, reason="needs an NVIDIA GPU and its driver")

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "onnxruntime-cuda": "onnxruntime"}
SPEC = TargetSpec("qwen3", hidden=64, heads=4, kv_heads=2, head_dim=16, layers=3, vocab=40)
PROMPT = [5, 17, 20, 3, 3, 9, 31, 8, 12, 5]
PRECISIONS = ("fp32", "bf16")


def need(backend: str) -> None:
    """Skip unless the backend can be had on this machine."""
    for module in (MODULES[backend], "cuda"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} isn't installed")
    if backend == "onnxruntime-cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA")
    if backend == "tensorrt-rtx":
        import tensorrt_rtx

        gpu = present_gpu()
        assert gpu is not None
        if not hasattr(tensorrt_rtx.ComputeCapability, f"SM{gpu.compute_capability}"):
            pytest.skip(f"TensorRT-RTX doesn't know sm{gpu.compute_capability}")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("pair")
    make_target(folder / "target", SPEC, spread=0.3)
    make_drafter(folder / "drafter", drafter_config(SPEC, head_dim=16), spread=0.3)
    made: dict[str, Bundle] = {}

    def get(precision: str, backend: str) -> Bundle:
        if precision not in made:
            made[precision] = build(
                folder / "target",
                folder / "drafter",
                folder / precision,
                precision=precision,
                max_seq_len=120,
                prefill_chunk=16,
            )
        if backend.startswith("tensorrt"):
            compile_engines(made[precision], backend=backend)  # nothing to do the second time
        return made[precision]

    return get


@pytest.fixture(params=MODULES)
def backend(request: pytest.FixtureRequest) -> str:
    need(request.param)
    name: str = request.param
    return name


def test_a_device_copies_captures_and_waits() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python isn't installed")
    device = CudaDevice("tensorrt")
    source, target = device.allocate(1000), device.allocate(1000)
    values = device.pinned(1000)
    values[:] = np.arange(1000) % 256
    found = device.pinned(1000)
    device.upload(source, values)
    captured = device.capture(lambda: device.copy(source, 10, target, 20, 10, 50))
    captured.launch()
    device.download(found, target)
    device.wait(device.record_event())
    rows = found.reshape(50, 20)
    assert np.array_equal(rows[:, :10], values[:500].reshape(50, 10))
    assert not rows[:, 10:].any()
    device.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_tokens_with_and_without_graph_and_running_ahead(
    backend: str, precision: str, bundles: Any
) -> None:
    bundle = bundles(precision, backend)
    runs = []
    for options in (
        {"cuda_graph": False, "run_ahead": False},
        {"run_ahead": False},
        {"cuda_graph": False},
        {},
    ):
        runner = create_backend(backend, bundle, options=options)
        runs.append([run_loop(runner, bundle, PROMPT, 80, width) for width in (1, 2, 4, 4)])  # type: ignore[arg-type]
        runner.close()
    assert runs[1:] == runs[:1] * 3


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_the_fused_target_is_the_plain_one_but_for_rounding(family: str, tmp_path: Path) -> None:
    need("onnxruntime-cuda")
    spec = TargetSpec(family, hidden=128, heads=2, kv_heads=1, head_dim=64, layers=3, vocab=40)
    make_target(tmp_path / "target", spec, spread=0.3)
    make_drafter(tmp_path / "drafter", drafter_config(spec, head_dim=64), spread=0.3)
    bundle = build(
        tmp_path / "target", tmp_path / "drafter", tmp_path / "bf16", precision="bf16", max_seq_len=120
    )
    runs, logits = [], []
    for options in ({"cuda_graph": False}, {}, {"cuda_graph": False, "fused": True}, {"fused": True}):
        runner: Any = create_backend("onnxruntime-cuda", bundle, options=options)
        runs.append([run_loop(runner, bundle, PROMPT, 80, width) for width in (1, 2, 4)])
        runner.clear()
        runner.prefill(np.array([PROMPT]), np.array([0]), inject=True)
        runner.step(np.array([1]), np.array([len(PROMPT)]), verify_len=4, inject=None)
        logits.append(runner.logits())
        runner.close()
    assert (runs[0], runs[2]) == (runs[1], runs[3])
    assert np.array_equal(logits[2], logits[3])
    assert np.abs(logits[2] - logits[0]).max() < 0.05 * np.abs(logits[0]).max()


def test_fp32_gives_the_cpus_tokens(backend: str, bundles: Any) -> None:
    bundle = bundles("fp32", backend)
    with Generator(bundle, num_draft_tokens=3) as cpu, Generator(bundle, backend, num_draft_tokens=3) as gpu:
        for prompt in (PROMPT, [7], PROMPT * 3):
            wanted = cpu.generate(prompt, max_new_tokens=60, stop_token_ids=[])
            found = gpu.generate(prompt, max_new_tokens=60, stop_token_ids=[])
            assert found.token_ids == wanted.token_ids


def test_a_poisoned_cache_ends_the_request_and_no_other(backend: str, bundles: Any, tmp_path: Path) -> None:
    bundle = bundles("fp32", backend)
    runner: Any = create_backend(backend, bundle)
    wanted = run_loop(runner, bundle, PROMPT, 40, 4)
    runner.prefill(np.array([PROMPT]), np.array([0]), inject=True)
    runner._memory.write("target.value.0", np.full(8, np.nan, np.float32))
    with pytest.raises(NumericalError):
        runner.step(np.array([1]), np.array([len(PROMPT)]), verify_len=4, inject=None)
    runner.clear()
    assert run_loop(runner, bundle, PROMPT, 40, 4) == wanted
    runner.close()
