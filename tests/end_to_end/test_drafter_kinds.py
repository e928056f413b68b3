"""Configs and pairs of drafters that aren't DFlash v1: what is read from their files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import DFlash2DraftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from dflash_export.drafters.dflash2 import Convolution, DFlash2, Selector
from dflash_export.drafters.read import parse_drafter_config
from dflash_export.drafters.speculators import Speculators
from dflash_export.errors import CheckpointError, UnsupportedModelError, VerifyError
from dflash_export.pairing.pair import check_pair
from dflash_export.reference import load_drafter
from dflash_export.sources.resolve import open_weights, resolve_drafter
from dflash_rt.errors import DFlashError, Problem
from tests.checkpoints import check_message, open_target
from tests.export.drafters.speculators_pairs import make_speculators, speculators_config
from tests.pairs import TargetSpec, drafter_config, make_drafter

FULL, SLIDING = "full_attention", "sliding_attention"
SPEC = TargetSpec("qwen3", vocab=12)
DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 4}


def speculators(**changes: Any) -> dict[str, Any]:
    return speculators_config(
        SPEC, layer_types=[FULL, SLIDING], block_size=4, own_vocab=7, window=5, **changes
    )


def layers(**changes: Any) -> dict[str, Any]:
    """A speculators config with other layers; ``...`` removes a key."""
    raw = speculators()
    raw["transformer_layer_config"] |= changes
    raw["transformer_layer_config"] = {
        key: value for key, value in raw["transformer_layer_config"].items() if value is not ...
    }
    return raw


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in speculators().items() if key not in keys}


def dflash2(**dflash: Any) -> dict[str, Any]:
    return drafter_config(SPEC, architectures=["DFlash2DraftModel"], dflash_config=DFLASH2 | dflash)


# --- The speculators format ---


def test_what_a_speculators_file_says() -> None:
    config = parse_drafter_config(speculators())
    assert config.kind == Speculators()
    assert config.feature_layers == (1, 0)  # stored as 2, 1
    assert (config.block_size, config.samples_from_anchor) == (4, False)
    assert (config.vocab_size, config.draft_vocab_size) == (12, 7)
    assert config.layer_is_causal == (False, True)
    assert config.layer_windows == (None, 5)
    assert config.window_from_anchor
    assert config.num_target_layers is None
    assert config.own_graphs == ("draft_embed", "draft_lm_head")
    shapes = config.tensor_shapes()
    assert shapes["embed_tokens.weight"] == (12, 32)
    assert shapes["lm_head.weight"] == (7, 32)
    assert (shapes["d2t"], shapes["t2d"]) == ((7,), (12,))


def test_other_values_of_a_speculators_file() -> None:
    config = parse_drafter_config(speculators(sliding_window_non_causal=True, sample_from_anchor=True))
    assert config.layer_is_causal == (False, False)
    assert (config.block_size, config.samples_from_anchor) == (5, True)
    whole = parse_drafter_config(speculators(draft_vocab_size=12))
    assert "d2t" not in whole.tensor_shapes()


def test_values_that_a_speculators_file_leaves_out() -> None:
    config = parse_drafter_config(without("block_size", "sample_from_anchor", "sliding_window_non_causal"))
    assert config == parse_drafter_config(speculators() | {"block_size": 8})
    assert parse_drafter_config(without("draft_vocab_size")).draft_vocab_size == 32000
    defaults = Qwen3Config()
    config = parse_drafter_config(
        layers(**dict.fromkeys(("head_dim", "hidden_size", "num_attention_heads", "rope_parameters"), ...))
    )
    assert (config.head_dim, config.hidden_size) == (defaults.head_dim, defaults.hidden_size)
    assert config.num_attention_heads == defaults.num_attention_heads
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    rope = {"rope_type": "linear", "factor": 2.0}
    old = parse_drafter_config(layers(rope_parameters=..., rope_theta=1e6, rope_scaling=rope))
    assert old.rope_parameters == rope | {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("raw", "error", "fragment"),
    [
        (speculators(speculators_model_type="eagle3"), UnsupportedModelError, "'eagle3'"),
        (speculators(norm_before_residual=True), CheckpointError, "norm_before_residual"),
        (speculators(quantization_config={}), CheckpointError, "quantization_config"),
        (
            speculators(aux_hidden_state_layer_ids=[0, 2]),
            UnsupportedModelError,
            "taps the target's embedding",
        ),
        (without("aux_hidden_state_layer_ids"), CheckpointError, "a list of integers"),
        (without("mask_token_id"), CheckpointError, "mask_token_id is missing"),
        (speculators(mask_token_id=None), CheckpointError, "mask_token_id"),
        (speculators(sample_from_anchor=1), CheckpointError, "true or false"),
        (speculators(target_hidden_size=64), UnsupportedModelError, "target_hidden_size 64"),
        (without("transformer_layer_config"), CheckpointError, "transformer_layer_config is missing"),
        (speculators(transformer_layer_config=[]), CheckpointError, "an object"),
        (layers(model_type="llama"), UnsupportedModelError, "'llama'"),
        (layers(is_causal=True), CheckpointError, "is_causal"),
        (layers(final_logit_softcapping=30.0), CheckpointError, "final_logit_softcapping"),
        (layers(hidden_size="32"), CheckpointError, "'32'"),
        (layers(layer_types=["chunked_attention"]), UnsupportedModelError, "chunked_attention"),
        (speculators(speculators_config={"algorithm": "dspark"}), UnsupportedModelError, "'dspark'"),
        (
            speculators(speculators_config={"proposal_methods": [{"proposal_type": "sample"}]}),
            UnsupportedModelError,
            "sample",
        ),
        (speculators(speculators_config=3), UnsupportedModelError, "3"),
    ],
)
def test_speculators_files_that_are_refused(
    raw: dict[str, Any], error: type[DFlashError], fragment: str
) -> None:
    with pytest.raises(error) as caught:
        parse_drafter_config(raw)
    check_message(caught, fragment)


# --- DFlash 2 in z-lab's format ---


def test_what_a_dflash2_file_says() -> None:
    raw = dflash2()
    config = parse_drafter_config(raw)
    assert config.kind == DFlash2(Convolution(kernel_size=2, group_size=8), Selector(rank=6, top_k=4))
    assert config.own_graphs == ("select",)
    with torch.device("meta"):
        reference = DFlash2DraftModel(Qwen3Config(**raw))
    state = {
        name.replace("codebook.weight", "codebook"): tuple(value.shape)  # as from_pretrained wants the file
        for name, value in reference.state_dict().items()
    }
    assert config.tensor_shapes() == state


@pytest.mark.parametrize("name", DFLASH2)
def test_a_dflash2_file_has_all_of_its_values(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        parse_drafter_config(dflash2(**{name: None}))
    with pytest.raises(CheckpointError, match="1 or more"):
        parse_drafter_config(dflash2(**{name: 0}))


def test_the_reference_loads_dflash2_and_not_speculators(tmp_path: Path) -> None:
    make_drafter(tmp_path / "v2", dflash2())
    assert isinstance(load_drafter(resolve_drafter(tmp_path / "v2")), DFlash2DraftModel)
    make_speculators(tmp_path / "own", speculators(), seed=1, spread=0.2)
    with pytest.raises(VerifyError, match="speculators format"):
        load_drafter(resolve_drafter(tmp_path / "own"))


# --- Pairs ---


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pairs import make_target

    folder = tmp_path_factory.mktemp("target")
    make_target(folder / "model", SPEC)
    return folder / "model"


def problems(target: Path, drafter: Path) -> list[Problem]:
    with _opened(target) as (config, weights), open_weights(resolve_drafter(drafter)) as own:
        parsed = parse_drafter_config(json.loads((drafter / "config.json").read_text()))
        return check_pair(config, weights, parsed, own, max_seq_len=64)


@contextmanager
def _opened(target: Path) -> Iterator[tuple[Any, Any]]:
    _, config, weights = open_target(target)
    with weights:
        yield config, weights


def test_pairs_that_fit(target: Path, tmp_path: Path) -> None:
    make_drafter(tmp_path / "v2", dflash2())
    assert problems(target, tmp_path / "v2") == []
    for number, raw in enumerate((speculators(), speculators(draft_vocab_size=12, sample_from_anchor=True))):
        own = make_speculators(tmp_path / str(number), raw, seed=1, spread=0.2)
        assert problems(target, own) == []


@pytest.mark.parametrize(
    ("raw", "fragments"),
    [
        (dflash2(conv_group_size=5), ("conv_group_size 5, hidden_size 32",)),
        (dflash2(selector_top_k=13), ("selector_top_k 13", "at most the vocabulary, 12")),
        (speculators(aux_hidden_state_layer_ids=[1, 3]), ("layer id 3", "final norm")),
        (speculators(aux_hidden_state_layer_ids=[1, 4]), ("layer ids [4]", "1 to 3")),
        (speculators(aux_hidden_state_layer_ids=[1, 1]), ("layer ids [1, 1]",)),
        (speculators(mask_token_id=12), ("mask_token_id 12",)),
        (layers(vocab_size=13), ("vocab_size = 13",)),
        (layers(use_sliding_window=False), ("sliding layers have no window",)),
    ],
)
def test_pairs_that_do_not_fit(
    target: Path, tmp_path: Path, raw: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    if "speculators_model_type" in raw:
        make_speculators(tmp_path / "drafter", raw, seed=1, spread=0.2)
    else:
        make_drafter(tmp_path / "drafter", raw)
    text = "\n".join(str(problem) for problem in problems(target, tmp_path / "drafter"))
    for fragment in fragments:
        assert fragment in text


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
SPOILED: dict[str, tuple[Change, str]] = {
    "no head": (lambda t: _less(t, "lm_head.weight"), "missing: lm_head.weight"),
    "no embedding": (lambda t: _less(t, "embed_tokens.weight"), "missing: embed_tokens.weight"),
    "no mapping": (lambda t: _less(t, "d2t"), "missing: d2t"),
    "a mapping of another size": (lambda t: t | {"d2t": t["d2t"][1:]}, "d2t [6], not [7]"),
    "floats as a mapping": (lambda t: t | {"d2t": t["d2t"].float()}, "d2t torch.float32"),
    "numbers as marks": (lambda t: t | {"t2d": t["t2d"].long()}, "t2d torch.int64"),
    "a mapping to nowhere": (lambda t: t | {"d2t": t["d2t"] + 6}, "tokens that the target doesn't have"),
    "negative tokens": (lambda t: t | {"d2t": t["d2t"] - 12}, "tokens that the target doesn't have"),
    "a token twice": (lambda t: t | {"d2t": -torch.arange(7)}, "1 different tokens"),
    "other marks": (lambda t: t | {"t2d": ~t["t2d"]}, "contradict each other"),
    "a mask row of zeros": (lambda t: t | {"embed_tokens.weight": t["embed_tokens.weight"] * 0}, "all zeros"),
}


def _less(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_vocabularies(target: Path, tmp_path: Path, case: str) -> None:
    change, fragment = SPOILED[case]
    folder = make_speculators(tmp_path / "drafter", speculators(), seed=1, spread=0.2)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    found = problems(target, folder)
    assert len(found) == 1
    assert fragment in str(found[0])


def test_a_vocabulary_larger_than_the_targets(target: Path, tmp_path: Path) -> None:
    folder = make_speculators(tmp_path / "drafter", speculators(draft_vocab_size=12), seed=1, spread=0.2)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"draft_vocab_size": 13}))
    assert any("draft_vocab_size 13" in str(problem) for problem in problems(target, folder))
