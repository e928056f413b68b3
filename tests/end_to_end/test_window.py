"""A drafter whose layers all slide: its caches hold a window at any context, and nothing else changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import dflash.model
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export import build
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.backends.state.window import WindowState
from dflash_rt.bundle.manifest import StateSpec, TensorSpec
from tests.end_to_end.test_reference_loop import LEAST_MARGIN, SLIDING, Reference, window
from tests.export.drafters.speculators_pairs import SpeculatorsLoop, make_speculators, speculators_config
from tests.pairs import (
    TargetSpec,
    drafter_config,
    make_drafter,
    make_target,
    reference_drafter,
    run_loop,
)


@pytest.fixture(autouse=True)
def _clock_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dflash.model, "_cuda_time", time.perf_counter)


def draft_rows(backend: OnnxRuntimeBackend) -> int:
    (rows,) = {array.shape[2] for array in backend._states["draft"].arrays.values()}
    return rows


def draft_bytes(backend: OnnxRuntimeBackend) -> int:
    return sum(array.nbytes for array in backend._states["draft"].arrays.values())


# --- The rows by themselves ---


@settings(deadline=None, max_examples=100)
@given(data=st.data(), size=st.integers(1, 30), chunk=st.integers(1, 40), block=st.integers(2, 8))
def test_a_block_finds_its_window(data: st.DataObject, size: int, chunk: int, block: int) -> None:
    """Caches of positions: every draft must see the ``size`` rows before it, put there by injections."""
    spec = StateSpec(name="draft", kind="window", graphs=("draft",), tensors=("key.0",), window=size)
    tensor = TensorSpec("key.0", "int64", ("batch", 1, "capacity", 1))
    kept = WindowState(spec, [tensor], 1, most_rows=max(chunk, block), block_size=block)
    kept.move(kept.allocate(10**6))
    cache = kept.arrays["key.0"]

    def write(position: int, rows: int, values: Any) -> None:
        (row,) = kept.place(np.array([position]), rows).tolist()
        assert row + kept.offset[0] == position
        cache[0, 0, row : row + rows, 0] = values
        if np.isscalar(values):  # a block: what does it see?
            seen = cache[0, 0, max(row - size, 0) : row, 0]
            assert seen.tolist() == list(range(max(position - size, 0), position))

    for _ in range(2):  # the second sequence begins at 0 again
        kept.restart(np.array([True]))
        cache[:] = -1
        position = 0
        for _ in range(data.draw(st.integers(1, 12))):
            rows = data.draw(st.integers(1, chunk))
            write(position, rows, np.arange(position, position + rows))
            position += rows
        for _ in range(data.draw(st.integers(1, 60))):
            write(position, block, -2)
            write(position, block, np.arange(position, position + block))  # the verified block's features
            position += data.draw(st.integers(1, block))


# --- On graphs ---


def test_tokens_stay_those_of_the_reference(tmp_path: Path) -> None:
    spec = TargetSpec("mistral", vocab=6, tied=False, head_dim=16)
    raw = drafter_config(spec, layers=2, block_size=3, **window(5, SLIDING, SLIDING, is_causal=False))
    target = make_target(tmp_path / "target", spec, seed=7, spread=0.2)
    make_drafter(tmp_path / "drafter", raw, seed=1007, spread=0.2)
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle", prefill_chunk=8)
    reference = Reference(target, reference_drafter(tmp_path / "drafter"))
    backend = OnnxRuntimeBackend(bundle, threads=1)
    for rows in (500, 20):  # the second sequence begins at 0 again
        prompt = np.random.default_rng(rows).integers(0, spec.vocab, rows).tolist()
        expected = reference.run(prompt, 150, 3)
        assert reference.least_margin > LEAST_MARGIN
        ours = run_loop(backend, bundle, prompt, 150, 3)
        assert ours.token_ids == expected.token_ids
        assert ours.accepted[: len(expected.accepted)] == expected.accepted
        assert len(set(expected.accepted)) == 3
    assert backend.capacity > 600
    assert draft_rows(backend) == 5 + 8 + 3 + 64


def test_windows_from_the_anchor(tmp_path: Path) -> None:
    spec = TargetSpec("qwen3", vocab=5)
    raw = speculators_config(spec, layer_types=[SLIDING], block_size=3, own_vocab=4, window=4)
    target = make_target(tmp_path / "target", spec, seed=8, spread=0.5)
    folder = make_speculators(tmp_path / "drafter", raw, seed=1008, spread=0.5)
    bundle = build(tmp_path / "target", folder, tmp_path / "bundle", prefill_chunk=8)
    reference = SpeculatorsLoop(target, folder)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    prompt = np.random.default_rng(1).integers(0, spec.vocab, 200).tolist()
    expected = reference.run(prompt, 60, 2)
    assert reference.least_margin > LEAST_MARGIN
    assert run_loop(backend, bundle, prompt, 60, 3) == expected
    assert len(set(expected.accepted)) == 3
    assert draft_rows(backend) < 100


@pytest.mark.slow
def test_memory_is_flat_from_1k_to_32k(tmp_path: Path) -> None:
    spec = TargetSpec("smollm2", vocab=6, heads=1, kv_heads=1, hidden=16, layers=1, positions=33000)
    raw = drafter_config(
        spec, layers=1, block_size=4, dflash_config={"target_layer_ids": [0]}, **window(64, SLIDING)
    )
    target = make_target(tmp_path / "target", spec, seed=4, spread=0.5)
    make_drafter(tmp_path / "drafter", raw, seed=1004, spread=0.5)
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle", prefill_chunk=256)
    reference = Reference(target, reference_drafter(tmp_path / "drafter"))
    backend = OnnxRuntimeBackend(bundle, threads=2)
    prompt = np.random.default_rng(2).integers(0, spec.vocab, 32000).tolist()
    bytes_at = {}
    for rows in (1000, 32000):
        expected = reference.run(prompt[:rows], 30, 4)
        assert reference.least_margin > LEAST_MARGIN
        ours = run_loop(backend, bundle, prompt[:rows], 30, 4)
        assert ours.token_ids == expected.token_ids
        assert ours.accepted[: len(expected.accepted)] == expected.accepted
        bytes_at[rows] = draft_bytes(backend)
    assert backend.capacity > 32000
    assert bytes_at[1000] == bytes_at[32000] == 2 * 2 * 8 * 4 * (64 + 256 + 4 + 64)
