"""Random drafters in the speculators format, and their decoding written out in PyTorch.

The loop has no caches and shares nothing with the exporter: each step runs the whole sequence again. The
draft's visibility is that of ``create_anchor_block_mask_mod`` in speculators (commit c05b95b).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dflash_export.drafters.read import parse_drafter_config
from tests.pairs import Run, TargetSpec

Tensors = dict[str, torch.Tensor]
_HEAD_DIM, _HEADS, _KV_HEADS, _EPS = 8, 4, 2, 1e-6


def speculators_config(
    target: TargetSpec,
    *,
    layer_types: list[str],
    block_size: int,
    own_vocab: int | None = None,
    window: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The object of a config.json as speculators writes it. Taps: the outputs of the first two layers."""
    layers: dict[str, Any] = {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": target.hidden,
        "intermediate_size": 40,
        "layer_types": layer_types,
        "max_position_embeddings": target.positions,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": len(layer_types),
        "num_key_value_heads": _KV_HEADS,
        "rms_norm_eps": _EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "vocab_size": target.vocab,
    }
    raw: dict[str, Any] = {
        "architectures": ["DFlashSpeculator"],
        "model_type": "speculator_model",
        "speculators_model_type": "dflash",
        "speculators_version": "0.5.0",
        "aux_hidden_state_layer_ids": [2, 1],
        "block_size": block_size,
        "draft_vocab_size": target.vocab if own_vocab is None else own_vocab,
        "mask_token_id": target.vocab - 1,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "target_hidden_size": None,
        "transformer_layer_config": layers,
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": block_size - 1}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": "someone/model", "architectures": ["Qwen3ForCausalLM"]},
        },
    }
    return raw | changes


def make_speculators(folder: Path, raw: dict[str, Any], *, seed: int, spread: float) -> Path:
    """Write config.json and random weights. Reduced vocabularies keep an arbitrary choice of tokens."""
    config = parse_drafter_config(raw)
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in sorted(config.tensor_shapes().items()):
        values = generator.standard_normal(shape)
        is_norm = len(shape) == 1 and "norm" in name
        tensors[name] = torch.from_numpy(1 + 0.2 * values if is_norm else spread * values).float()
    if "d2t" in tensors:
        own, vocab = raw["draft_vocab_size"], config.vocab_size
        kept = torch.from_numpy(np.sort(generator.permutation(vocab)[:own]))
        tensors["d2t"] = kept - torch.arange(own)
        tensors["t2d"] = torch.isin(torch.arange(vocab), kept)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


@dataclass
class SpeculatorsLoop:
    """Greedy decoding with a drafter's files. ``least_margin``: how near the best two logits ever were."""

    target: Any
    folder: Path
    least_margin: float = float("inf")
    weights: Tensors = field(init=False)
    raw: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = load_file(self.folder / "model.safetensors")
        self.raw = json.loads((self.folder / "config.json").read_text())

    @torch.inference_mode()
    def run(self, prompt: list[int], new_tokens: int, drafts: int) -> Run:
        """``drafts`` is how many tokens a step proposes; no block is clipped at the end."""
        choices, features = self._choices(prompt)
        tokens, accepted = [*prompt, choices[-1]], []
        while len(tokens) < len(prompt) + new_tokens:
            anchor = len(tokens) - 1
            drafted = self._draft(features[:anchor], tokens[anchor], drafts)
            verified, features = self._choices([*tokens, *drafted])
            choices = verified[anchor:]
            agreed = 0
            while agreed < drafts and drafted[agreed] == choices[agreed]:
                agreed += 1
            accepted.append(agreed)
            tokens += choices[: agreed + 1]
        return Run(tokens[len(prompt) : len(prompt) + new_tokens], accepted)

    def _choices(self, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
        """The target's token after each row, and the rows' tapped features ``[rows, taps * hidden]``."""
        output = self.target(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        taps = [output.hidden_states[layer][0] for layer in self.raw["aux_hidden_state_layer_ids"]]
        return self._best(output.logits[0]), torch.cat(taps, dim=-1)

    def _best(self, logits: torch.Tensor) -> list[int]:
        best = logits.topk(2).values
        self.least_margin = min(self.least_margin, float((best[..., 0] - best[..., 1]).min()))
        return logits.argmax(-1).tolist()

    def _draft(self, features: torch.Tensor, anchor: int, drafts: int) -> list[int]:
        weights, layers = self.weights, self.raw["transformer_layer_config"]
        from_anchor = self.raw["sample_from_anchor"]
        rows = drafts if from_anchor else drafts + 1
        context = _norm(features @ weights["fc.weight"].T, weights["hidden_norm.weight"])
        block = [anchor] + [self.raw["mask_token_id"]] * (rows - 1)
        hidden = weights["embed_tokens.weight"][block]
        for index, kind in enumerate(layers["layer_types"]):
            own = {
                name.removeprefix(f"layers.{index}."): value
                for name, value in weights.items()
                if name.startswith(f"layers.{index}.")
            }
            normed = _norm(hidden, own["input_layernorm.weight"])
            mask = self._visible(len(context), rows, kind == "sliding_attention")
            hidden = hidden + _attend(own, context, normed, mask, layers["rope_parameters"]["rope_theta"])
            normed = _norm(hidden, own["post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(normed @ own["mlp.gate_proj.weight"].T)
            up = normed @ own["mlp.up_proj.weight"].T
            hidden = hidden + (gate * up) @ own["mlp.down_proj.weight"].T
        logits = _norm(hidden, weights["norm.weight"]) @ weights["lm_head.weight"].T
        ids = self._best(logits if from_anchor else logits[1:])
        return [token + int(weights["d2t"][token]) for token in ids] if "d2t" in weights else ids

    def _visible(self, context: int, rows: int, slides: bool) -> torch.Tensor:
        """Bool ``[rows, context + rows]``: the context before the anchor, then the block itself."""
        window = self.raw["transformer_layer_config"]["sliding_window"] if slides else None
        causal = slides and not self.raw["sliding_window_non_causal"]

        def sees(row: int, key: int) -> bool:
            if key < context:  # the anchor is at position `context`
                return window is None or key >= context - window
            return not causal or key - context <= row

        return torch.tensor([[sees(row, key) for key in range(context + rows)] for row in range(rows)])


def _norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + _EPS) * weight


def _attend(
    own: Tensors, context: torch.Tensor, block: torch.Tensor, mask: torch.Tensor, theta: float
) -> torch.Tensor:
    """Attention of the block over projected context and itself, without the residual."""
    both = torch.cat([context, block])
    heads = {
        name: (rows @ own[f"self_attn.{name}_proj.weight"].T).view(len(rows), -1, _HEAD_DIM)
        for name, rows in (("q", block), ("k", both), ("v", both))
    }
    positions = torch.arange(len(both), dtype=torch.float32)
    query = _rotate(_norm(heads["q"], own["self_attn.q_norm.weight"]), positions[len(context) :], theta)
    key = _rotate(_norm(heads["k"], own["self_attn.k_norm.weight"]), positions, theta)
    key, value = (each.repeat_interleave(_HEADS // _KV_HEADS, dim=1) for each in (key, heads["v"]))
    scores = torch.einsum("qhd,khd->hqk", query, key) / _HEAD_DIM**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1) @ own["self_attn.o_proj.weight"].T


def _rotate(states: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    frequencies = theta ** (-torch.arange(0, _HEAD_DIM, 2, dtype=torch.float32) / _HEAD_DIM)
    angles = torch.outer(positions, frequencies)[:, None]
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
