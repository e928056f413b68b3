"""What a build is configured with: the real library's network and configuration, as its builder gets them."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from dflash_export import build, compile_engines
from dflash_export.cli import choose_precision, main
from dflash_export.engines import builder, compiler
from dflash_export.engines.builder import EngineJob, build_engine, prepare, timing_path
from dflash_export.engines.devices import Gpu
from dflash_export.engines.network import Network
from dflash_export.engines.vendor import Vendor, load_vendor
from dflash_export.errors import EngineBuildError
from dflash_export.progress import SILENT
from dflash_rt import Bundle
from dflash_rt.bundle.engine_sets import AxisRange, ProfileSpec
from dflash_rt.bundle.manifest import GraphSpec
from tests.export.engines.built import Handed, watch_builds
from tests.export.engines.test_refusals import Case
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target
from tests.rt.bundle_maker import manifest_document, write_bundle

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="engines are built: pip install 'dflash-export[tensorrt-rtx]'"
)


@pytest.fixture(scope="module")
def vendor() -> Vendor:
    return load_vendor("tensorrt-rtx")


def like_tensorrt(**other: Any) -> Vendor:
    """The real library in the part of TensorRT: no list of GPUs, timings are kept."""
    return Vendor("tensorrt", Proxy(trt, **other))  # type: ignore[arg-type]


class Proxy:
    """``real`` with other attributes, and without some of its own."""

    def __init__(self, real: Any, *, lacks: tuple[str, ...] = (), **other: Any) -> None:
        self.__dict__.update(other, _real=real, _lacks=lacks)

    def __getattr__(self, name: str) -> Any:
        if name in self._lacks:
            raise AttributeError(name)
        return getattr(self._real, name)


def handed(vendor: Vendor, job: EngineJob) -> Handed:
    with watch_builds(trt) as builds:
        build_engine(vendor, job, SILENT)
    (only,) = builds
    return only


def keyed(job: EngineJob, **changes: Any) -> EngineJob:
    return replace(job, build=replace(job.build, **changes))


# --- CI sees everything ---


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the libraries' wheels are for it"
)
@pytest.mark.parametrize("module", ["tensorrt_rtx", "modelopt"])
def test_what_other_tests_would_be_skipped_without(module: str) -> None:
    """`make setup` installs it; without it every test of engines or of calibration is skipped."""
    assert importlib.util.find_spec(module) is not None


# --- Profiles ---


def test_every_profile_is_handed_over(vendor: Vendor, tmp_path: Path) -> None:
    batch = AxisRange(1, 2, 3)
    profiles = (
        ProfileSpec(name="prefill", batch=batch, rows=AxisRange(1, 8, 16)),
        ProfileSpec(name="block", batch=batch, rows=AxisRange(2, 3, 4)),
    )
    job = replace(Case().job(tmp_path), profiles=profiles)
    caches = ((1, 2, 64, 64), (2, 2, 64, 64), (3, 2, 64, 64))
    others = {"start": ((1,), (2,), (3,)), "key.0": caches, "value.0": caches}
    assert handed(vendor, job).profiles == [
        {"embeddings": ((1, 1, 128), (2, 8, 128), (3, 16, 128)), **others},
        {"embeddings": ((1, 2, 128), (2, 3, 128), (3, 4, 128)), **others},
    ]


def test_a_profile_that_is_not_taken(vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.IBuilderConfig, "add_optimization_profile", lambda config, profile: -1)
    with pytest.raises(EngineBuildError, match="no engine for draft: its profile block was not taken"):
        build_engine(vendor, Case().job(tmp_path), SILENT)


# --- Options ---


def test_what_is_always_set(vendor: Vendor, tmp_path: Path) -> None:
    """No TF32, which the library sets by itself, and nothing allocated while a step is captured."""
    fresh = trt.Builder(trt.Logger()).create_builder_config()
    assert fresh.get_flag(trt.BuilderFlag.TF32)
    config = handed(vendor, Case().job(tmp_path))
    assert config.flags == {"REQUIRE_USER_ALLOCATION"}
    assert config.targets == ["SM89"]


def test_a_flag_that_the_library_does_not_have(tmp_path: Path) -> None:
    known = {name: flag for name, flag in trt.BuilderFlag.__members__.items() if name != "STRICT_NANS"}
    del known["REQUIRE_USER_ALLOCATION"]
    old = like_tensorrt(BuilderFlag=SimpleNamespace(**known))
    assert handed(old, replace(Case().job(tmp_path), timing_folder=tmp_path)).flags == set()


@pytest.mark.parametrize("graph", ["accept", "draft_check"])
def test_graphs_that_check_numbers_are_strict(vendor: Vendor, tmp_path: Path, graph: str) -> None:
    job = Case().job(tmp_path)
    job = EngineJob(graph, job.spec, job.header, job.profiles, job.build)
    assert handed(vendor, job).flags == {"REQUIRE_USER_ALLOCATION", "STRICT_NANS"}


def test_workspace(vendor: Vendor, tmp_path: Path) -> None:
    job = Case().job(tmp_path)
    assert handed(vendor, keyed(job, workspace=64 * 2**20)).workspace == 64 * 2**20
    assert handed(vendor, job).workspace > 64 * 2**20


def test_targets(vendor: Vendor, tmp_path: Path) -> None:
    job = keyed(Case().job(tmp_path), compute_capabilities=(86, 89, 120))
    assert handed(vendor, job).targets == ["SM86", "SM89", "SM120"]


def configured(vendor: Vendor, job: EngineJob) -> Any:
    """Not built: TensorRT-RTX, which plays TensorRT here, can't build with these two options."""
    return builder._configure(vendor, job, prepare(vendor, job))


