"""Bad input to ``build``: each ends in an exception of the project, before any long work, and leaves nothing.

The cases go through ``build`` itself, so that they also show that every check is wired up, and early enough.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_export import build
from dflash_export.errors import CheckpointError, PairError, RecipeError, SourceError, UnsupportedModelError
from dflash_export.sources.safetensors import SafetensorsWeights
from dflash_rt.errors import DFlashError, OutputError
from tests.checkpoints import byte_tokenizer
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target
from tests.permissions import as_any_user

SPEC = TargetSpec("qwen3", layers=2, tied=False, vocab=300)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    make_target(root / "target", SPEC)
    byte_tokenizer().save(str(root / "target" / "tokenizer.json"))
    make_drafter(root / "drafter", drafter_config(SPEC))
    return root


@pytest.fixture
def pair(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the pair that a test may spoil."""
    shutil.copytree(pristine, tmp_path / "pair")
    return tmp_path / "pair"


def refuse(pair: Path, expected: type[DFlashError], *words: str, **options: Any) -> str:
    """``build`` raises ``expected`` without tracing anything, says all of ``words``, and leaves nothing."""
    outputs = pair.parent / "outputs"
    outputs.mkdir(exist_ok=True)
    before = sorted(os.listdir(outputs))
    arguments = {
        "target": pair / "target",
        "drafter": pair / "drafter",
        "output": outputs / "bundle",
        **options,
    }
    too_late = mock.Mock(side_effect=AssertionError("it was noticed only after tracing had begun"))
    with (
        mock.patch.multiple("dflash_export.exporter", trace_target=too_late, trace_drafter=too_late),
        pytest.raises(expected) as caught,
    ):
        build(**arguments)
    text = str(caught.value)
    assert type(caught.value) is expected, text
    assert "what to do: " in text, text
    assert [word for word in words if word not in text] == [], text
    assert sorted(os.listdir(outputs)) == before
    return text


# --- Options ---

