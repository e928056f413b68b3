"""Engines of whole bundles, built for real. TensorRT-RTX needs no GPU for that; no engine is run."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import pytest
from click.testing import CliRunner

from dflash_export import build, compile_engines
from dflash_export.cli import main
from dflash_export.engines import compiler
from dflash_export.engines.builder import EngineJob
from dflash_export.engines.compiler import link_engine
from dflash_export.engines.vendor import load_vendor
from dflash_export.errors import EngineBuildError
from dflash_rt import Bundle
from dflash_rt.bundle.engine_match import Machine, find_engines
from dflash_rt.bundle.engine_sets import EngineFile, EngineSet, read_engines
from dflash_rt.bundle.folder import hash_file
from dflash_rt.errors import IntegrityError, OutputError
from tests.export.engines.built import check_handed, watch_builds
from tests.marks import slow_but
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

pytest.importorskip("tensorrt_rtx", reason="engines are built: pip install 'dflash-export[tensorrt-rtx]'")

FAMILIES = ("qwen3", "qwen2", "smollm2", "llama3", "mistral", "qwen3_moe")
_SMS = (80, 86, 89, 120, 121)

MakeBundle = Callable[[str, str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Bundles of tiny pairs by family and precision, each exported once."""
    made: dict[tuple[str, str], Bundle] = {}
    root = tmp_path_factory.mktemp("bundles")

    def bundle(family: str, precision: str) -> Bundle:
        if (family, precision) not in made:
            # 16 is the smallest head size with a fused kernel.
            spec = TargetSpec(family, hidden=64, heads=4, kv_heads=2, head_dim=16, layers=2)
            target, drafter = root / f"{family}-target", root / f"{family}-drafter"
            if not target.exists():
                make_target(target, spec)
                make_drafter(drafter, drafter_config(spec, head_dim=16, **drafter_changes(family)))
            output = root / f"{family}-{precision}"
            made[family, precision] = build(
                target, drafter, output, precision=precision, max_seq_len=60, prefill_chunk=16
            )
        return made[family, precision]

    return bundle


def drafter_changes(family: str) -> dict[str, object]:
    """Mistral's drafter has a sliding layer, one changes logits; the others attend to everything."""
    if family == "mistral":
        layers = ["sliding_attention", "full_attention"]
        return {"layer_types": layers, "sliding_window": 6, "use_sliding_window": True}
    if family == "qwen2":
        dflash = {"final_logit_softcapping": 30.0, "output_multiplier": 0.5, "input_embedding_scale": 2.0}
        return {"dflash_config": dflash}
    return {}


@pytest.fixture
def bundle(bundles: MakeBundle, tmp_path: Path) -> Bundle:
    """A copy of one bundle without engines, that a test may change."""
    source = bundles("qwen3", "fp32").root
    root = tmp_path / "bundle"
    root.mkdir()
    for name in ("manifest.json", *bundles("qwen3", "fp32").manifest.files):
        (root / name).write_bytes((source / name).read_bytes())
    return Bundle.open(root)


def quickly(bundle: Bundle, **options: object) -> compiler.CompiledEngines:
    return compile_engines(bundle, backend="tensorrt-rtx", compute_capabilities=(89,), **options)  # type: ignore[arg-type]


# --- Every family in every precision ---


PRECISIONS = ("fp32", "fp16", "bf16")
# Each family once; the precisions take turns.
FAST = list(zip(FAMILIES, cycle(PRECISIONS), strict=False))


@pytest.mark.parametrize(("family", "precision"), slow_but(product(FAMILIES, PRECISIONS), *FAST))
def test_every_graph_is_built(bundles: MakeBundle, family: str, precision: str) -> None:
    bundle = bundles(family, precision)
    with watch_builds(load_vendor("tensorrt-rtx").trt) as builds:
        result = compile_engines(bundle, backend="tensorrt-rtx")
    assert result.built == tuple(bundle.manifest.graphs)
    assert result.notes == ()
    assert read_engines(result.folder) == result.engines
    check_record(result.engines, bundle, result.folder)
    for graph, handed in zip(result.built, builds, strict=True):
        check_handed(handed, bundle, graph, capacity=64, chunk=16, block=4, sms=_SMS)


def check_record(engines: EngineSet, bundle: Bundle, folder: Path) -> None:
    assert engines.build.compute_capabilities == _SMS
    assert engines.build.precision == bundle.manifest.precision
    assert (engines.limits.max_seq_len, engines.limits.capacity, engines.limits.max_batch) == (60, 64, 1)
    rows = {
        graph: [(p.name, p.rows.min, p.rows.opt, p.rows.max) for p in spec.profiles]
        for graph, spec in engines.engines.items()
    }
    prefill, block = ("prefill", 1, 16, 16), ("block", 1, 4, 4)
    logits = {"draft_logits": [block]} if "draft_logits" in bundle.manifest.graphs else {}
    assert rows == logits | {
        "embed": [prefill],
        "target": [prefill, block],
        "lm_head": [block],
        "inject": [prefill, block],
        "draft": [block],
        "accept": [block],
        "draft_check": [block],
    }
    for graph, file in engines.files.items():
        record = hash_file(folder / file.name)
        assert (file.name, file.size, file.sha256) == (f"{graph}.engine", record.size, record.sha256)
        assert bundle.manifest.graphs[graph].path in engines.engines[graph].sources
    assert set(engines.engines["draft"].sources) == {"draft.onnx", "drafter.data"}


