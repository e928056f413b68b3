"""The builder's parts that need no TensorRT: options, devices, profiles, headers, progress, timings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dflash_export.cli import main
from dflash_export.engines import compiler, devices
from dflash_export.engines.builder import BuildMonitor, default_timing_folder, timing_path, use_timings
from dflash_export.engines.compiler import graph_profiles
from dflash_export.engines.devices import Gpu, check_targets, present_gpu
from dflash_export.engines.options import ByteSize
from dflash_export.engines.vendor import BACKENDS, Vendor, load_vendor
from dflash_export.errors import EngineBuildError
from dflash_rt import Bundle
from dflash_rt.bundle.engine_sets import AxisRange, EngineLimits
from dflash_rt.errors import BackendUnavailableError
from tests.rt.bundle_maker import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_bundle(tmp_path / "bundle"))


def vendor(backend: str, version: str = "11.4.0.106", sms: tuple[int, ...] = ()) -> Vendor:
    """A library that only has a version and a list of GPUs."""
    members = {"NONE": 0, "CURRENT": 1, **{f"SM{number}": number for number in sms}}
    capability = SimpleNamespace(__members__=members)
    return Vendor(backend, SimpleNamespace(__version__=version, ComputeCapability=capability))  # type: ignore[arg-type]


RTX = vendor("tensorrt-rtx", "1.7.1", (75, 80, 86, 89, 120, 121))
TRT = vendor("tensorrt")


# --- Libraries ---


def test_an_unknown_backend() -> None:
    with pytest.raises(EngineBuildError, match="unknown engine backend") as caught:
        load_vendor("onnxruntime")
    assert "expected: tensorrt, tensorrt-rtx" in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_library_that_is_not_installed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    with pytest.raises(BackendUnavailableError) as caught:
        load_vendor(backend)
    assert f"pip install 'dflash-export[{backend}]'" in str(caught.value)


@pytest.mark.parametrize(("version", "fits"), [("10.14.1", False), ("10.15.0", True), ("11.4.0.106", True)])
def test_a_library_that_is_too_old(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))  # type: ignore[misc]
    if fits:
        assert load_vendor("tensorrt").version == version
    else:
        with pytest.raises(BackendUnavailableError, match="tensorrt is too old"):
            load_vendor("tensorrt")


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible"])
def test_options_that_only_one_library_has(option: str) -> None:
    options = {"version_compatible": False, "hardware_compatible": False, option: True}
    TRT.check_options(**options)
    with pytest.raises(EngineBuildError, match=f"--{option.replace('_', '-')} is not for tensorrt-rtx"):
        RTX.check_options(**options)


# --- Devices ---


def test_targets_without_a_gpu() -> None:
    assert check_targets(RTX, None, ()) == (None, (80, 86, 89, 120, 121))
    assert check_targets(RTX, None, (120, 75, 120)) == (None, (75, 120))
    assert check_targets(RTX, "rtx-4090", ()) == (None, (89,))


@pytest.mark.parametrize(
    ("library", "device", "capabilities", "message"),
    [
        (RTX, None, (90,), "can't build for this GPU"),
        (RTX, "rtx-4090", (89,), "say the same thing"),
        (RTX, "h100", (), "can't run engines of tensorrt-rtx"),
        (RTX, "rtx-3090", (), "unknown device class"),
        (TRT, None, (90,), "builds for the GPU that it runs on"),
        (TRT, "jetson-thor", (), "this machine is not a Jetson Thor"),
    ],
)
def test_targets_that_can_not_be_met(
    library: Vendor,
    device: str | None,
    capabilities: tuple[int, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "present_gpu", lambda: Gpu("H100", 90))
    with pytest.raises(EngineBuildError, match=message):
        check_targets(library, device, capabilities)


def test_tensorrt_builds_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("H100", 90)
    monkeypatch.setattr(devices, "present_gpu", lambda: gpu)
    assert check_targets(TRT, "h100", ()) == (gpu, (90,))
    monkeypatch.setattr(devices, "present_gpu", lambda: None)
    with pytest.raises(EngineBuildError, match="found: no GPU"):
        check_targets(TRT, "h100", ())


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_targets(RTX, None, (), fp8=True) == (None, (89, 120, 121))
    with pytest.raises(EngineBuildError, match=r"sm86 has no FP8"):
        check_targets(RTX, None, (86, 89), fp8=True)
    # By the class alone: on a workstation, before an export of minutes.
    with pytest.raises(EngineBuildError, match=r"(?s)Jetson Orin.*no FP8.*8\.7.*--int8 or --int4"):
        check_targets(TRT, "jetson-orin", (), fp8=True)
    monkeypatch.setattr(devices, "present_gpu", lambda: Gpu("A100", 80))
    with pytest.raises(EngineBuildError, match="A100 has no FP8"):
        check_targets(TRT, None, (), fp8=True)


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_export.engines.devices._DRIVER", "libcuda-that-is-not-there.so")
    assert present_gpu() is None


# --- Profiles ---


@pytest.mark.parametrize(("max_seq_len", "chunk", "embedded"), [(64, 8, 8), (3, 3, 4)])
def test_profiles(bundle: Bundle, max_seq_len: int, chunk: int, embedded: int) -> None:
    manifest = bundle.manifest
    limits = EngineLimits(max_seq_len=max_seq_len, capacity=max_seq_len + 4, max_batch=3)
    found = {
        (graph, profile.name): (profile.rows.min, profile.rows.opt, profile.rows.max, profile.batch)
        for graph in manifest.graphs
        for profile in graph_profiles(graph, manifest, limits)
    }
    batch = AxisRange(1, 1, 3)  # tuned for one sequence, which is what the backends decode
    assert found == {
        ("embed", "prefill"): (1, embedded, embedded, batch),
        ("target", "prefill"): (1, chunk, chunk, batch),
        ("target", "block"): (1, 4, 4, batch),
        ("lm_head", "block"): (1, 4, 4, batch),
        ("inject", "prefill"): (1, chunk, chunk, batch),
        ("inject", "block"): (1, 4, 4, batch),
        ("draft", "block"): (1, 4, 4, batch),
    }


# --- Options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 65}, "max_seq_len is out of range"),
        ({"max_seq_len": 0}, "max_seq_len is out of range"),
        ({"max_batch": 0}, "max_batch is out of range"),
        ({"max_batch": True}, "max_batch is out of range"),
        ({"workspace": 0}, "workspace is out of range"),
    ],
)
def test_options_out_of_range(
    bundle: Bundle, options: Mapping[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "load_vendor", lambda backend: RTX)
    with pytest.raises(EngineBuildError, match=message):
        compiler.compile_engines(bundle, backend="tensorrt-rtx", **options)


@pytest.mark.parametrize(("text", "size"), [("5", 5), ("2K", 2048), ("64M", 2**26), ("3G", 3 * 2**30)])
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "1.5G", "1T", "-1", "64MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        ByteSize().convert(text, None, None)


def test_engine_options_want_a_backend() -> None:
    arguments = ["build", "--target", "t", "--drafter", "d", "-o", "o", "--sm", "89", "--max-batch", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--max-batch, --sm is about engines: give --backend as well" in result.output


def test_a_backend_that_can_not_build_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    output = tmp_path / "out"
    arguments = ["build", "--target", "t", "--drafter", "d", "-o", str(output), "--backend", "tensorrt"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "the tensorrt library can't be imported" in result.output
    assert not output.exists()


# --- Progress ---


class Told:
    """A stage that adds up."""

    def __init__(self) -> None:
        self.total = 0.0

    def advance(self, amount: float = 1) -> None:
        assert amount > 0
        self.total += amount


def test_nested_phases_are_one_fraction() -> None:
    told = Told()
    monitor = BuildMonitor(told)
    monitor.start("all", None, 4)
    assert monitor.step("all", 0)
    assert told.total == pytest.approx(0.25)
    monitor.start("part", "all", 2)
    monitor.step("part", 0)
    assert told.total == pytest.approx(0.375)
    monitor.finish("part")
    monitor.start("part", "all", 2)  # the same name again: no step back
    monitor.step("part", 0)
    assert told.total == pytest.approx(0.375)
    monitor.step("unknown", 3)
    monitor.step("all", 3)
    assert told.total == pytest.approx(1.0)


def test_a_cancelled_build_is_told_to_stop() -> None:
    monitor = BuildMonitor(Told())
    monitor.start("all", None, 2)
    monitor.cancelled = True
    assert not monitor.step("all", 0)


# --- Timings ---


class Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: Cache, ignore_mismatch: bool) -> None:
        self.data += other.data

    def serialize(self) -> bytes:
        return self.data


class Config:
    """As much of IBuilderConfig as keeps timings. ``broken`` caches belong to another library version."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, data: bytes) -> Cache | None:
        return None if data == b"broken" else Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True


def test_timings_are_kept_and_joined(tmp_path: Path) -> None:
    gpu = Gpu("NVIDIA H100 80GB HBM3", 90)
    path = timing_path(tmp_path / "timings", TRT, gpu)
    assert path.name == "tensorrt-11.4.0.106-NVIDIA-H100-80GB-HBM3-sm90.timings"
    config = Config()
    with use_timings(config, TRT, gpu, path.parent):
        assert config.cache is not None
        config.cache.data += b"first "
    assert path.read_bytes() == b"first "
    with use_timings(config, TRT, gpu, path.parent):
        assert config.cache.data == b"first "
        path.write_bytes(b"another ")  # a build at the same time
    assert path.read_bytes() == b"first another "
    path.write_bytes(b"broken")
    with use_timings(config, TRT, gpu, path.parent):
        config.cache.data = b"new"
    assert path.read_bytes() == b"new"


def test_no_timings_without_a_gpu(tmp_path: Path) -> None:
    with use_timings(None, RTX, None, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_timings_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_timing_folder() == tmp_path / "dflash-export" / "timings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_timing_folder() == Path.home() / ".cache" / "dflash-export" / "timings"
