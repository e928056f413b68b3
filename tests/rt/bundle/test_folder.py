from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dflash_rt.bundle.folder import Bundle, hash_file
from dflash_rt.bundle.manifest import FileRecord
from dflash_rt.errors import BundleError, IntegrityError, ManifestError
from tests.rt.bundle_maker import content, manifest_document, write_bundle

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_a_whole_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(folder, verify_files=True)
    assert bundle.manifest.name == "tiny"
    assert bundle.graph_path("target") == folder / "target.onnx"
    assert bundle.path_of("data/weights.bin").read_text() == "content of data/weights.bin\n"
    assert bundle.tokenizer_path() == folder / "tokenizer.json"
    assert bundle.read_chat_template() == "content of chat_template.jinja\n"
    assert bundle.total_bytes == sum(len(content(name)) for name in bundle.manifest.files)


def test_str_paths_and_links_to_the_folder_are_fine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert Bundle.open(str(link)).root == folder
    monkeypatch.chdir(folder)
    assert Bundle.open(".").root == folder


def test_a_bundle_without_tokenizer_has_no_template(tmp_path: Path) -> None:
    document = manifest_document()
    document["tokenizer"] = None
    bundle = Bundle.open(write_bundle(tmp_path, document))
    assert bundle.tokenizer_path() is None
    assert bundle.read_chat_template() is None


def test_links_inside_the_folder_are_fine(folder: Path) -> None:
    shutil.move(folder / "embed.onnx", folder / "data" / "real.onnx")
    (folder / "embed.onnx").symlink_to("data/real.onnx")
    bundle = Bundle.open(folder, verify_files=True)
    assert bundle.unlisted_files() == ("data/real.onnx",)


# --- folders that aren't bundles --------------------------------------------------------------------------


def absent(path: Path) -> None:
    shutil.rmtree(path)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("{}")


def circle(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path)


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def a_checkpoint(path: Path) -> None:
    emptied(path)
    (path / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (absent, ["no bundle at", "nothing there", "dflash-export build"]),
        (a_file, ["no bundle at", "found: a file", "expected: a folder"]),
        (circle, ["no bundle at", "expected: a folder"]),
        (emptied, ["is not a bundle", "no manifest.json", "dflash-export build"]),
        (without_manifest, ["is not a bundle", "an export that didn't finish"]),
        (a_checkpoint, ["is not a bundle", "checkpoint", "dflash-export build"]),
    ],
)
def test_what_is_no_bundle_is_refused(folder: Path, damage: Damage, words: list[str]) -> None:
    damage(folder)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert type(caught.value) is BundleError
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_path_with_nul_is_refused() -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open("a\x00b")


# --- manifests that can't be read -------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes on this system")
    os.mkfifo(path)


def manifest_folder(path: Path) -> None:
    without_manifest(path)
    (path / "manifest.json").mkdir()


def manifest_pipe(path: Path) -> None:
    without_manifest(path)
    make_pipe(path / "manifest.json")


def manifest_outside(path: Path) -> None:
    shutil.move(path / "manifest.json", path.parent / "outside.json")
    (path / "manifest.json").symlink_to(path.parent / "outside.json")


def manifest_dangling(path: Path) -> None:
    without_manifest(path)
    (path / "manifest.json").symlink_to("nowhere")


def manifest_binary(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\xfe{}")


def manifest_huge(path: Path) -> None:
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**34)