def test_version_compatible(tmp_path: Path) -> None:
    job = Case().job(tmp_path)
    flag = trt.BuilderFlag.VERSION_COMPATIBLE
    assert not configured(like_tensorrt(), job).get_flag(flag)
    assert configured(like_tensorrt(), keyed(job, version_compatible=True)).get_flag(flag)


def test_hardware_compatible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set is noted: TensorRT-RTX ignores it."""
    levels: list[Any] = []
    noting = property(fset=lambda config, level: levels.append(level))
    monkeypatch.setattr(trt.IBuilderConfig, "hardware_compatibility_level", noting)
    configured(like_tensorrt(), Case().job(tmp_path))
    assert levels == []
    configured(like_tensorrt(), keyed(Case().job(tmp_path), hardware_compatible=True))
    assert levels == [trt.HardwareCompatibilityLevel.AMPERE_PLUS]


def test_a_build_uses_and_keeps_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    monkeypatch.setattr(trt.IBuilderConfig, "create_timing_cache", lambda config, data: Timings(data))
    monkeypatch.setattr(
        trt.IBuilderConfig, "set_timing_cache", lambda config, cache, mismatch: used.append(cache) or True
    )
    vendor, gpu = like_tensorrt(), Gpu("a GPU", 89)
    path = timing_path(tmp_path, vendor, gpu)
    path.write_bytes(b"earlier")
    with watch_builds(trt):
        build_engine(vendor, replace(Case().job(tmp_path), gpu=gpu, timing_folder=tmp_path), SILENT)
    assert [cache.data for cache in used] == [b"earlier"]
    assert path.read_bytes() == b"earlier, and more"


class Timings:
    """As much of ITimingCache as keeps them; TensorRT-RTX has none."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: Timings, ignore_mismatch: bool) -> None:
        assert other.data == self.data

    def serialize(self) -> bytes:
        return self.data + b", and more"


# --- Libraries that lack something, or fail ---


class OldAttention:
    """An attention of TensorRT 10, whose class has no ``key_value_lengths``."""

    _own = ("causal", "decomposable", "get_input", "mask", "name", "set_input")

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)

    def __getattr__(self, name: str) -> Any:
        if name not in self._own:
            raise AttributeError(name)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._own:
            raise AttributeError(name)
        setattr(self._real, name, value)


@pytest.fixture
def old_vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vendor]:
    """TensorRT-RTX with the attention of TensorRT 10."""
    real = Network.attentions
    with monkeypatch.context() as patch:
        patch.setattr(Network, "attentions", lambda network: [OldAttention(each) for each in real(network)])
        old = Proxy(trt, lacks=("CausalMaskKind",), IAttention=OldAttention)
        yield Vendor("tensorrt-rtx", old)  # type: ignore[arg-type]


