"""The drafter that is trained: its configuration, its first weights, and writing it in z-lab's format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dflash.model import DFlashDraftModel
from safetensors.torch import save_file

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import load_drafter_config, parse_drafter_config
from dflash_export.drafters.zlab import build_target_layer_ids
from dflash_export.errors import RecipeError, UnsupportedModelError
from dflash_export.pairing.pair import check_pair, require_pair
from dflash_export.reference import load_drafter
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.resolve import Source, open_weights, resolve_drafter
from dflash_export.targets.config import load_target_config, target_facts
from dflash_rt.errors import OutputError
from examples.train_drafter.target import Target

__all__ = ["Drafter", "check_written", "continued_drafter", "new_drafter", "write_drafter"]

_FC_NOISE = 0.25  # of the usual random start, for the taps that aren't copied through


@dataclass(frozen=True)
class Drafter:
    """A drafter in float32. ``raw`` is its config.json, ``start`` says where its first weights came from."""

    raw: Mapping[str, Any]
    model: DFlashDraftModel
    start: str

    @property
    def config(self) -> DrafterConfig:
        """The same configuration, checked."""
        return parse_drafter_config(self.raw)


def new_drafter(
    target: Target,
    *,
    layers: int,
    block_size: int,
    mask_token_id: int,
    feature_layers: Sequence[int] | None,
    seed: int,
) -> Drafter:
    """A drafter with the target's sizes, started from the target's last layers where shapes allow.

    ``feature_layers`` ``None``: as many as draft layers, spread as the reference spreads them. Raises
    RecipeError when the target has fewer layers than are wanted.
    """
    facts = target_facts(target.model.config)
    if layers > facts.num_layers:
        raise RecipeError(
            "the drafter would have more layers than the target",
            found=f"{layers} layers for a target of {facts.num_layers}",
            expected=f"1 to {facts.num_layers}; published drafters have 5 to 8",
            remedy="lower --layers",
        )
    taps = build_target_layer_ids(facts.num_layers, layers) if feature_layers is None else feature_layers
    raw = _config_json(target.model.config, layers, block_size, mask_token_id, list(taps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DFlashDraftModel(parse_drafter_config(raw).to_qwen3_config()).float()
    copied = _start_from_target(model, target.model)
    return Drafter(raw, model, f"random, with {copied} of {len(model.state_dict())} tensors from the target")


def _config_json(
    config: Any, layers: int, block_size: int, mask_token_id: int, feature_layers: list[int]
) -> dict[str, Any]:
    facts = target_facts(config)
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dflash_config": {
            "block_size": block_size,
            "mask_token_id": mask_token_id,
            "target_layer_ids": feature_layers,
        },
        "dtype": "bfloat16",
        "head_dim": facts.head_dim,
        "hidden_act": "silu",
        "hidden_size": facts.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": facts.max_position_embeddings,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": facts.num_attention_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": facts.num_key_value_heads,
        "num_target_layers": facts.num_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": facts.vocab_size,
    }


@torch.no_grad()
def _start_from_target(model: Any, target: Any) -> int:
    """Copy what fits of the target's last layers and norms; returns how many tensors were.

    The features' projection starts as the last tap passed through, with noise for the others: the last tap is
    nearest to what the copied layers are used to.
    """
    decoder = target.get_decoder()
    sources = list(decoder.layers)[-len(model.layers) :]
    pairs = [(model.norm, decoder.norm), (model.hidden_norm, sources[0].input_layernorm)]
    copied = 0
    for own, other in [*pairs, *zip(model.layers, sources, strict=True)]:
        given = other.state_dict()
        for name, parameter in own.named_parameters():
            if name in given and given[name].shape == parameter.shape:
                parameter.copy_(given[name])
                copied += 1
    weight = model.fc.weight
    weight.mul_(_FC_NOISE)
    weight[:, -weight.shape[0] :] += torch.eye(weight.shape[0])
    return copied


def continued_drafter(folder: str, *, block_size: int | None) -> Drafter:
    """A drafter that exists, to train on. ``block_size`` ``None``: its own.

    Raises UnsupportedModelError for one with causal or sliding layers: the training mask has neither.
    """
    source = resolve_drafter(folder)
    config = load_drafter_config(source)
    if any(config.layer_is_causal) or any(window is not None for window in config.layer_windows):
        raise UnsupportedModelError(
            "this drafter can't be trained here",
            found=f"layers {', '.join(config.layer_types)}",
            expected="full attention that isn't causal, in every layer",
            remedy="start a new drafter, without --init-from",
        )
    raw = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    if block_size is not None:
        raw["dflash_config"] = {**raw["dflash_config"], "block_size": block_size}
        raw.pop("block_size", None)
    model = DFlashDraftModel(parse_drafter_config(raw).to_qwen3_config()).float()
    model.load_state_dict(load_drafter(source).state_dict())
    return Drafter(raw, model, f"the weights of {source.id}")


def write_drafter(folder: Path, drafter: Drafter) -> None:
    """Write config.json and model.safetensors in bfloat16, z-lab's format. Raises OutputError."""
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in drafter.model.state_dict().items()
    }
    partial = folder / "model.safetensors.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(drafter.raw, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, folder / "model.safetensors")
    except OSError as error:
        raise OutputError(
            f"can't write the drafter to {folder}",
            found=error,
            expected="a writable folder",
            remedy="free disk space or choose another output",
        ) from error


def check_written(folder: Path, target: Source, *, max_seq_len: int) -> None:
    """Read a written drafter as the exporter does. Raises PairError with everything that doesn't fit."""
    source = resolve_drafter(folder)
    config = load_target_config(target)
    with open_weights(target, config) as target_weights, open_weights(source) as weights:
        drafter = load_drafter_config(source)
        problems = check_pair(config, target_weights, drafter, weights, max_seq_len=max_seq_len)
        require_pair(problems, Findings())
