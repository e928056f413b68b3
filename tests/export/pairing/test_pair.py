"""Whether two models belong together: nothing is missed, and everything is said at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import load_drafter_config
from dflash_export.errors import PairError
from dflash_export.pairing.pair import check_pair, require_pair
from dflash_export.pairing.tensors import target_tensor_shapes
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.resolve import open_weights, resolve_drafter, resolve_target
from dflash_export.sources.tokenizer import export_tokenizer
from dflash_export.sources.weights import Weights
from dflash_export.targets.config import load_target_config
from dflash_rt.errors import Problem
from tests.checkpoints import (
    FAMILIES,
    SMOLLM2,
    VOCAB,
    drafter_json,
    edit_json,
    open_drafter,
    open_target,
    save_drafter,
    save_target,
    target_config,
)

DEMO = Path(__file__).parents[3] / "examples" / "smollm2-135m-instruct-dflash"
THINKING = "{% if enable_thinking is false %}<think></think>{% endif %}"


class Pair:
    """A tiny pair on disk that fits; tests break it before :meth:`check`."""

    def __init__(self, folder: Path) -> None:
        self.target = save_target(folder / "target")
        self.drafter = save_drafter(folder / "drafter")

    def check(self, change: dict[str, Any] | None = None, **options: Any) -> list[Problem]:
        """``change`` replaces fields of the drafter's config."""
        _, config, weights = open_target(self.target)
        drafter, drafter_weights = open_drafter(self.drafter)
        if change:
            drafter = dataclasses.replace(drafter, **change)
        with weights, drafter_weights:
            return check_pair(config, weights, drafter, drafter_weights, **({"max_seq_len": 128} | options))

    def edit_tensors(self, owner: str, **changes: torch.Tensor | None) -> None:
        """``None`` removes a tensor; ``__`` in a name stands for a dot."""
        path = getattr(self, owner) / "model.safetensors"
        tensors = load_file(path)
        for name, value in changes.items():
            tensors.pop(name.replace("__", "."), None)
            if value is not None:
                tensors[name.replace("__", ".")] = value
        save_file(tensors, path)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def assert_one(problems: list[Problem], *fragments: str) -> None:
    """Exactly one problem, which says what was found, what was expected and what to do."""
    assert len(problems) == 1, "\n".join(map(str, problems))
    assert problems[0].found is not None
    assert problems[0].expected is not None
    assert problems[0].remedy is not None
    for fragment in fragments:
        assert fragment in str(problems[0]), f"{fragment!r} is not in:\n{problems[0]}"


# --- Pairs that fit ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fits(tmp_path: Path, family: str, tied: bool) -> None:
    save_target(tmp_path / "target", family, tie_word_embeddings=tied)
    raw = drafter_json("old", attention_bias=True)
    save_drafter(tmp_path / "drafter", raw)
    _, config, weights = open_target(tmp_path / "target")
    drafter, drafter_weights = open_drafter(tmp_path / "drafter")
    with weights, drafter_weights:
        options: dict[str, Any] = {"max_seq_len": 128, "tokenizer_size": 258, "chat_template": "{{ x }}"}
        problems = check_pair(config, weights, drafter, drafter_weights, **options)
        assert problems == []
        require_pair(problems, Findings())


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Any, Weights, DrafterConfig, Weights]]:
    target, drafter = resolve_target(SMOLLM2), resolve_drafter(DEMO)
    config = load_target_config(target)
    with open_weights(target, config) as weights, open_weights(drafter) as drafter_weights:
        yield config, weights, load_drafter_config(drafter), drafter_weights


def test_demo_pair_fits(demo: tuple[Any, Weights, DrafterConfig, Weights], tmp_path: Path) -> None:
    files = export_tokenizer(resolve_target(SMOLLM2), tmp_path)
    assert files is not None
    options = {"tokenizer_size": files.size, "chat_template": files.chat_template}
    assert check_pair(*demo, max_seq_len=8192, **options) == []


def test_expected_names_are_those_of_the_module() -> None:
    shapes = target_tensor_shapes(target_config("qwen3_moe"))
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (3, 16, 16)
    assert shapes["lm_head.weight"] == (VOCAB, 16)


