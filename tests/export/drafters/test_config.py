"""z-lab's config.json, both generations: what it means is what the reference class makes of it."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import DFlashDraftModel
from dflash.model import build_target_layer_ids as reference_taps
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import load_drafter_config, parse_drafter_config
from dflash_export.drafters.zlab import build_target_layer_ids
from dflash_export.errors import CheckpointError, UnsupportedModelError
from dflash_export.sources.resolve import resolve_drafter
from dflash_rt.errors import DFlashError
from tests.checkpoints import check_message, drafter_json, save_drafter

DEMO = Path(__file__).parents[3] / "examples" / "smollm2-135m-instruct-dflash"
ROPES: list[dict[str, Any]] = [
    {"rope_theta": 10000.0, "rope_scaling": None},
    {"rope_theta": 1e6},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
    {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "truncate": False}},
    {
        "rope_parameters": {
            "rope_theta": 5e5,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"rope_parameters": {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.5}},
]


def reference(raw: dict[str, Any]) -> DFlashDraftModel:
    with torch.device("meta"):
        return DFlashDraftModel(Qwen3Config(**copy.deepcopy(raw)))


def assert_same(ours: DrafterConfig, theirs: DFlashDraftModel) -> None:
    """Everything that the reference derives from a file."""
    config = theirs.config
    assert ours.block_size == theirs.block_size
    assert ours.mask_token_id == theirs.mask_token_id
    assert list(ours.feature_layers) == list(theirs.target_layer_ids)
    assert ours.layer_is_causal == tuple(layer.self_attn.is_causal for layer in theirs.layers)
    assert ours.layer_windows == tuple(layer.self_attn.sliding_window for layer in theirs.layers)
    assert list(ours.layer_types) == config.layer_types
    assert ours.sliding_window == config.sliding_window
    assert ours.head_dim == theirs.layers[0].self_attn.head_dim
    assert ours.num_key_value_heads == config.num_key_value_heads
    assert ours.rms_norm_eps == theirs.norm.variance_epsilon
    rope = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    assert ours.rope_parameters == rope
    state = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert ours.tensor_shapes() == state


# --- What is read ---


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 5))
    raw = drafter_json(
        draw(st.sampled_from(["old", "new"])),
        num_hidden_layers=layers,
        num_target_layers=draw(st.integers(layers + 4, 40)),
        use_sliding_window=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 1, 5, 4096])),
        max_window_layers=draw(st.integers(0, 5)),
        attention_bias=draw(st.booleans()),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4, None])),
        head_dim=draw(st.sampled_from([2, 8, ...])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6, ...])),
        is_causal=draw(st.sampled_from([True, False, None, ...])),
        max_position_embeddings=draw(st.sampled_from([128, 40960])),
    )
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    raw["layer_types"] = draw(st.none() | st.lists(kinds, min_size=layers, max_size=layers))
    if raw["sliding_window"] == 1 and draw(st.booleans()):
        del raw["sliding_window"]
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        raw.pop(key, None)
    raw |= copy.deepcopy(draw(st.sampled_from(ROPES)))
    if draw(st.booleans()):
        del raw["dflash_config"]["target_layer_ids"]
    for name in draw(st.sets(st.sampled_from(["mask_token_id", "target_layer_ids"]))):
        if name in raw["dflash_config"]:  # either place is read
            raw[name] = raw["dflash_config"][name]
            if draw(st.booleans()):
                del raw["dflash_config"][name]
    return raw


@given(configs())
@settings(max_examples=120, deadline=None)
def test_means_what_the_reference_makes_of_it(raw: dict[str, Any]) -> None:
    before = copy.deepcopy(raw)
    ours = parse_drafter_config(raw)
    assert raw == before
    assert_same(ours, reference(raw))
    # And the config that is traced gives the same once more.
    with torch.device("meta"):
        assert_same(ours, DFlashDraftModel(ours.to_qwen3_config()))


@pytest.mark.parametrize("generation", ["old", "new"])
def test_both_generations_say_the_same(generation: str) -> None:
    config = parse_drafter_config(drafter_json(generation))
    assert config == parse_drafter_config(drafter_json("new"))
    assert (config.block_size, config.mask_token_id, config.feature_layers) == (4, 7, (0, 2))
    assert config.layer_is_causal == (False, False)
    assert not config.has_logit_transform


def test_sliding_layers_are_causal_even_without_a_window() -> None:
    raw = drafter_json(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    windowless = parse_drafter_config(raw)  # use_sliding_window is false
    assert (windowless.layer_is_causal, windowless.layer_windows) == ((True, False), (None, None))
    windowed = parse_drafter_config(raw | {"use_sliding_window": True})
    assert (windowed.layer_is_causal, windowed.layer_windows) == ((True, False), (4, None))
    both_ways = parse_drafter_config(raw | {"use_sliding_window": True, "is_causal": False})
    assert (both_ways.layer_is_causal, both_ways.layer_windows) == ((False, False), (4, None))


@pytest.mark.parametrize("place", ["nested", "top"])
def test_logit_transforms(place: str) -> None:
    values = {"final_logit_softcapping": 30.0, "output_multiplier": 0.5, "input_embedding_scale": 2}
    raw = drafter_json()
    (raw["dflash_config"] if place == "nested" else raw).update(values)
    config = parse_drafter_config(raw)
    assert (config.final_logit_softcapping, config.output_multiplier) == (30.0, 0.5)
    assert config.input_embedding_scale == 2.0
    assert config.has_logit_transform
    round_trip = DFlashDraftModel(config.to_qwen3_config())
    logits = torch.randn(1, 3, 5) * 100
    expected = torch.tanh(logits * 0.5 / 30.0) * 30.0
    assert torch.equal(round_trip.compute_logits(logits, lambda hidden: hidden), expected)


@pytest.mark.parametrize("softcap", [None, 0, 0.0, -1.0])
def test_softcap_that_the_reference_does_not_apply(softcap: float | None) -> None:
    assert parse_drafter_config(drafter_json(final_logit_softcapping=softcap)).final_logit_softcapping is None


@given(st.integers(1, 12), st.integers(5, 120))
@settings(max_examples=200, deadline=None)
def test_default_taps(draft_layers: int, target_layers: int) -> None:
    assert list(build_target_layer_ids(target_layers, draft_layers)) == reference_taps(
        target_layers, draft_layers
    )


def test_default_taps_of_the_published_drafters() -> None:
    assert build_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert build_target_layer_ids(32, 5) == (1, 8, 15, 22, 29)


def test_folder(tmp_path: Path) -> None:
    folder = save_drafter(tmp_path)
    assert load_drafter_config(resolve_drafter(folder)) == parse_drafter_config(drafter_json())


def test_demo_drafter() -> None:
    raw = json.loads((DEMO / "config.json").read_text())
    config = parse_drafter_config(raw)
    assert_same(config, reference(raw))
    assert (config.block_size, config.mask_token_id, config.feature_layers) == (8, 16, (1, 14, 27))


# --- What is refused ---


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever a key holds, nothing but the project's own errors comes out."""
    raw = drafter_json(data.draw(st.sampled_from(["old", "new"])))
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from([raw, raw["dflash_config"]])) if "dflash_config" in raw else raw
        if isinstance(where, dict):
            extra = [
                "rope_scaling",
                "rope_theta",
                "rope_parameters",
                "architectures",
                "is_causal",
                "block_size",
            ]
            where[data.draw(st.sampled_from(sorted(set(where) | set(extra))))] = data.draw(JSON)
    with contextlib.suppress(DFlashError):
        assert isinstance(parse_drafter_config(raw), DrafterConfig)


