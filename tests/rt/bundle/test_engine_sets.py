"""The record of an engine set: strict reading, keys, and whether a set fits a machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dflash_rt import Bundle
from dflash_rt.bundle.engine_match import Machine, compile_command, differences, find_engines
from dflash_rt.bundle.engine_sets import (
    ENGINES_NAME,
    AxisRange,
    BuildKey,
    EngineFile,
    EngineLimits,
    EngineSet,
    EngineSpec,
    ProfileSpec,
    read_engines,
)
from dflash_rt.errors import EngineError
from tests.rt.bundle_maker import write_bundle

ADA = Machine(
    backend="tensorrt-rtx",
    backend_version="1.7.1",
    gpu="GeForce RTX 4090",
    compute_capability=89,
)
HOPPER = Machine(backend="tensorrt", backend_version="11.4.0.106", gpu="H100", compute_capability=90)

RTX = BuildKey(
    backend="tensorrt-rtx",
    backend_version="1.7.1",
    gpu=None,
    compute_capabilities=(86, 89),
    precision="fp32",
    version_compatible=False,
    hardware_compatible=False,
    workspace=None,
    tool="dflash-export 0.1.0",
)
TRT = replace(RTX, backend="tensorrt", backend_version="11.4.0.106", gpu="H100", compute_capabilities=(90,))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_bundle(tmp_path / "bundle"))


def engine_set(
    bundle: Bundle, build: BuildKey = RTX, *, max_seq_len: int = 24, max_batch: int = 1
) -> EngineSet:
    """A set as it would be built for ``bundle``, every graph from its ONNX file alone."""
    files = bundle.manifest.files
    block = ProfileSpec(name="block", batch=AxisRange(1, max_batch, max_batch), rows=AxisRange(1, 4, 4))
    specs = {
        graph: EngineSpec(
            sources={spec.path: files[spec.path].sha256},
            capacity=max_seq_len + 4 if spec.aliases else None,
            profiles=(block,),
        )
        for graph, spec in bundle.manifest.graphs.items()
    }
    return EngineSet(
        format="dflash-engines",
        format_version=1,
        created="2026-11-23T12:00:00Z",
        build=build,
        limits=EngineLimits(max_seq_len=max_seq_len, capacity=max_seq_len + 4, max_batch=max_batch),
        engines=specs,
        files={graph: EngineFile(f"{graph}.engine", 3, "0" * 64) for graph in specs},
    )


def store(bundle: Bundle, engines: EngineSet) -> Path:
    folder = bundle.root / "engines" / engines.folder
    folder.mkdir(parents=True)
    for file in engines.files.values():
        (folder / file.name).write_bytes(b"abc")
    (folder / ENGINES_NAME).write_text(engines.to_json(), encoding="utf-8")
    return folder


# --- The record ---


def test_a_record_is_read_back_as_it_was(bundle: Bundle) -> None:
    engines = engine_set(bundle)
    assert EngineSet.from_json(engines.to_json()) == engines
    folder = store(bundle, engines)
    assert read_engines(folder) == engines


def change(*path: str | int, to: Any) -> Callable[[Any], None]:
    def apply(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return apply


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown key": (change("gpu", to="H100"), "an unknown key"),
    "not a bool": (change("build", "version_compatible", to=1), "build.version_compatible is wrong"),
    "unknown backend": (change("build", "backend", to="openvino"), "one of tensorrt, tensorrt-rtx"),
    "no device": (change("build", "compute_capabilities", to=[]), "at least one"),
    "a path": (change("files", "embed", "name", to="../embed.engine"), "a name like target.engine"),
    "a file too few": (lambda d: d["files"].pop("embed"), "one file for each of engines"),
    "no profile": (change("engines", "embed", "profiles", to=[]), "engines.embed.profiles is wrong"),
    "profile upside down": (
        change("engines", "embed", "profiles", 0, "rows", to={"min": 4, "opt": 1, "max": 4}),
        "min <= opt <= max",
    ),
    "two capacities": (change("engines", "target", "capacity", to=5), "engines.target.capacity"),
    "newer": (change("format_version", to=2), "which is newer"),
    "another format": (change("format", to="x"), "one of dflash-engines"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_refused(bundle: Bundle, spoil: Callable[[Any], None], message: str) -> None:
    document = json.loads(engine_set(bundle).to_json())
    spoil(document)
    with pytest.raises(EngineError) as caught:
        EngineSet.from_json(json.dumps(document))
    assert message in str(caught.value)
    assert "dflash-export compile" in str(caught.value)
    assert "manifest.json" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "dflash-engines", "format": "dflash-engines"}'])
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(EngineError, match=r"engines\.json"):
        EngineSet.from_json(text)


def test_a_file_that_changed_its_size(bundle: Bundle) -> None:
    folder = store(bundle, engine_set(bundle))
    (folder / "embed.engine").write_bytes(b"ab")
    (folder / "target.engine").unlink()
    with pytest.raises(EngineError) as caught:
        read_engines(folder)
    assert "embed.engine: 2 bytes instead of 3; target.engine: missing" in str(caught.value)


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="can't be read"):
        read_engines(tmp_path)


def test_engines_are_no_strangers_in_a_bundle(bundle: Bundle) -> None:
    store(bundle, engine_set(bundle))
    (bundle.root / "stranger").touch()
    assert bundle.unlisted_files() == ("stranger",)


# --- Keys ---


def test_the_key_covers_everything(bundle: Bundle) -> None:
    """Changing any part of it gives another folder; the moment of the build is no part."""
    engines = engine_set(bundle)
    embed = engines.engines["embed"]
    others = [
        replace(engines, build=replace(RTX, **{name: value}))
        for name, value in {
            "backend": "tensorrt",
            "backend_version": "1.7.2",
            "gpu": "H100",
            "compute_capabilities": (89,),
            "precision": "fp16",
            "version_compatible": True,
            "hardware_compatible": True,
            "workspace": 1,
            "tool": "dflash-export 0.2.0",
        }.items()
    ]
    others += [
        replace(engines, engines={**engines.engines, "embed": replace(embed, **{name: value})})
        for name, value in {
            "sources": {"embed.onnx": "1" * 64},
            "capacity": 28,
            "profiles": embed.profiles * 2,
        }.items()
    ]
    names = {other.folder for other in others} | {engines.folder}
    assert embed.digest("embed", RTX) != embed.digest("lm_head", RTX)
    assert len(names) == len(others) + 1
    assert replace(engines, created="2027-01-01T00:00:00Z").folder == engines.folder


# --- Fitting ---


def parts(engines: EngineSet, bundle: Bundle, machine: Machine, **needs: int) -> list[str]:
    return [reason.part for reason in differences(engines, bundle, machine, **needs)]


def test_a_set_that_fits(bundle: Bundle) -> None:
    assert differences(engine_set(bundle), bundle, ADA, max_seq_len=24) == ()
    assert differences(engine_set(bundle, TRT), bundle, HOPPER) == ()


def test_each_part_that_differs_is_named(bundle: Bundle) -> None:
    rtx, trt = engine_set(bundle), engine_set(bundle, TRT)
    assert parts(rtx, bundle, HOPPER) == ["backend"]
    assert parts(rtx, bundle, replace(ADA, backend_version="1.8.0")) == ["tensorrt-rtx version"]
    assert parts(rtx, bundle, replace(ADA, compute_capability=120)) == ["GPU"]
    assert parts(rtx, bundle, replace(ADA, gpu=None, compute_capability=None)) == ["GPU"]
    assert parts(trt, bundle, replace(HOPPER, gpu="H200")) == ["GPU"]
    assert parts(rtx, bundle, ADA, max_seq_len=25) == ["max_seq_len"]
    assert parts(rtx, bundle, ADA, batch=2) == ["batch"]
    old = replace(rtx.engines["embed"], sources={"embed.onnx": "1" * 64})
    assert parts(replace(rtx, engines={**rtx.engines, "embed": old}), bundle, ADA) == [
        "the bundle's embed.onnx"
    ]
    gone = replace(old, sources={"gone.data": "1" * 64})
    assert "no such file" in str(
        differences(replace(rtx, engines={**rtx.engines, "embed": gone}), bundle, ADA)[0]
    )
    fewer = {graph: spec for graph, spec in rtx.engines.items() if graph != "draft"}
    assert parts(replace(rtx, engines=fewer), bundle, ADA) == ["graphs"]
    half = replace(rtx, build=replace(RTX, precision="fp16"))
    assert parts(half, bundle, ADA) == ["precision"]


@pytest.mark.parametrize(
    ("present", "fits"), [("11.4.0.106", True), ("11.5.0", True), ("11.3.9", False), ("12.0.0", False)]
)
def test_version_compatible_engines(bundle: Bundle, present: str, fits: bool) -> None:
    engines = engine_set(bundle, replace(TRT, version_compatible=True))
    assert (differences(engines, bundle, replace(HOPPER, backend_version=present)) == ()) is fits


@pytest.mark.parametrize(("capability", "fits"), [(75, False), (80, True), (120, True)])
def test_hardware_compatible_engines(bundle: Bundle, capability: int, fits: bool) -> None:
    engines = engine_set(bundle, replace(TRT, gpu=None, hardware_compatible=True))
    machine = replace(HOPPER, gpu="another", compute_capability=capability)
    assert (differences(engines, bundle, machine) == ()) is fits


# --- Finding ---


def test_the_smallest_that_fits_is_found(bundle: Bundle) -> None:
    for build, length in ((RTX, 24), (RTX, 16), (RTX, 8), (TRT, 4)):
        store(bundle, engine_set(bundle, build, max_seq_len=length))
    (bundle.root / "engines" / ".unfinished").mkdir()
    folder, engines = find_engines(bundle, ADA, max_seq_len=10)
    assert engines.limits.max_seq_len == 16
    assert folder == bundle.root / "engines" / engines.folder


def test_without_a_wanted_length_the_longest_is_found(bundle: Bundle) -> None:
    """Who compiled for a short context first, and then for a long one, gets the long one."""
    for length in (8, 24, 16):
        store(bundle, engine_set(bundle, max_seq_len=length))
    assert find_engines(bundle, ADA)[1].limits.max_seq_len == 24


def test_no_engines_at_all(bundle: Bundle) -> None:
    (bundle.root / "engines" / ".unfinished").mkdir(parents=True)
    with pytest.raises(EngineError) as caught:
        find_engines(bundle, ADA, max_seq_len=10)
    assert str(caught.value) == (
        f"the bundle {bundle.root} has no engines for tensorrt-rtx\n"
        "  found: no engine set\n"
        "  expected: engines for tensorrt-rtx 1.7.1 on GeForce RTX 4090\n"
        f"  what to do: run: dflash-export compile {bundle.root} --backend tensorrt-rtx "
        "--max-seq-len 10 --sm 89"
    )


def test_engines_that_do_not_fit(bundle: Bundle) -> None:
    folder = store(bundle, engine_set(bundle))
    store(bundle, engine_set(bundle, TRT))
    with pytest.raises(EngineError) as caught:
        find_engines(bundle, replace(ADA, backend_version="1.8.0", gpu="RTX 5090", compute_capability=120))
    assert str(caught.value) == (
        f"no engines of the bundle {bundle.root} fit; the closest are in {folder.name}\n"
        "  found: tensorrt-rtx version: built for 1.7.1, present is 1.8.0; "
        "GPU: built for sm86, sm89, present is RTX 5090 (sm120)\n"
        "  expected: engines for tensorrt-rtx 1.8.0 on RTX 5090\n"
        f"  what to do: run: dflash-export compile {bundle.root} --backend tensorrt-rtx "
        "--max-seq-len 24 --sm 120"
    )


def test_engines_that_can_not_be_read_are_named(bundle: Bundle) -> None:
    folder = store(bundle, engine_set(bundle))
    (folder / ENGINES_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(EngineError, match=rf"can't be read: {folder.name}: engines.json is not valid JSON"):
        find_engines(bundle, ADA)


def test_the_command_keeps_the_options(bundle: Bundle) -> None:
    build = replace(TRT, version_compatible=True, hardware_compatible=True, workspace=2**30)
    engines = engine_set(bundle, build, max_batch=2)
    command = compile_command(Path("a b"), HOPPER, engines, batch=3)
    assert command.replace('"', "'") == (  # Windows knows double quotes only
        "dflash-export compile 'a b' --backend tensorrt --max-seq-len 24 --max-batch 3 "
        "--workspace 1073741824 --version-compatible --hardware-compatible"
    )