def test_the_demo_pair(smollm2_bundle: Bundle) -> None:
    result = compile_engines(smollm2_bundle, backend="tensorrt-rtx", max_seq_len=1016, device="rtx-4090")
    assert result.built == tuple(smollm2_bundle.manifest.graphs)
    assert result.engines.limits.capacity == 1024
    sizes = {graph: file.size for graph, file in result.engines.files.items()}
    data = smollm2_bundle.manifest.files["target.data"].size
    # Each weight once: the profiles share them.
    assert data < sizes["target"] < 1.2 * data


# --- Building again ---


def test_the_same_key_does_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quickly(bundle)
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(compiler, "build_engine", None)
    again = quickly(bundle, max_seq_len=60, max_batch=1)
    assert (again.folder, again.engines, again.built) == (first.folder, first.engines, ())
    assert again.reused == tuple(bundle.manifest.graphs)
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_a_changed_key_builds_only_what_changed(bundle: Bundle) -> None:
    first = quickly(bundle)
    second = quickly(bundle, max_seq_len=40)
    assert second.folder != first.folder
    assert set(second.built) == {"draft", "inject", "target"}
    assert set(second.reused) == {"embed", "lm_head", "accept", "draft_check"}
    assert second.engines.limits.capacity == 44
    for graph in second.reused:
        assert os.path.samefile(first.folder / f"{graph}.engine", second.folder / f"{graph}.engine")
    third = quickly(bundle, max_batch=2)
    assert set(third.built) == set(bundle.manifest.graphs)
    machine = Machine(
        backend="tensorrt-rtx",
        backend_version=first.engines.build.backend_version,
        gpu="any",
        compute_capability=89,
    )
    assert find_engines(bundle, machine, max_seq_len=30) == (second.folder, second.engines)
    assert find_engines(bundle, machine, max_seq_len=50, batch=2) == (third.folder, third.engines)


def cut(path: Path) -> None:
    os.truncate(path, 10)


def change(path: Path) -> None:
    """One bit of the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, change])
def test_damaged_engines_are_built_again(bundle: Bundle, damage: Callable[[Path], None]) -> None:
    first = quickly(bundle)
    damage(first.folder / "target.engine")
    again = quickly(bundle)
    assert again.folder == first.folder
    assert again.built == tuple(bundle.manifest.graphs)
    read_engines(again.folder)


def test_a_changed_engine_is_not_taken_over(bundle: Bundle) -> None:
    first = quickly(bundle)
    change(first.folder / "embed.engine")
    second = quickly(bundle, max_seq_len=40)
    assert set(second.built) == {"draft", "inject", "target", "embed"}
    assert set(second.reused) == {"lm_head", "accept", "draft_check"}


def test_two_builds_at_once(bundle: Bundle) -> None:
    """The second waits for the first, and finds everything done."""
    results: list[compiler.CompiledEngines] = []
    threads = [threading.Thread(target=lambda: results.append(quickly(bundle))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graphs = tuple(bundle.manifest.graphs)
    assert sorted(result.built for result in results) == [(), graphs]
    assert visible(bundle) == [results[0].folder.name]


def visible(bundle: Bundle) -> list[str]:
    return sorted(path.name for path in (bundle.root / "engines").iterdir() if path.name != ".lock")


def test_a_failed_build_leaves_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler.build_engine

    def fail_late(vendor: object, job: EngineJob, progress: object) -> object:
        if job.graph == "target":
            raise EngineBuildError("no engine today")
        return real(vendor, job, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "build_engine", fail_late)
    with pytest.raises(EngineBuildError, match="no engine today"):
        quickly(bundle)
    assert visible(bundle) == []


def test_changed_weights_are_noticed(bundle: Bundle) -> None:
    path = bundle.root / "target.data"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"target\.data: found sha256"):
        quickly(bundle)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT, and between two disks: the engine is copied."""

    def refuse(source: Path, path: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    (tmp_path / "old").write_bytes(b"engine")
    record = hash_file(tmp_path / "old")
    file = EngineFile("old", record.size, record.sha256)
    monkeypatch.setattr(os, "link", refuse)
    assert link_engine(tmp_path / "old", file, tmp_path / "new").name == "new"
    assert (tmp_path / "new").read_bytes() == b"engine"
    assert not os.path.samefile(tmp_path / "old", tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_bundle_that_can_not_be_written(bundle: Bundle) -> None:
    bundle.root.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="can't write to"):
            quickly(bundle)
    finally:
        bundle.root.chmod(0o700)


# --- The commands ---


def test_compile_prints_the_folder(bundle: Bundle) -> None:
    arguments = [
        "compile",
        str(bundle.root),
        "--backend",
        "tensorrt-rtx",
        "--max-seq-len",
        "32",
        "--sm",
        "89",
    ]
    result = CliRunner().invoke(main, [*arguments, "--workspace", "64M"])
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    assert read_engines(folder).build.workspace == 64 * 2**20
    assert "building target" in result.stderr
    assert f"built {len(bundle.manifest.graphs)}, reused 0" in result.stderr


def test_build_compiles_afterwards(bundles: MakeBundle, tmp_path: Path) -> None:
    pair = bundles("qwen3", "fp32").root.parent
    # max_seq_len is less than the default prefill_chunk.
    sources = ["--target", str(pair / "qwen3-target"), "--drafter", str(pair / "qwen3-drafter")]
    engines = ["--max-seq-len", "28", "--backend", "tensorrt-rtx", "--sm", "89"]
    result = CliRunner().invoke(main, ["build", *sources, "-o", str(tmp_path / "out"), *engines])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    (folder,) = (path for path in (tmp_path / "out" / "engines").iterdir() if path.name != ".lock")
    assert read_engines(folder).limits.capacity == 32
