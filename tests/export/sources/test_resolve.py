"""Where models come from, and what is refused before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from dflash_export.errors import CheckpointError, SourceError
from dflash_export.sources.resolve import Source, resolve_drafter, resolve_target
from tests.checkpoints import check_message
from tests.permissions import as_any_user

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/some-model"


def model_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}" if name.endswith(".json") else b"data of " + name.encode())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub client, which stays offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached_repository(cache: Path, *names: str) -> Path:
    repository = cache / ("models--" + REPO.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return model_folder(repository / "snapshots" / COMMIT, *names)


# --- What is found ---


def test_folder(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "my-model", "config.json", "model.safetensors", "README.md", "notes.json"
    )
    source = resolve_target(str(folder))
    assert source == Source("folder", "my-model", None, folder.resolve())
    assert source.folder == folder.resolve()
    assert source.weight_files() == ("model.safetensors",)
    assert tuple(source.files()) == ("config.json", "model.safetensors")


def test_files_have_size_and_sha256(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json", "model.safetensors")
    content = os.urandom(3 * 2**20 + 5)  # more than one piece
    (folder / "model.safetensors").write_bytes(content)
    records = resolve_drafter(folder).files()
    assert list(records) == ["config.json", "model.safetensors"]
    assert records["model.safetensors"].size == len(content)
    assert records["model.safetensors"].sha256 == hashlib.sha256(content).hexdigest()


def test_shards_come_from_the_index(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "m", "config.json", "a.safetensors", "b.safetensors", "stray.safetensors"
    )
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = resolve_target(folder)
    assert source.weight_files() == ("a.safetensors", "b.safetensors")
    assert "stray.safetensors" not in tuple(source.files())
    assert "model.safetensors.index.json" in tuple(source.files())


def test_gguf_file_is_alone_in_its_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "model.Q4_1.gguf", "config.json", "tokenizer.json")
    source = resolve_target(folder / "model.Q4_1.gguf")
    assert (source.kind, source.id, source.revision) == ("gguf", "model.Q4_1.gguf", None)
    assert source.folder == folder.resolve()
    assert tuple(source.files()) == source.weight_files() == ("model.Q4_1.gguf",)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "m", "model.safetensors")
    assert resolve_target("~/m").path == (tmp_path / "m").resolve()


def test_hub_id_gets_its_commit(cache: Path) -> None:
    snapshot = cached_repository(cache, "config.json", "model.safetensors")
    for revision in (None, "main", COMMIT):
        source = resolve_target(REPO, revision=revision)
        assert source == Source("hub", REPO, COMMIT, snapshot)


def test_local_folder_wins_over_hub_id(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_repository(cache, "config.json", "model.safetensors")
    model_folder(tmp_path / REPO, "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert resolve_target(REPO).kind == "folder"


# --- What is refused ---


@pytest.mark.parametrize("spec", ["", "   "])
def test_nothing_named(spec: str) -> None:
    with pytest.raises(SourceError, match="no target was named") as caught:
        resolve_target(spec)
    check_message(caught, "hub id org/name")


@pytest.mark.parametrize(
    "spec",
    ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "a\\b", "org/model/", "nothing.gguf", "org/m.gguf"],
)
def test_missing_path(spec: str) -> None:
    with pytest.raises(SourceError, match="doesn't exist") as caught:
        resolve_target(spec)
    check_message(caught, repr(spec), "check the spelling")


def test_missing_path_object(tmp_path: Path) -> None:
    """A Path is never taken for a hub id."""
    with pytest.raises(SourceError, match="doesn't exist"):
        resolve_drafter(Path("some-org") / "some-model")


@pytest.mark.parametrize("spec", ["qwen3", "org/na me", "-org/name", "org/name@main"])
def test_neither_path_nor_id(spec: str) -> None:
    with pytest.raises(SourceError, match="neither a path nor a hub id") as caught:
        resolve_target(spec)
    check_message(caught, repr(spec), "ORG/NAME")


@pytest.mark.parametrize("name", ["m", "m.gguf"])
def test_revision_of_local_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    model_folder(path, "model.safetensors") if name == "m" else path.write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="a revision can't be chosen") as caught:
        resolve_target(path, revision="main")
    check_message(caught, "'main'", "leave out the revision")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickles(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "m", "config.json", name)
    for spec in (folder, folder / name):
        with pytest.raises(CheckpointError, match="pickles are never loaded") as caught:
            resolve_target(spec)
        check_message(caught, name, "convert the checkpoint to safetensors")


def test_adapter(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="an adapter") as caught:
        resolve_target(folder)
    check_message(caught, "merge the adapter")


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json", "model.gguf")
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        resolve_target(folder)
    check_message(caught, "model.gguf", "name the file itself")


def test_two_sets_of_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "model.safetensors", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="two sets of weights") as caught:
        resolve_target(folder)
    check_message(caught, "remove the stale one")


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a.bin", 3]
)
def test_index_may_not_leave_the_folder(tmp_path: Path, shard: object) -> None:
    folder = model_folder(tmp_path / "m", "config.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match="may not be loaded") as caught:
        resolve_target(folder)
    check_message(caught, repr(shard), "source that you trust")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [("{", "can't be read as JSON"), ("[]", "JSON object"), ("{}", "lists no tensors"), ("\udcff", "JSON")],
)
def test_malformed_index(tmp_path: Path, text: str, fragment: str) -> None:
    folder = model_folder(tmp_path / "m", "config.json")
    (folder / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=fragment) as caught:
        resolve_target(folder)
    check_message(caught, "model.safetensors.index.json", "download the file again")


@pytest.mark.parametrize("name", ["drafter.gguf", "model.safetensors", "notes.txt"])
def test_drafter_has_to_be_a_folder(tmp_path: Path, name: str) -> None:
    model_folder(tmp_path, name)
    with pytest.raises(SourceError, match="drafter can't be read from this file") as caught:
        resolve_drafter(tmp_path / name)
    check_message(caught, name, "name the folder")


def test_hub_out_of_reach(cache: Path) -> None:
    with pytest.raises(SourceError, match="can't be fetched") as caught:
        resolve_target(REPO, revision="v1")
    check_message(caught, f"{REPO} at revision v1", "the network")


def test_hub_without_safetensors(cache: Path) -> None:
    cached_repository(cache, "config.json", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors") as caught:
        resolve_drafter(REPO)
    check_message(caught, REPO, "convert this one")


def test_hub_with_a_missing_shard(cache: Path) -> None:
    snapshot = cached_repository(cache, "config.json")
    index = {"weight_map": {"x": "a.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the target is incomplete") as caught:
        resolve_target(REPO)
    check_message(caught, f"no a.safetensors in {REPO}", "fetch the repository again")


def test_unreadable_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "model.safetensors")
    (folder / "model.safetensors").chmod(0)
    with as_any_user(), pytest.raises(CheckpointError, match="can't be read"):
        resolve_target(folder).files()


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
@pytest.mark.parametrize("below", [True, False])
def test_folders_that_may_not_be_entered_or_listed(tmp_path: Path, mode: int, below: bool) -> None:
    """The model's own folder, or the one that it lies in."""
    folder = model_folder(tmp_path / "closed" / "m", "config.json")
    closed = folder.parent if below else folder
    closed.chmod(mode)
    try:
        with as_any_user(), pytest.raises(SourceError) as caught:
            resolve_target(folder)
    finally:
        closed.chmod(0o700)
    lists = mode == 0o100 and below  # it may be entered by who knows the names in it
    check_message(caught, "holds no weights" if lists else "Permission denied")


@pytest.mark.parametrize("spec", ["./" + "x" * 300, "x" * 300 + "/name", "~nobody-of-this-name/m"])
def test_paths_that_can_not_be(spec: str) -> None:
    with pytest.raises(SourceError, match="the target can't be looked for") as caught:
        resolve_target(spec)
    check_message(caught, spec[:20], "check the spelling")


def test_file_that_vanished(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a.safetensors of m can't be read") as caught:
        resolve_target(folder).files()
    check_message(caught, "still exists")