def manifest_cut(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (manifest_folder, ["not a regular file"]),
        (manifest_pipe, ["not a regular file"]),
        (manifest_outside, ["outside the bundle", "outside.json"]),
        (manifest_dangling, ["manifest.json: missing"]),
        (manifest_binary, ["can't be read", "UTF-8"]),
        (manifest_huge, ["too large", "more than 16777216 bytes"]),
        (manifest_cut, ["not valid JSON"]),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(folder: Path, damage: Damage, words: list[str]) -> None:
    damage(folder)
    with pytest.raises(ManifestError) as caught:
        Bundle.open(folder)
    assert all(word in str(caught.value) for word in [*words, "what to do: "]), str(caught.value)


# --- files that aren't what the manifest says -------------------------------------------------------------


def file_missing(path: Path) -> None:
    (path / "target.onnx").unlink()


def file_truncated(path: Path) -> None:
    os.truncate(path / "target.onnx", 3)


def file_longer(path: Path) -> None:
    with (path / "target.onnx").open("a") as file:
        file.write("more")


def file_is_folder(path: Path) -> None:
    (path / "target.onnx").unlink()
    (path / "target.onnx").mkdir()


def file_is_pipe(path: Path) -> None:
    (path / "target.onnx").unlink()
    make_pipe(path / "target.onnx")


def file_is_outside(path: Path) -> None:
    shutil.move(path / "target.onnx", path.parent / "target.onnx")
    (path / "target.onnx").symlink_to("../target.onnx")


def folder_is_outside(path: Path) -> None:
    shutil.move(path / "data", path.parent / "data")
    (path / "data").symlink_to(path.parent / "data")


def file_in_a_circle(path: Path) -> None:
    (path / "target.onnx").unlink()
    (path / "target.onnx").symlink_to("target.onnx")


def file_below_a_file(path: Path) -> None:
    shutil.rmtree(path / "data")
    (path / "data").write_text("")


FILE_CASES = [
    (file_missing, ["target.onnx: missing"]),
    (file_truncated, ["target.onnx: found 3 bytes, expected 25"]),
    (file_longer, ["target.onnx: found 29 bytes, expected 25"]),
    (file_is_folder, ["target.onnx: not a regular file"]),
    (file_is_pipe, ["target.onnx: not a regular file"]),
    (file_is_outside, ["target.onnx: a link to", "outside the bundle"]),
    (folder_is_outside, ["data/weights.bin: a link to", "outside the bundle"]),
    (file_in_a_circle, ["target.onnx: "]),
    (file_below_a_file, ["data/weights.bin: "]),
]


@pytest.mark.parametrize(("damage", "words"), FILE_CASES)
def test_files_are_checked_when_a_bundle_opens(folder: Path, damage: Damage, words: list[str]) -> None:
    bundle = Bundle.open(folder)
    damage(folder)
    for check in (lambda: Bundle.open(folder), bundle.verify_files):
        with pytest.raises(IntegrityError) as caught:
            check()
        assert all(word in str(caught.value) for word in [*words, "what to do: "]), str(caught.value)


def test_every_bad_file_is_named_at_once(folder: Path) -> None:
    file_missing(folder)
    folder_is_outside(folder)
    os.truncate(folder / "draft.onnx", 0)
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(folder)
    assert all(
        f"\n  {name}: " in str(caught.value) for name in ("target.onnx", "data/weights.bin", "draft.onnx")
    )


def test_changed_bytes_are_found_on_request(folder: Path) -> None:
    (folder / "target.onnx").write_bytes(content("target.onnx").swapcase())
    bundle = Bundle.open(folder)
    with pytest.raises(IntegrityError, match=r"target\.onnx: found sha256 .* expected"):
        bundle.verify_files()
    with pytest.raises(IntegrityError, match=r"target\.onnx: found sha256"):
        Bundle.open(folder, verify_files=True)


@pytest.mark.parametrize("graph", ["target.onnx", "fused.onnx", "graphs/target.onnx"])
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("data/weights.bin", None),
        ("weights.bin", "which manifest.json doesn't list"),
        ("../weights.bin", "isn't a path inside the bundle"),
        ("data/../../weights.bin", "isn't a path inside the bundle"),
        ("/etc/passwd", "isn't a path inside the bundle"),
        ("", "isn't a path inside the bundle"),
        ("manifest.json", "which manifest.json doesn't list"),
    ],
)
def test_graphs_take_weights_from_listed_files_only(
    tmp_path: Path, graph: str, location: str, reason: str | None
) -> None:
    document = manifest_document()
    inner = graph.startswith("graphs/")
    document["graphs"]["target"]["fused" if graph == "fused.onnx" else "path"] = graph
    document["files"][graph] = {"size": 0, "sha256": "0" * 64}
    if inner:  # seen from the graph's own folder
        document["files"]["graphs/data/weights.bin"] = document["files"].pop("data/weights.bin")
    bundle = Bundle.open(write_bundle(tmp_path / "bundle", document, {graph: location}))
    for unlisted in ("weights.bin", "bundle/weights.bin", "bundle/graphs/weights.bin"):
        if (tmp_path / unlisted).parent.is_dir():
            (tmp_path / unlisted).write_text("weights")
    checks = (
        bundle.check_external_data,
        bundle.verify_files,
        lambda: Bundle.open(bundle.root, verify_files=True),
    )
    for check in checks:
        if reason is None:
            check()
            continue
        with pytest.raises(IntegrityError) as caught:
            check()
        assert f"{graph}: takes weights from {location!r}" in str(caught.value)
        assert reason in str(caught.value)