def bad(**changes: Any) -> dict[str, Any]:
    return drafter_json(**changes)


def nested(**changes: Any) -> dict[str, Any]:
    raw = drafter_json()
    raw["dflash_config"] = {k: v for k, v in (raw["dflash_config"] | changes).items() if v is not ...}
    return raw


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (bad(architectures=["DFlashDraftModel", "DFlash2DraftModel"]), "not a DFlash drafter"),
        (bad(sample_from_anchor=True), "sample_from_anchor"),
        (nested(conv_kernel_size=2, selector_rank=256), "conv_kernel_size, selector_rank"),
        (bad(selector_top_k=16), "selector_top_k"),
        ({"speculators_model_type": "eagle3", "transformer_layer_config": {}}, "'eagle3'"),
        (bad(speculators_config={}), "speculators format"),
        (bad(architectures=["Qwen3ForCausalLM"]), "swapped"),
        (bad(architectures=...), "not a DFlash drafter"),
        (bad(draft_vocab_size=32000), "draft_vocab_size 32000"),
        (bad(eagle_aux_hidden_state_layer_ids=[1]), "eagle_aux_hidden_state_layer_ids"),
        (bad(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (bad(model_type="llama"), "'llama'"),
        (bad(layer_types=["full_attention", "chunked_attention"]), "chunked_attention"),
        (bad(layer_types="full_attention"), "a list of"),
        (bad(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "running length"),
        (bad(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "running length"),
        (bad(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "'spiral'"),
        (bad(rope_parameters={"rope_type": "default"}), "rope_theta = None"),
        (bad(rope_parameters=...), "rope_theta = None"),
        (bad(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor = None"),
        (
            bad(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}),
            "mrope_section",
        ),
        (bad(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (bad(rope_parameters={"full_attention": {"rope_type": "default"}}), "for each kind of layer"),
    ],
)
def test_other_kinds(raw: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse_drafter_config(raw)
    check_message(caught, fragment)


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (nested(mask_token_id=...), "mask_token_id is missing"),
        (nested(block_size=...), "block_size is missing"),
        (bad(hidden_size=...), "hidden_size is missing"),
        (bad(num_target_layers=...), "num_target_layers is missing"),
        (bad(dflash_config=...), "is missing"),
        (bad(dflash_config=[]), "an object"),
        (nested(mask_token_id="7"), "'7'"),
        (nested(mask_token_id=-1), "0 or more"),
        (nested(block_size=True), "True"),
        (nested(block_size=4.0), "4.0"),
        (nested(block_size=0), "1 or more"),
        (nested(block_size=None), "None"),
        (nested(target_layer_ids=[]), "a list of integers"),
        (nested(target_layer_ids=None), "a list of integers"),
        (nested(target_layer_ids=[0, "2"]), "[0, '2']"),
        (nested(target_layer_ids=[0, -1]), "[0, -1]"),
        (nested(input_embedding_scale=0), "above 0"),
        (nested(output_multiplier=float("nan")), "nan"),
        (nested(final_logit_softcapping="30"), "'30'"),
        (nested(colour="red"), "colour"),
        (bad(hidden_size="16"), "'16'"),
        (bad(attention_bias=1), "true or false"),
        (bad(hidden_act=3), "a string"),
        (bad(rms_norm_eps=-1), "above 0"),
        (bad(use_sliding_window=True, sliding_window=0), "1 or more"),
        (bad(use_sliding_window="yes"), "true or false"),
        (bad(is_causal="no"), "true or false"),
        (bad(block_size=8), "block_size is given twice"),
        (bad(target_layer_ids=[0, 3]), "target_layer_ids is given twice"),
        (nested(is_causal=True), "is_causal contradicts"),
        (bad(causal=True), "causal contradicts"),
        (bad(rope_theta=1e6), "RoPE is given twice"),
        (bad(rope_scaling={"rope_type": "linear", "factor": 2.0}), "RoPE is given twice"),
        (bad(rope_scaling="linear"), "rope_scaling"),
    ],
)
def test_wrong_values(raw: dict[str, Any], fragment: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_drafter_config(raw)
    check_message(caught, fragment)


def test_spellings_that_agree_are_fine() -> None:
    raw = drafter_json(block_size=4, causal=False, rope_theta=10000.0)
    raw["dflash_config"]["is_causal"] = False
    assert parse_drafter_config(raw) == parse_drafter_config(drafter_json())


def test_values_that_transformers_refuses() -> None:
    config = parse_drafter_config(drafter_json(layer_types=["full_attention"]))
    with pytest.raises(CheckpointError, match="transformers refuses") as caught:
        config.to_qwen3_config()
    check_message(caught, "num_hidden_layers")


@pytest.mark.parametrize(("text", "fragment"), [("{", "can't be read as JSON"), ("3", "a int")])
def test_malformed_file(tmp_path: Path, text: str, fragment: str) -> None:
    save_drafter(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_drafter_config(resolve_drafter(tmp_path))
    check_message(caught, fragment)


def test_missing_file(tmp_path: Path) -> None:
    save_drafter(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing") as caught:
        load_drafter_config(resolve_drafter(tmp_path))
    check_message(caught, "download the model again")