def test_a_library_without_lengths_builds(old_vendor: Vendor, tmp_path: Path) -> None:
    plan = build_engine(old_vendor, Case("bf16").job(tmp_path), SILENT)
    assert len(memoryview(plan)) > 1000


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_builder_that_can_not_start(tmp_path: Path, error: type[Exception]) -> None:
    def start(logger: Any) -> Any:
        logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise error("pybind11::init(): factory function returned nullptr")

    with pytest.raises(EngineBuildError, match=r"(?s)tensorrt can't start.*failure with error: 35"):
        prepare(like_tensorrt(Builder=start), Case().job(tmp_path))


# --- Precision ---


SPEC = TargetSpec("qwen3", tied=False, vocab=40, hidden=64, heads=4, kv_heads=2, head_dim=16, layers=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_target(folder / "target", SPEC)
    make_drafter(folder / "drafter", drafter_config(SPEC, head_dim=16))
    return folder


def arguments(pair: Path, output: Path, *more: str) -> list[str]:
    sources = ["--target", str(pair / "target"), "--drafter", str(pair / "drafter"), "-o", str(output)]
    return ["build", *sources, "--max-seq-len", "28", "--sm", "89", *more]


def caches(graph: GraphSpec) -> set[str]:
    return {tensor.dtype for tensor in graph.inputs if tensor.name in graph.aliases.values()}


def test_engines_get_16_bits_unless_told(pair: Path, tmp_path: Path) -> None:
    """The options of the README: caches in 16 bits, without a word about precision."""
    few = ["--calib-limit", "1", "--calib-tokens", "2", "--no-measure-quantization"]
    more = ["--backend", "tensorrt-rtx", "--fp8", *few]
    result = CliRunner().invoke(main, arguments(pair, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output
    assert "precision: bf16, for engines of tensorrt-rtx" in result.stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.precision == "bf16"
    assert caches(manifest.graphs["target"]) == caches(manifest.graphs["draft"]) == {"bfloat16"}


def test_a_precision_that_was_given_stays() -> None:
    given = {"target": "t", "drafter": "d", "precision": "fp32"}
    assert choose_precision(given, "tensorrt") == given
    assert choose_precision({"target": "t", "drafter": "d"}, "tensorrt")["precision"] == "bf16"


def test_a_quantised_target_in_fp32_gets_no_engines(pair: Path, tmp_path: Path) -> None:
    more = ["--backend", "tensorrt-rtx", "--int4", "--precision", "fp32"]
    result = CliRunner().invoke(main, arguments(pair, tmp_path / "out", *more))
    assert result.exit_code == 1
    assert "no engines of a target in int4 with caches and activations in fp32" in result.stderr
    assert "build the bundle with --precision bf16" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_bundle_in_fp32_whose_target_is_quantised(tmp_path: Path) -> None:
    document = manifest_document()
    nothing = dict.fromkeys(("activations", "head", "drafter", "calibration", "cost"))
    sizes = {"block_size": 32, "bytes": 1, "bytes_before": 4}
    document["quantization"] = {"weights": "int4", "method": "rtn", **sizes, **nothing}
    with pytest.raises(EngineBuildError, match="no engines of a target in int4"):
        compile_engines(write_bundle(tmp_path / "bundle", document), backend="tensorrt-rtx")


def test_a_library_without_lengths_is_told_of(
    pair: Path, tmp_path: Path, old_vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every graph of a bundle becomes an engine, and each time its cost is named."""
    monkeypatch.setattr(compiler, "load_vendor", lambda backend: old_vendor)
    bundle = build(pair / "target", pair / "drafter", tmp_path / "out", precision="bf16", max_seq_len=28)
    command = ["compile", str(bundle.root), "--backend", "tensorrt-rtx", "--sm", "89"]
    for counts in (f"built {len(bundle.manifest.graphs)}, reused 0", "built 0"):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert counts in result.stderr
        assert "attention costs the whole of --max-seq-len at every length" in result.stderr