def test_every_wrong_location_is_named_at_once(tmp_path: Path) -> None:
    places = {"embed.onnx": "a.bin", "draft.onnx": "b.bin"}
    bundle = Bundle.open(write_bundle(tmp_path, locations=places))
    with pytest.raises(IntegrityError) as caught:
        bundle.verify_files()
    for graph, place in places.items():
        assert f"\n  {graph}: takes weights from '{place}'" in str(caught.value)


def test_a_graph_that_is_no_graph_is_found_on_request(folder: Path) -> None:
    (folder / "target.onnx").write_text("content of target.onnx")
    document = json.loads((folder / "manifest.json").read_text())
    record = hash_file(folder / "target.onnx")
    document["files"]["target.onnx"] = {"size": record.size, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=r"target\.onnx can't be read as an ONNX file"):
        Bundle.open(folder, verify_files=True)


def test_progress_hears_of_every_byte(folder: Path) -> None:
    heard: dict[str, int] = {}

    def progress(name: str, count: int) -> None:
        heard[name] = heard.get(name, 0) + count

    bundle = Bundle.open(folder)
    bundle.verify_files(progress)
    assert heard == {name: record.size for name, record in bundle.manifest.files.items()}
    assert sum(heard.values()) == bundle.total_bytes


def test_names_that_the_bundle_does_not_have_are_refused(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"no file '\.\./secret'"):
        bundle.path_of("../secret")
    with pytest.raises(BundleError, match="no graph 'draft_logits'"):
        bundle.graph_path("draft_logits")


def test_a_template_that_is_not_utf8_is_refused(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja can't be read"):
        Bundle.open(folder).read_chat_template()


def test_unlisted_files_are_reported(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.unlisted_files() == ()
    (folder / "reports" / "deep").mkdir(parents=True)
    (folder / "reports" / "deep" / "verify.json").write_text("{}")
    (folder / "data" / "reports").mkdir()
    (folder / "data" / "reports" / "x").write_text("")
    (folder / "a.pkl").write_text("")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "elsewhere").symlink_to(folder.parent)
    assert bundle.unlisted_files() == ("a.pkl", "dangling", "data/reports/x", "elsewhere")


def test_hash_file_reads_large_files_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    path = tmp_path / "large"
    path.write_bytes(data)
    counts: list[tuple[str, int]] = []
    record = hash_file(path, progress=lambda name, count: counts.append((name, count)))
    assert record == FileRecord(len(data), hashlib.sha256(data).hexdigest())
    assert counts == [("large", 2**20), ("large", 2**20), ("large", len(data) - 2**21)]


def test_hash_file_of_nothing_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="can't be read"):
        hash_file(tmp_path / "absent")
