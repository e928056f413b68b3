"""How long a step takes at least: what it reads, and how fast this machine reads."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_bench.floor import (
    measure_read_bandwidth,
    step_floor,
    weight_bytes,
)
from dflash_bench.machine import load_average, package_versions
from dflash_rt.errors import (
    IntegrityError,
)
from dflash_rt.machine import cpu_name, physical_cores
from tests.bench.parts import bundle_with_graphs, write_graph


def test_weight_bytes(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    assert write_graph(path) == weight_bytes(path)
    assert len(onnx.load(path, load_external_data=False).graph.initializer) == 3


def test_weight_bytes_refuses_what_is_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    write_graph(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(IntegrityError, match=r"graph.onnx can't be read as an ONNX file"):
        weight_bytes(path)
    with pytest.raises(IntegrityError, match="what to do: copy the bundle again"):
        weight_bytes(tmp_path / "missing.onnx")


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=60))
def test_weight_bytes_of_anything_is_a_number_or_our_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.onnx"
    path.write_bytes(data)
    with contextlib.suppress(IntegrityError):
        assert weight_bytes(path) >= 0


def test_step_floor_counts_what_a_step_reads(tmp_path: Path) -> None:
    bundle = bundle_with_graphs(tmp_path / "b")
    plain, drafted = step_floor(bundle, 1), step_floor(bundle, 4)
    assert plain is not None
    assert drafted is not None
    assert plain.weight_bytes == 2 * 4936
    assert plain.milliseconds(1e6) == pytest.approx(9.872)
    assert plain.operations == 2 * 2 * 1234
    assert drafted.weight_bytes == 5 * 4936
    assert drafted.operations == 2 * 1234 * (4 + 4 + 4 + 4 + 3)  # the head sees no anchor in the draft


def test_a_mixture_of_experts_has_no_floor(tmp_path: Path) -> None:
    assert step_floor(bundle_with_graphs(tmp_path / "b", model_type="qwen3_moe"), 1) is None


def test_the_machine_is_measured_and_named() -> None:
    assert measure_read_bandwidth(2, size=2**20, rounds=2) > 0
    assert physical_cores() >= 1
    assert cpu_name()
    assert (load_average() or 0) >= 0
    assert package_versions()["numpy"] == np.__version__
