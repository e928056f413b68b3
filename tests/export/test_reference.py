"""The yardstick itself: the right files, loaded whole, run as Hugging Face runs them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_export.errors import UnsupportedModelError, VerifyError
from dflash_export.reference import (
    find_source,
    generate_greedy,
    generate_reference,
    load_drafter,
    load_target,
    reference_version,
    teacher_forced,
)
from dflash_export.sources.resolve import resolve_drafter, resolve_target
from dflash_rt.bundle.manifest import FileRecord, SourceInfo
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

SPEC = TargetSpec("qwen2", tied=False, vocab=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    make_target(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_target(resolve_target(folder))


def record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_gguf_file_may_have_another_name_but_no_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "renamed.gguf"
    path.write_bytes(b"GGUF and more")
    info = SourceInfo(kind="gguf", id="model.gguf", revision=None, files={"model.gguf": record(path)})
    assert find_source("target", info, path).path == path
    path.write_bytes(b"GGUF and mere")
    with pytest.raises(VerifyError, match=r"model\.gguf: sha256"):
        find_source("target", info, path)


def test_all_files_that_differ_are_named(folder: Path) -> None:
    files = {name: record(folder / name) for name in ("config.json", "model.safetensors")}
    info = SourceInfo(kind="folder", id="target", revision=None, files=files)
    assert find_source("target", info, folder).path == folder
    files |= {"config.json": FileRecord(1, "0" * 64), "model-00002.safetensors": FileRecord(1, "1" * 64)}
    with pytest.raises(VerifyError) as caught:
        find_source("target", info, folder)
    assert "config.json: sha256" in str(caught.value)
    assert "model-00002.safetensors: missing" in str(caught.value)
    assert "model.safetensors" not in str(caught.value)


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_with_random_numbers(
    tmp_path: Path, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(VerifyError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_target(resolve_target(tmp_path))


def test_a_config_that_transformers_refuses(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(VerifyError, match="PyTorch can't load the target"):
        load_target(resolve_target(tmp_path))
    with pytest.raises(UnsupportedModelError, match="not a DFlash drafter"):
        load_drafter(resolve_target(tmp_path))
    make_drafter(tmp_path / "drafter", drafter_config(SPEC))
    (tmp_path / "drafter" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(VerifyError, match="PyTorch can't load the drafter"):
        load_drafter(resolve_drafter(tmp_path / "drafter"))


def test_loading_is_quiet(tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also about tensors that nobody needs."""
    tensors = load_file(folder / "model.safetensors") | {"model.extra": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    load_target(resolve_target(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_one_pass_has_logits_of_new_tokens_and_features_of_all_rows(model: Any) -> None:
    prompt, new = [1, 2, 3], [4, 5, 6, 7]
    found = teacher_forced(model, prompt, new, [2, 0])
    with torch.no_grad():
        right = model(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), output_hidden_states=True)
    assert (found.logits.shape, found.logits.dtype) == ((4, 12), np.float32)
    np.testing.assert_allclose(found.logits, right.logits[0, 2:6].numpy(), atol=1e-5)
    assert found.features.shape == (6, 2, 32)
    np.testing.assert_allclose(found.features[:, 0], right.hidden_states[3][0, :6].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.features[:, 1], right.hidden_states[1][0, :6].numpy(), atol=1e-5)


def test_greedy_tokens_are_the_best_of_their_logits(model: Any) -> None:
    found = generate_greedy(model, [1, 0, 0, 2], max_new_tokens=8, stop_token_ids=[], record_rows=5)
    assert len(found.token_ids) == 8
    assert found.logits.shape == (5, 12)
    assert found.logits.argmax(axis=1).tolist() == list(found.token_ids[:5])
    # Zeros in the prompt are tokens, not padding.
    forced = teacher_forced(model, [1, 0, 0, 2], found.token_ids)
    np.testing.assert_allclose(found.logits, forced.logits[:5], atol=1e-5)


def test_greedy_ends_with_the_first_stop_token(model: Any) -> None:
    free = generate_greedy(model, [1, 2], max_new_tokens=8, stop_token_ids=[]).token_ids
    stop = free[3]
    found = generate_greedy(model, [1, 2], max_new_tokens=8, stop_token_ids=[stop])
    assert found.token_ids == free[: free.index(stop) + 1]
    assert found.logits.shape == (0, 12)


def test_reference_loop(tmp_path: Path, model: Any) -> None:
    make_drafter(tmp_path / "drafter", drafter_config(SPEC))
    drafter = load_drafter(resolve_target(tmp_path / "drafter"))
    greedy = generate_greedy(model, [1, 2, 3], max_new_tokens=9, stop_token_ids=[]).token_ids
    run = generate_reference(drafter, model, [1, 2, 3], max_new_tokens=9, stop_token_ids=[])
    assert run.token_ids == greedy
    assert 1 + sum(run.tokens_by_step) == 9
    assert reference_version() == "0.1.0"
