"""The target's configuration: what is read off it, and which targets are refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dflash_export.errors import CheckpointError, UnsupportedModelError
from dflash_export.sources.resolve import resolve_target
from dflash_export.targets.checks import check_target
from dflash_export.targets.config import (
    SUPPORTED_FAMILIES,
    load_target_config,
    require_target,
    sampling_defaults,
    stop_token_ids,
    target_facts,
)
from dflash_rt.bundle.manifest import SamplingDefaults
from dflash_rt.errors import DFlashError
from tests.checkpoints import (
    FAMILIES,
    check_message,
    edit_json,
    save_target,
    target_config,
)

TEXTS = [
    "Why is the sky blue?",
    "  two  spaces, tabs\tand\n\nnewlines ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, 12345.67, a_b-c/d, don't",
    "日本語と 🤖🇩🇪 and \u200b zero width",
    "def f(x):\n    return x**2  # comment",
    "<|endoftext|>",
    "",
    "x" * 300,
]


def load(folder: Path) -> Any:
    return load_target_config(resolve_target(folder))


# --- Facts ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_facts(tmp_path: Path, family: str, tied: bool) -> None:
    save_target(tmp_path, family, tie_word_embeddings=tied)
    config = load(tmp_path)
    assert check_target(config) == []
    facts = target_facts(config)
    assert (facts.model_type, facts.num_layers, facts.hidden_size, facts.vocab_size) == (family, 4, 16, 300)
    assert (facts.num_attention_heads, facts.num_key_value_heads) == (4, 2)
    assert (facts.max_position_embeddings, facts.tie_word_embeddings) == (128, tied)
    model = AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[0].self_attn
    assert facts.head_dim == attention.head_dim == (8 if family.startswith("qwen3") else 4)
    assert model.config.architectures is None or SUPPORTED_FAMILIES[family] in config.architectures


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, (None,) * 4),
        ("llama", {"sliding_window": 8}, (None,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, (8,) * 4),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 8}, (None,) * 4),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            (None,) * 3 + (8,),
        ),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None,) * 4),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_are_those_of_the_module(
    family: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    """Perturb one token: the rows whose output changes are those that see it."""
    config = target_config(family, **changes)
    assert check_target(config) == []
    facts = target_facts(config)
    assert facts.sliding_windows == windows
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, 33)[None]
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    for window, attention in zip(windows, attentions, strict=True):
        rows = torch.arange(30)
        distance = rows[:, None] - rows[None, :]
        visible = (distance >= 0) & (distance < (window or 1000))
        assert torch.equal((attention[0] > 0).all(dim=0), visible)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 2, 5]}, 9, (5, 2)),
        ({"eos_token_id": 7}, 9, (7,)),
        ({"eos_token_id": None}, 9, (9,)),
        ({}, [9, 8], (9, 8)),
        (None, 9, (9,)),
        (None, None, ()),
    ],
)
def test_stop_token_ids(
    tmp_path: Path, generation: dict[str, Any] | None, config: object, expected: tuple[int, ...]
) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=config)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        edit_json(tmp_path / "generation_config.json", **generation)
    source = resolve_target(tmp_path)
    assert stop_token_ids(source, load_target_config(source)) == expected


@pytest.mark.parametrize("eos", [300, -1, "2", [2, 300], [2, None], True])
def test_wrong_stop_token_ids(tmp_path: Path, eos: object) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=eos)
    source = resolve_target(tmp_path)
    with pytest.raises(CheckpointError, match=r"eos_token_id in generation_config\.json is wrong") as caught:
        stop_token_ids(source, load_target_config(source))
    check_message(caught, repr(eos), "[0, 300)")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (0.0, 1.0, 0, 0.0, 1.0)),
        ({}, (0.0, 1.0, 0, 0.0, 1.0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, (0.0, 1.0, 0, 0.0, 1.0)),
        ({"temperature": 0.6, "top_p": 0.9}, (0.0, 1.0, 0, 0.0, 1.0)),
        ({"do_sample": True}, (1.0, 1.0, 0, 0.0, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, (0.6, 0.95, 20, 0.0, 1.0)),
        ({"do_sample": True, "temperature": 1, "min_p": 0.1, "top_k": None}, (1.0, 1.0, 0, 0.1, 1.0)),
        ({"repetition_penalty": 1.05}, (0.0, 1.0, 0, 0.0, 1.05)),  # transformers applies it to greedy too
    ],
)
def test_sampling_defaults(
    tmp_path: Path, generation: dict[str, Any] | None, expected: tuple[float, ...]
) -> None:
    save_target(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        edit_json(tmp_path / "generation_config.json", **generation)
    defaults = sampling_defaults(resolve_target(tmp_path))
    found = tuple(getattr(defaults, name) for name in SamplingDefaults.__annotations__)
    assert found == expected
    assert [type(value) for value in found] == [float, float, int, float, float]


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -1), ("top_p", 1.5), ("top_k", 2.5), ("repetition_penalty", "1.1")]
)
def test_wrong_sampling_defaults(tmp_path: Path, key: str, value: object) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "generation_config.json", do_sample=True, **{key: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is wrong") as caught:
        sampling_defaults(resolve_target(tmp_path))
    check_message(caught, repr(value))


# --- Targets that are refused ---

SLIDING = ["sliding_attention"] * 4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "gemma3_text"}, "'gemma3_text'"),
        ({"model_type": "opt", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "which is never run"),
        ({"model_type": ...}, "family isn't supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "modeling.Mine"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "method gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "method awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "method fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "method unknown"),
        ({"text_config": {"hidden_size": 3}}, "text_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "running length"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "factor": 2.0,
                }
            },
            "running length",
        ),
        ({"rope_parameters": {"rope_type": "mystery", "rope_theta": 1e4}}, "'mystery'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta = -1.0"),
        ({"is_causal": False}, "is_causal is set"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attention_chunk_size": 128}, "attention_chunk_size"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_key_value_heads": 3}, "4 heads, 3 key/value heads"),
        ({"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers = 0"),
        ({"head_dim": 3}, "an even number"),
        ({"hidden_act": "sigmoidish"}, "'sigmoidish'"),
        ({"use_sliding_window": True, "sliding_window": 0, "layer_types": SLIDING}, "sliding_window 0"),
        ({"layer_types": SLIDING}, "use_sliding_window true"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
    ],
)
def test_unsupported(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        load(tmp_path)
    check_message(caught, fragment)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}},
        {"is_causal": True, "quantization_config": None, "use_bidirectional_attention": False},
        {"auto_map": {"AutoTokenizer": ["tok.Mine", None]}},
    ],
)
def test_supported(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    load(tmp_path)


def test_layer_types_that_the_module_passes_over() -> None:
    config = target_config("mistral", sliding_window=8)
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="has one kind of attention") as caught:
        require_target(config)
    check_message(caught, "another architecture")


@pytest.mark.parametrize(
    "changes", [{"num_experts_per_tok": 4}, {"num_experts_per_tok": 0}, {"moe_intermediate_size": 0}]
)
def test_mixture_that_does_not_fit_together(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UnsupportedModelError, match="mixture of experts") as caught:
        require_target(target_config("qwen3_moe", **changes))
    check_message(caught, " ".join(map(str, next(iter(changes.items())))))


def test_all_reasons_at_once(tmp_path: Path) -> None:
    save_target(tmp_path)
    edit_json(
        tmp_path / "config.json",
        quantization_config={"quant_method": "gptq"},
        is_causal=False,
        architectures=["Other"],
    )
    with pytest.raises(UnsupportedModelError, match="can't be exported faithfully") as caught:
        load(tmp_path)
    check_message(
        caught, "1. this target isn't the plain", "2. this target is quantised", "3. is_causal is set"
    )


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "16"}, {"layer_types": ["full_attention"]}, {"num_attention_heads": None}]
)
def test_config_that_transformers_refuses(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match="can't read the target's configuration") as caught:
        load(tmp_path)
    check_message(caught, next(iter(changes)), "compare it with the published one")


def test_no_config(tmp_path: Path) -> None:
    save_target(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path)


CONFIG_KEYS = [
    "architectures",
    "auto_map",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "layer_types",
    "model_type",
    "num_hidden_layers",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
]


@given(
    key=st.sampled_from(CONFIG_KEYS),
    value=st.none()
    | st.booleans()
    | st.integers(-1, 20)
    | st.text(max_size=3)
    | st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=3)
    | st.dictionaries(
        st.sampled_from(["rope_type", "factor", "x"]), st.text(max_size=3) | st.lists(st.integers())
    ),
)
@settings(max_examples=150, deadline=None)
def test_any_value_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    folder = tmp_path_factory.mktemp("target")
    (folder / "model.safetensors").touch()
    target_config("qwen3").save_pretrained(folder)
    edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    edit_json(folder / "config.json", **{key: value})
    source = resolve_target(folder)
    with contextlib.suppress(DFlashError):
        config = load_target_config(source)
        target_facts(config)
        stop_token_ids(source, config)


# --- Settings that aren't taken over ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [5]),
        ("begin_suppress_tokens", [5]),
        ("bad_words_ids", [[5]]),
        ("forced_bos_token_id", 0),
        ("forced_eos_token_id", 2),
        ("num_beams", 4),
        ("encoder_repetition_penalty", 1.5),
        ("min_new_tokens", 1),
        ("min_length", 9),
        ("sequence_bias", [[[5], 1.0]]),
        ("diversity_penalty", 0.5),
    ],
)
def test_a_setting_that_is_not_taken_over_is_told(
    tmp_path: Path, key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "generation_config.json", **{key: value})
    sampling_defaults(resolve_target(tmp_path))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dflash_export", "WARNING")
    assert f"sets {key} to {value!r}" in record.getMessage()


@pytest.mark.parametrize("key", ["typical_p", "epsilon_cutoff", "eta_cutoff"])
@pytest.mark.parametrize("sampled", [True, False])
def test_ways_of_sampling_are_told_where_they_count(
    tmp_path: Path, key: str, sampled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    save_target(tmp_path)
    edit_json(tmp_path / "generation_config.json", **{key: 0.3, "do_sample": sampled})
    sampling_defaults(resolve_target(tmp_path))
    assert [key in record.getMessage() for record in caplog.records] == [True] * sampled


def test_neutral_settings_are_not_worth_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What transformers writes by itself among them."""
    save_target(tmp_path)
    neutral = {
        "num_beams": 1,
        "typical_p": 1.0,
        "min_length": 0,
        "bad_words_ids": None,
        "suppress_tokens": [],
    }
    edit_json(tmp_path / "generation_config.json", do_sample=True, epsilon_cutoff=0.0, **neutral)
    sampling_defaults(resolve_target(tmp_path))
    assert caplog.records == []