WRONG_OPTIONS: dict[str, dict[str, Any]] = {
    "unknown precision": {"precision": "fp8"},
    "no precision": {"precision": None},
    "precision is a list": {"precision": ["fp32"]},
    "no room": {"max_seq_len": 0},
    "negative room": {"max_seq_len": -5},
    "room is a truth value": {"max_seq_len": True},
    "room is a fraction": {"max_seq_len": 64.0},
    "room is text": {"max_seq_len": "64"},
    "room is huge": {"max_seq_len": 2**40},
    "empty pieces": {"prefill_chunk": 0},
    "pieces are a truth value": {"prefill_chunk": False},
    "fewer drafts than none": {"num_draft_tokens": -1},
    "drafts are text": {"num_draft_tokens": "3"},
    "name is empty": {"name": ""},
    "name rings a bell": {"name": "a\x07b"},
    "name is a number": {"name": 7},
    "name is half a character": {"name": "\ud800"},
    "target is nothing": {"target": None},
    "target is a number": {"target": 3},
    "target is bytes": {"target": b"target"},
    "drafter is nothing": {"drafter": None},
    "output is empty": {"output": ""},
    "output is nothing": {"output": None},
    "revision is a number": {"target_revision": 3},
    "template arguments are a list": {"chat_template_kwargs": ["enable_thinking"]},
    "template argument is a list": {"chat_template_kwargs": {"tools": []}},
    "template argument is not finite": {"chat_template_kwargs": {"x": float("nan")}},
    "template argument is an object": {"chat_template_kwargs": {"x": object()}},
    "template argument has no name": {"chat_template_kwargs": {"": 1}},
    "template argument is named by a number": {"chat_template_kwargs": {1: 1}},
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(pair: Path, case: str) -> None:
    options = WRONG_OPTIONS[case]
    shutil.rmtree(pair / "target")  # options are looked at before anything is read
    refuse(pair, RecipeError, *options, "found: ", "expected: ", **options)


def test_all_wrong_options_are_listed(pair: Path) -> None:
    refuse(
        pair,
        RecipeError,
        "has 3 problems",
        "precision: found 'int3'",
        "max_seq_len: found 0",
        "num_draft_tokens: found -1",
        precision="int3",
        max_seq_len=0,
        num_draft_tokens=-1,
    )


def test_more_drafts_than_a_block(pair: Path) -> None:
    refuse(pair, RecipeError, "num_draft_tokens", "found: 4", "0 (no drafting) to 3", num_draft_tokens=4)


@pytest.mark.parametrize(("max_seq_len", "limit"), [(64, 64), (None, 1024)])
def test_pieces_longer_than_any_prompt(pair: Path, max_seq_len: int | None, limit: int) -> None:
    options = {"max_seq_len": max_seq_len, "prefill_chunk": limit + 1}
    refuse(pair, RecipeError, "prefill_chunk", f"found: {limit + 1}", f"max_seq_len, {limit}", **options)


def test_an_output_whose_name_can_not_be_recorded(pair: Path) -> None:
    refuse(pair, RecipeError, "pass a name", output=pair.parent / "outputs" / "a\x1bb")


@pytest.mark.parametrize(
    ("max_seq_len", "words"), [(1, "leaves no room"), (1025, "max_position_embeddings 1024")]
)
def test_a_length_limit_that_the_pair_can_not_have(pair: Path, max_seq_len: int, words: str) -> None:
    refuse(pair, PairError, words, max_seq_len=max_seq_len)


def test_template_arguments_without_a_template(pair: Path) -> None:
    refuse(pair, PairError, "no chat template", chat_template_kwargs={"enable_thinking": False})


def test_a_template_that_can_think(pair: Path) -> None:
    (pair / "target" / "chat_template.jinja").write_text("{{ enable_thinking }}")
    refuse(pair, PairError, "enable_thinking true or false")


# --- Outputs ---


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_an_output_that_exists(pair: Path, kind: str) -> None:
    output = pair.parent / "outputs" / "bundle"
    output.parent.mkdir()
    if kind == "file":
        output.touch()
    elif kind == "folder":
        output.mkdir()
    else:
        output.symlink_to("nowhere")
    refuse(pair, OutputError, "exists already", "--force")


def test_force_does_not_replace_other_things(pair: Path) -> None:
    output = pair.parent / "outputs" / "bundle"
    output.mkdir(parents=True)
    (output / "letters.txt").write_text("precious")
    refuse(pair, OutputError, "not a bundle", force=True)
    assert (output / "letters.txt").read_text() == "precious"


def test_the_root_folder_is_no_output(pair: Path) -> None:
    refuse(pair, OutputError, "exists already", output="/")
    refuse(pair, OutputError, "not a bundle", output="/", force=True)


def test_an_output_below_a_file(pair: Path) -> None:
    refuse(
        pair, OutputError, "can't write the bundle", output=pair / "target" / "config.json" / "x" / "bundle"
    )


def test_an_output_whose_name_is_too_long(pair: Path) -> None:
    refuse(pair, OutputError, "can't write the bundle", output=pair.parent / "outputs" / ("x" * 250))


def test_an_output_in_a_read_only_folder(pair: Path) -> None:
    folder = pair.parent / "read only"
    folder.mkdir(mode=0o500)
    with as_any_user():
        refuse(pair, OutputError, "mend the permissions", output=folder / "bundle")


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_force_on_a_folder_that_can_not_be_looked_into(pair: Path, mode: int) -> None:
    output = pair.parent / "outputs" / "bundle"
    output.mkdir(parents=True)
    (output / "letters.txt").write_text("precious")
    output.chmod(mode)
    with as_any_user():
        refuse(pair, OutputError, "won't replace", "Permission denied", force=True)
    output.chmod(0o700)
    assert (output / "letters.txt").read_text() == "precious"


# --- Sources ---

WRONG_SOURCES: dict[str, tuple[type[DFlashError], str, dict[str, Any]]] = {
    "no such folder": (SourceError, "doesn't exist", {"target": "./nowhere"}),
    "no such gguf": (SourceError, "doesn't exist", {"target": "missing.gguf"}),
    "neither path nor id": (SourceError, "hub id", {"target": "just-a-name"}),
    "blank": (RecipeError, "target is wrong", {"target": "  "}),
    "a revision that can't be fetched": (
        SourceError,
        "org/model at revision 0123abc",
        {"target": "org/model", "target_revision": "0123abc"},
    ),
    "drafter is a gguf": (SourceError, "doesn't exist", {"drafter": "drafter.gguf"}),
    "a revision of a folder": (SourceError, "revision", {"target_revision": "main"}),
    "a revision of a drafter's folder": (SourceError, "revision", {"drafter_revision": "main"}),
}


@pytest.mark.parametrize("case", WRONG_SOURCES)
def test_wrong_sources(pair: Path, case: str) -> None:
    expected, words, options = WRONG_SOURCES[case]
    refuse(pair, expected, words, **options)


def test_target_and_drafter_swapped(pair: Path) -> None:
    words = ("isn't the plain language model", "this is not a DFlash drafter", "weren't swapped")
    refuse(pair, PairError, *words, target=pair / "drafter", drafter=pair / "target")


@pytest.mark.parametrize("side", ["target", "drafter"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_files_that_may_not_be_read(pair: Path, side: str, name: str) -> None:
    (pair / side / name).chmod(0)
    with as_any_user():
        refuse(pair, CheckpointError, "Permission denied")
    (pair / side / name).chmod(0o700)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_small_files_that_may_not_be_read(pair: Path, name: str) -> None:
    """The tokenizer is read when the bundle's folder is there already: it is the model that can't be read."""
    (pair / "target" / name).touch()
    (pair / "target" / name).chmod(0)
    with as_any_user():
        refuse(pair, CheckpointError, name, "Permission denied")


def test_a_disk_that_fails_under_the_checkpoint(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of writing the weights; the advice isn't about the bundle's disk."""
    real = SafetensorsWeights._file

    class Failing(io.BufferedReader):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing(weights: SafetensorsWeights, name: str) -> io.BufferedReader:
        return Failing(real(weights, name).raw)

    monkeypatch.setattr(SafetensorsWeights, "_file", failing)
    text = refuse(pair, CheckpointError, "model.safetensors of a model can't be read", "Input/output error")
    assert "bundle" not in text.replace(str(pair), "")


# --- Files ---


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json, one level deep; ``...`` removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            config[key] |= value
        elif value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@dataclass(frozen=True)
class Spoiled:
    """What is done to one of the two folders, and what has to come of it."""

    side: str
    spoil: Callable[[Path], object]
    expected: type[DFlashError]
    words: tuple[str, ...] = field(default=())


def spoiled(side: str, expected: type[DFlashError], *words: str, **changes: Any) -> Spoiled:
    return Spoiled(side, lambda folder: edit_config(folder, **changes), expected, words)


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


SPOILED: dict[str, Spoiled] = {
    # Files that are broken.
    "target cut short": Spoiled(
        "target",
        lambda folder: cut(folder / "model.safetensors", 0.7),
        CheckpointError,
        ("model.safetensors",),
    ),
    "target cut in its header": Spoiled(
        "target", lambda folder: cut(folder / "model.safetensors", 0.01), CheckpointError
    ),
    "drafter cut short": Spoiled(
        "drafter",
        lambda folder: cut(folder / "model.safetensors", 0.7),
        CheckpointError,
        ("model.safetensors",),
    ),
    "drafter empty": Spoiled(
        "drafter", lambda folder: (folder / "model.safetensors").write_bytes(b""), CheckpointError
    ),
    "target is a pickle": Spoiled(
        "target", only_a_pickle, CheckpointError, ("pytorch_model.bin", "safetensors")
    ),
    "drafter is a pickle": Spoiled("drafter", only_a_pickle, CheckpointError, ("never loaded",)),
    "target without weights": Spoiled(
        "target", lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, ("no weights",)
    ),
    "target without config": Spoiled(
        "target",
        lambda folder: (folder / "config.json").unlink(),
        CheckpointError,
        ("config.json is missing",),
    ),
    "drafter without config": Spoiled(
        "drafter",
        lambda folder: (folder / "config.json").unlink(),
        CheckpointError,
        ("config.json is missing",),
    ),
    "target's config is no JSON": Spoiled(
        "target", lambda folder: (folder / "config.json").write_text("{,}"), CheckpointError, ("JSON",)
    ),
    "drafter's config is a list": Spoiled(
        "drafter", lambda folder: (folder / "config.json").write_text("[]"), CheckpointError, ("object",)
    ),
    "tokenizer is no JSON": Spoiled(
        "target",
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        CheckpointError,
        ("tokenizer.json",),
    ),
    "stop token outside the vocabulary": Spoiled(
        "target",
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 300}'),
        CheckpointError,
        ("eos_token_id", "[0, 300)"),
    ),
    "a shard is missing": Spoiled(
        "target",
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
            ),
        ),
        CheckpointError,
        ("model-00001-of-00002.safetensors",),
    ),
    "a shard elsewhere": Spoiled(
        "target",
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"model.norm.weight": "../../etc/model.safetensors"}}'
            ),
        ),
        CheckpointError,
        ("may not be loaded",),
    ),
    # Tensors that are wrong.
    "drafter lacks a tensor": Spoiled(
        "drafter",
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("fc.weight")),
        PairError,
        ("missing: fc.weight",),
    ),
    "drafter has a tensor too many": Spoiled(
        "drafter",
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2))),
        PairError,
        ("unexpected: extra",),
    ),
    "a tensor of another shape": Spoiled(
        "drafter",
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(31)})),
        PairError,
        ("norm.weight [31]", "[32]"),
    ),
    "target lacks a tensor": Spoiled(
        "target",
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        PairError,
        ("model.layers.1.mlp.up_proj.weight",),
    ),
    "whole numbers": Spoiled(
        "target",
        lambda folder: edit_tensors(
            folder,
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
        ),
        PairError,
        ("model.norm.weight", "not stored in floating point"),
    ),
    "a mask token without an embedding": Spoiled(
        "target",
        lambda folder: edit_tensors(
            folder, lambda tensors: tensors["model.embed_tokens.weight"][299].zero_()
        ),
        PairError,
        ("mask token", "all zeros"),
    ),
    # Targets that can't be exported faithfully.
    "a family that isn't supported": spoiled("target", UnsupportedModelError, "gpt2", model_type="gpt2"),
    "code of its own": spoiled(
        "target",
        UnsupportedModelError,
        "never run",
        auto_map={"AutoModelForCausalLM": "modeling.Evil"},
    ),
    "quantised": spoiled(
        "target", UnsupportedModelError, "gptq", quantization_config={"quant_method": "gptq"}
    ),
    "positions that depend on the length": spoiled(
        "target",
        UnsupportedModelError,
        "dynamic",
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "heads that can't be shared": spoiled("target", UnsupportedModelError, "heads", num_key_value_heads=3),
    # Drafters that aren't DFlash v1, or are no good.
    "another kind of drafter": spoiled(
        "drafter", UnsupportedModelError, "DFlash", architectures=["Eagle3Model"]
    ),
    "DFlash 2": spoiled("drafter", UnsupportedModelError, "DFlash 2", dflash_config={"conv_kernel_size": 2}),
    "speculators": spoiled("drafter", UnsupportedModelError, "speculators", speculators_model_type="eagle3"),
    "no block size": spoiled("drafter", CheckpointError, "block_size", dflash_config={"block_size": None}),
    "a negative mask token": spoiled(
        "drafter", CheckpointError, "mask_token_id", dflash_config={"mask_token_id": -1}
    ),
    # Pairs that don't belong together.
    "a block of one": spoiled("drafter", PairError, "drafts nothing", dflash_config={"block_size": 1}),
    "another hidden size": spoiled("drafter", PairError, "hidden_size = 48", hidden_size=48),
    "another vocabulary": spoiled("drafter", PairError, "vocab_size = 301", vocab_size=301),
    "another number of layers": spoiled("drafter", PairError, "num_target_layers = 3", num_target_layers=3),
    "taps that aren't there": spoiled(
        "drafter", PairError, "0 to 1", "[2]", dflash_config={"target_layer_ids": [0, 2]}
    ),
    "a tap twice": spoiled("drafter", PairError, "twice", dflash_config={"target_layer_ids": [1, 1]}),
    "a mask token that isn't there": spoiled(
        "drafter", PairError, "mask_token_id 300", dflash_config={"mask_token_id": 300}
    ),
    "too few kinds of layers": spoiled("drafter", PairError, "layer_types", layer_types=["full_attention"]),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_models(pair: Path, case: str) -> None:
    spoiled = SPOILED[case]
    spoiled.spoil(pair / spoiled.side)
    refuse(pair, spoiled.expected, *spoiled.words)


def test_a_tokenizer_that_knows_more_ids_than_the_target(pair: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(60)])
    tokenizer.save(str(pair / "target" / "tokenizer.json"))
    refuse(pair, PairError, "ids up to 317", "at most 299")


def test_every_problem_of_a_pair_is_reported_at_once(pair: Path) -> None:
    edit_config(
        pair / "drafter", num_target_layers=9, vocab_size=301, dflash_config={"target_layer_ids": [5, 5]}
    )
    text = refuse(pair, PairError, "num_target_layers = 9", "vocab_size = 301", "[5, 5]", "twice")
    assert text.count("what to do: ") >= 4


def test_problems_of_the_config_and_of_the_pair_are_reported_together(pair: Path) -> None:
    """And none that follows only from what stands in for a value that can't be used."""
    edit_config(
        pair / "drafter",
        dflash_config={"block_size": None, "mask_token_id": -1},
        layer_types=["x", "y"],
        hidden_size=48,
        vocab_size=301,
        rope_parameters={"rope_type": "linear"},
    )
    text = refuse(
        pair,
        PairError,
        "block_size in the drafter's config.json is wrong",
        "mask_token_id in the drafter's config.json is wrong",
        "['x', 'y']",
        "factor = None",
        "hidden_size = 48",
        "vocab_size = 301",
        "fc.weight [32, 64]",
        num_draft_tokens=2,
    )
    assert text.count("found: ") == text.count("expected: ") == text.count("what to do: ")
    assert [word for word in ("drafts nothing", "the mask token", "don't fit") if word in text] == []


def test_problems_of_both_configs_are_reported_together(pair: Path) -> None:
    edit_config(pair / "target", num_key_value_heads=3)
    edit_config(pair / "drafter", dflash_config={"block_size": None}, hidden_act=3)
    refuse(pair, PairError, "query heads", "block_size", "hidden_act")


# --- Noticed only when the weights are read ---


@pytest.mark.parametrize(
    ("side", "tensor"), [("target", "model.norm.weight"), ("drafter", "layers.1.mlp.down_proj.weight")]
)
def test_weights_that_are_not_finite(
    pair: Path, side: str, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_tensors(pair / side, lambda tensors: tensors[tensor].view(-1)[3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="what to do") as caught:
        build(pair / "target", pair / "drafter", pair.parent / "outputs" / "bundle")
    assert tensor in str(caught.value)
    assert "1 of" in str(caught.value)
    assert os.listdir(pair.parent / "outputs") == []


def test_weights_that_do_not_fit_fp16(pair: Path) -> None:
    edit_tensors(pair / "drafter", lambda tensors: tensors["norm.weight"][0].fill_(1e5))
    with pytest.raises(CheckpointError, match="precision bf16 or fp32") as caught:
        build(pair / "target", pair / "drafter", pair.parent / "outputs" / "bundle", precision="fp16")
    assert "norm.weight" in str(caught.value)
    assert os.listdir(pair.parent / "outputs") == []
