"""The GPU suite from its command line to its report, as far as a CPU goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dflash_bench.floor import cache_bytes, step_floor, weight_bytes
from dflash_bench.gpu.bundles import drafter_tensors, make_bundle, target_tensors, write_pair
from dflash_bench.gpu.device_clock import Clocked, measure_draft_share, time_steps
from dflash_bench.gpu.plan import WARM_STEPS
from dflash_bench.gpu.shapes import TINY
from dflash_export.engines.devices import present_gpu
from dflash_rt import Bundle
from dflash_rt.backends import create_backend

ROOT = Path(__file__).parents[3]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dflash_bench", "gpu", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Its folder, with bundle and report, and what it printed."""
    folder = tmp_path_factory.mktemp("suite")
    arguments = ("--dry-run", "--keep", "--scratch", folder / "scratch", "--output", folder / "report.json")
    return folder, run(*arguments, cwd=folder)


@pytest.fixture(scope="module")
def report(dry_run: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    folder, done = dry_run
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def bundle(dry_run: tuple[Path, subprocess.CompletedProcess[str]], report: dict[str, Any]) -> Bundle:
    (path,) = (dry_run[0] / "scratch").glob("*/*/bundle")
    return Bundle.open(path)


def test_every_part_is_done_or_says_why_not(report: dict[str, Any]) -> None:
    assert report["state"] == "finished"
    states = {part["name"]: part["state"] for part in report["parts"]}
    assert set(states.values()) <= {"done", "skipped"}, report["parts"]
    assert [name for name, state in states.items() if state == "skipped"] == ["tiny in fp8"]
    assert all(part["reason"] for part in report["parts"] if part["state"] == "skipped")


def test_it_measures_the_loop_on_a_device(report: dict[str, Any]) -> None:
    assert [(row["backend"], row["context"]) for row in report["rows"]] == [
        ("onnxruntime-device", 32),
        ("onnxruntime-device", 64),
    ]
    for row in report["rows"]:
        keys = ("step_ms", "plain_step_ms", "reference_step_ms", "hf_step_ms", "floor_ms", "draft_share")
        assert all(row[key] > 0 for key in keys), row
        assert 0 < row["draft_share"] < 1
        assert row["missing"] == {}
        assert row["repeats"] == 2


def test_tokens_are_those_of_pytorch(report: dict[str, Any]) -> None:
    names = ("onnxruntime-device", "onnxruntime-device:no-graph", "onnxruntime-device:fused")
    assert [(result["backend"], result["run"]) for result in report["parity"]] == [
        (name, run) for name in names for run in ("drafted", "plain", "PyTorch")
    ]
    for result in report["parity"]:
        assert result["verdict"] == "equal", result
        assert result["equal_answers"] == result["answers"] == 3
        assert 0 < result["bound"] < 1e-3
    # Something was accepted: otherwise half of the loop wasn't tried.
    assert report["parity"][0]["tokens_per_step"] > 1.1
    same, _, compared = report["parity"][0]["steps_as_reference"].split()
    assert int(same) == int(compared) > 50


def test_an_unknown_backend_is_wrong_usage(tmp_path: Path) -> None:
    done = run("--dry-run", "--backend", "tensorflow", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown backend" in done.stderr
    assert "tensorrt-rtx" in done.stderr


def test_a_dry_run_says_that_it_proves_nothing(
    dry_run: tuple[Path, subprocess.CompletedProcess[str]], report: dict[str, Any]
) -> None:
    folder, done = dry_run
    assert report["dry_run"] is True
    assert {goal["verdict"] for goal in report["goals"]} == {"not measured"}
    page = (folder / "report.md").read_text()
    assert "proves nothing about speed" in page
    assert "proves nothing about speed" in done.stderr
    assert done.stdout.strip() == page.strip()
    assert report["environment"]["packages"]["dflash"] == "0.1.0"


@pytest.mark.skipif(present_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_it_is_wrong_usage(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "r.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "There is no GPU here" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- Parts that need a bundle ---


def test_bytes_of_a_step(bundle: Bundle) -> None:
    size = {name: weight_bytes(bundle.graph_path(name)) for name in bundle.manifest.graphs}
    plain, drafted = step_floor(bundle, 1, 100), step_floor(bundle, 4, 100)
    assert plain is not None
    assert drafted is not None
    assert plain.weight_bytes == size["target"] + size["lm_head"]
    assert drafted.weight_bytes == plain.weight_bytes + size["inject"] + size["draft"] + size["lm_head"]
    # Keys and values, layers, heads, head size, bytes; rows of the context and of the block.
    assert plain.cache_bytes == 2 * 3 * 2 * 16 * 4 * (100 + 1)
    assert drafted.cache_bytes == 2 * (3 + 2) * 2 * 16 * 4 * (100 + 4)
    assert cache_bytes(bundle, 1, 0) == 2 * 3 * 2 * 16 * 4


def test_a_bundle_that_is_there_is_taken(bundle: Bundle) -> None:
    scratch = bundle.root.parents[1]
    (length,) = (path.name.split("-")[-1] for path in scratch.iterdir())
    before = (bundle.root / "manifest.json").stat().st_mtime_ns
    made = make_bundle(TINY, "fp32", scratch, max_seq_len=int(length), keep_weights=True)
    assert made.bundle.root == bundle.root
    assert (bundle.root / "manifest.json").stat().st_mtime_ns == before


def test_steps_are_timed_on_both_kinds_of_backend(bundle: Bundle) -> None:
    for name in ("onnxruntime", "onnxruntime-device"):
        backend = create_backend(name, bundle)
        sample = time_steps(backend, list(range(8)), width=4, steps=3, prefill_chunk=8)
        assert sample.run_seconds is not None
        assert 0 < sample.run_seconds <= sample.step_seconds
        share = measure_draft_share(backend, list(range(8)), width=4, prefill_chunk=8)
        assert share is None if name == "onnxruntime" else 0 < share < 1  # type: ignore[operator]
        backend.close()


def test_launches_are_timed_where_they_run(bundle: Bundle) -> None:
    backend: Any = create_backend("onnxruntime-device", bundle)
    clocked = Clocked(backend)
    time_steps(backend, list(range(8)), width=4, steps=2, prefill_chunk=8)
    import numpy as np

    first = backend.prefill(np.zeros((1, 4), np.int64), np.zeros(1, np.int64), inject=True)
    clocked.launch(4, first, np.full(1, 4, np.int64))
    clocked.launch(4)
    assert clocked.collect().drafted.shape == (1, 3)
    seconds = clocked.seconds(0, 2)
    assert len(seconds) == 2
    assert all(value > 0 for value in seconds)
    assert not clocked.sees_device
    assert clocked.name == "onnxruntime-device"
    backend.close()


def test_no_two_random_tensors_are_alike(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    target, drafter = write_pair(TINY, tmp_path, torch.bfloat16)
    for folder, shapes in ((target, target_tensors(TINY)), (drafter, drafter_tensors(TINY))):
        tensors = load_file(folder / "model.safetensors")
        assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes
        assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
        starts = [tuple(value.flatten()[:16].tolist()) for value in tensors.values()]
        assert len(set(starts)) == len(starts)


def test_warm_steps_cover_capture_and_comparison() -> None:
    from dflash_rt.backends.device.runner import _MOST_COMPARED

    # The first step has nothing to inject and is a kind of its own; the next one runs by operations.
    assert WARM_STEPS >= 2 + _MOST_COMPARED