# --- Pairs that don't ---


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (
            {"num_target_layers": 5},
            ("number of target layers", "num_target_layers = 5", "4, as in the target"),
        ),
        ({"vocab_size": 301}, ("another vocabulary", "vocab_size = 301", "300")),
        ({"feature_layers": (0, 4)}, ("layer ids [4]", "0 to 3", "speculators")),
        ({"feature_layers": (2, 2)}, ("taps a layer twice", "[2, 2]")),
        ({"block_size": 1}, ("drafts nothing", "block_size 1", "2 or more")),
        ({"layer_types": ("full_attention",)}, ("1 layer_types for 2 layers", "one for each layer")),
        ({"mask_token_id": 300}, ("outside the target's vocabulary", "mask_token_id 300", "below 300")),
        ({"layer_types": ("sliding_attention",) * 2}, ("no window", "use_sliding_window true")),
        ({"hidden_act": "sigmoidish"}, ("drafter's hidden_act", "'sigmoidish'")),
        (
            {"max_position_embeddings": 100},
            ("drafter's positions", "max_position_embeddings 100", "100 or less"),
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ("running length",)),
        (
            {"attention_bias": True},
            ("drafter's checkpoint doesn't hold", "missing: layers.0.self_attn.k_proj.bias"),
        ),
    ],
)
def test_one_thing_wrong_in_the_drafter(
    pair: Pair, change: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    assert_one(pair.check(change), *fragments)


def test_hidden_size(pair: Pair) -> None:
    save_drafter(pair.drafter, drafter_json(hidden_size=8))
    assert_one(pair.check(), "another hidden size", "hidden_size = 8", "16, as in the target")


def test_sizes_that_do_not_fit_together_in_the_drafter(pair: Pair) -> None:
    problems = pair.check({"num_key_value_heads": 3, "head_dim": 7})
    texts = [problem.what for problem in problems]
    assert "the drafter's heads don't fit together" in texts
    assert "the drafter's head size can't be rotated" in texts


def test_number_of_taps_against_fc(pair: Pair) -> None:
    problems = pair.check({"feature_layers": (0, 1, 2)})
    assert_one(problems, "fc.weight [16, 32], not [16, 48]", "one revision of the drafter")


@pytest.mark.parametrize("max_seq_len", [129, 4096])
def test_longer_than_both_models(pair: Pair, max_seq_len: int) -> None:
    problems = pair.check(max_seq_len=max_seq_len)
    assert [problem.what for problem in problems] == [
        "the length limit is beyond the target's positions",
        "the length limit is beyond the drafter's positions",
    ]
    assert all("choose max_seq_len 128 or less" in str(problem) for problem in problems)


@pytest.mark.parametrize("max_seq_len", [-1, 0, 1])
def test_no_room(pair: Pair, max_seq_len: int) -> None:
    assert_one(pair.check(max_seq_len=max_seq_len), f"max_seq_len {max_seq_len}", "2 or more")


def test_tokenizer_beyond_the_vocabulary(pair: Pair) -> None:
    assert pair.check(tokenizer_size=VOCAB) == []
    assert_one(pair.check(tokenizer_size=VOCAB + 1), "ids up to 300", "at most 299")


def test_mask_row_of_zeros(pair: Pair) -> None:
    embedding = load_file(pair.target / "model.safetensors")["model.embed_tokens.weight"]
    embedding[7] = 0
    pair.edit_tensors("target", model__embed_tokens__weight=embedding)
    for size in (None, 5, 258):  # in the tokenizer's vocabulary or not
        assert_one(pair.check(tokenizer_size=size), "embedding row 7 is all zeros", "mask_token_id")


def test_mask_row_that_equals_padding(pair: Pair) -> None:
    embedding = load_file(pair.target / "model.safetensors")["model.embed_tokens.weight"]
    embedding[258:] = embedding[7]
    pair.edit_tensors("target", model__embed_tokens__weight=embedding)
    assert_one(pair.check(tokenizer_size=258), "embedding row 7 equals padding row 258")
    # z-lab's Qwen3 drafters use the first row of the padding itself, and were trained with it.
    assert pair.check({"mask_token_id": 258}, tokenizer_size=258) == []
    assert pair.check(tokenizer_size=VOCAB) == []
    assert pair.check() == []


def test_thinking_has_to_be_stated(pair: Pair) -> None:
    assert_one(pair.check(chat_template=THINKING), "enable_thinking", "state it", "Qwen3-4B")
    assert_one(pair.check(chat_template=THINKING, chat_template_kwargs={"other": 1}), "enable_thinking")
    for value in (True, False):
        assert pair.check(chat_template=THINKING, chat_template_kwargs={"enable_thinking": value}) == []


def test_template_arguments_without_a_template(pair: Pair) -> None:
    problems = pair.check(chat_template_kwargs={"enable_thinking": False})
    assert_one(problems, "no chat template", "enable_thinking")
    assert pair.check(chat_template_kwargs={}) == []


@pytest.mark.parametrize("owner", ["target", "drafter"])
def test_missing_and_unexpected_tensors_together(pair: Pair, owner: str) -> None:
    prefix = "model__" if owner == "target" else ""
    changes = {
        f"{prefix}norm__weight": None,
        f"{prefix}layers__1__mlp__up_proj__weight": None,
        "another__weight": torch.ones(2),
        "embed_tokens__weight": torch.ones(2),
    }
    pair.edit_tensors(owner, **changes)
    dotted = prefix.replace("__", ".")
    assert_one(
        pair.check(),
        f"the {owner}'s checkpoint",
        f"missing: {dotted}layers.1.mlp.up_proj.weight, {dotted}norm.weight",
        "unexpected: another.weight, embed_tokens.weight",
        f"one revision of the {owner}",
    )


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("target", "model.layers.3.self_attn.q_proj.weight"),
        ("target", "model.embed_tokens.weight"),
        ("target", "lm_head.weight"),
        *(("drafter", name) for name in ("fc.weight", "hidden_norm.weight", "norm.weight")),
        *(
            ("drafter", f"layers.1.self_attn.{name}.weight")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        *(("drafter", f"layers.0.self_attn.{name}.weight") for name in ("q_norm", "k_norm")),
        *(("drafter", f"layers.0.mlp.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")),
        ("drafter", "layers.1.input_layernorm.weight"),
        ("drafter", "layers.1.post_attention_layernorm.weight"),
    ],
)
def test_every_shape_is_compared(pair: Pair, owner: str, name: str) -> None:
    value = load_file(getattr(pair, owner) / "model.safetensors")[name]
    longer = torch.cat([value, value[:1]])
    pair.edit_tensors(owner, **{name.replace(".", "__"): longer})
    assert_one(
        pair.check(), f"tensors of the {owner}", f"{name} {list(longer.shape)}, not {list(value.shape)}"
    )


def test_quantised_tensor(pair: Pair) -> None:
    pair.edit_tensors("drafter", fc__weight=torch.ones(16, 32, dtype=torch.int8))
    assert_one(pair.check(), "not stored in floating point", "fc.weight torch.int8", "not quantised")


def test_missing_head(pair: Pair) -> None:
    pair.edit_tensors("target", lm_head__weight=None)
    assert_one(pair.check(), "missing: lm_head.weight")
    edit_json(pair.target / "config.json", tie_word_embeddings=True)
    assert pair.check() == []


def test_tied_head_that_differs(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    edit_json(pair.target / "config.json", tie_word_embeddings=True)
    assert_one(pair.check(), "tied to the embedding, but stores another head", "tie_word_embeddings to false")
    embedding = load_file(pair.target / "model.safetensors")["model.embed_tokens.weight"]
    pair.edit_tensors("target", lm_head__weight=embedding.clone())
    assert pair.check() == []


def test_unsupported_target_comes_first(pair: Pair) -> None:
    _, config, weights = open_target(pair.target)
    config.is_causal = False
    drafter, drafter_weights = open_drafter(pair.drafter)
    with weights, drafter_weights:
        problems = check_pair(config, weights, drafter, drafter_weights, max_seq_len=10**6)
    assert_one(problems, "is_causal is set")


def test_everything_at_once(pair: Pair) -> None:
    pair.edit_tensors("target", model__norm__weight=None)
    _, config, weights = open_target(pair.target)
    drafter, drafter_weights = open_drafter(pair.drafter)
    drafter = dataclasses.replace(
        drafter, vocab_size=5, num_target_layers=9, feature_layers=(7, 7), block_size=1, mask_token_id=400
    )
    with weights, drafter_weights, pytest.raises(PairError) as caught:
        problems = check_pair(
            config,
            weights,
            drafter,
            drafter_weights,
            max_seq_len=10_000,
            tokenizer_size=500,
            chat_template=THINKING,
        )
        require_pair(problems, Findings())
    assert len(caught.value.problems) == 11
    text = str(caught.value)
    assert "11 problems" in text
    assert text.count("found: ") == text.count("expected: ") == text.count("what to do: ") == 11


def test_wrong_drafter_for_the_demo_target(
    demo: tuple[Any, Weights, DrafterConfig, Weights], pair: Pair
) -> None:
    config, weights, _, _ = demo
    drafter, drafter_weights = open_drafter(pair.drafter)
    with drafter_weights, pytest.raises(PairError, match="3 problems") as caught:
        require_pair(check_pair(config, weights, drafter, drafter_weights, max_seq_len=64), Findings())
    for fragment in ("hidden_size = 16", "vocab_size = 300", "num_target_layers = 4", "matching revision"):
        assert fragment in str(caught.value)
