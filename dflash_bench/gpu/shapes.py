"""The pairs that are measured: exact shapes of public ones, to be filled with random weights.

Shapes of the targets: config.json of Qwen/Qwen3-4B and Qwen/Qwen3-8B. Shapes of the drafters: config.json of
z-lab/Qwen3-4B-DFlash-b16 and z-lab/Qwen3-8B-DFlash-b16. Tokens per step: arXiv 2602.06036v2, table of Qwen3
without thinking, temperature 0, block size 16, measured on an H200 with Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["PAIRS", "PARITY", "PRECISIONS", "PUBLISHED_SOURCE", "TINY", "PairShape"]

PUBLISHED_SOURCE = "arXiv 2602.06036v2, temperature 0"


@dataclass(frozen=True)
class PairShape:
    """A Qwen3 target and a DFlash v1 drafter of full-attention layers.

    Attributes:
        hidden, inner: of the target's and the drafter's layers alike.
        layers, draft_layers: numbers of decoder layers.
        taps: 0-based target layers whose outputs the drafter gets.
        tied: whether the embedding is the head.
        positions: rows of context that both models are made for.
        published: tokens per step (the bonus included) that the paper reports, by what was measured.
        spread: standard deviation of the random weights. A wide one and few tokens make drafts come true.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    draft_layers: int
    taps: tuple[int, ...]
    vocab: int
    mask_token_id: int
    tied: bool
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    positions: int = 40960
    rope_theta: float = 1e6
    published: Mapping[str, float] | None = None
    spread: float = 0.02

    def target_config(self) -> dict[str, Any]:
        """The object of the target's config.json, without stop tokens: random text shall not end."""
        return {
            **self._layer_config(),
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": self.layers,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def drafter_config(self) -> dict[str, Any]:
        """The object of the drafter's config.json, as z-lab writes it."""
        return {
            **self._layer_config(),
            "architectures": ["DFlashDraftModel"],
            "num_hidden_layers": self.draft_layers,
            "num_target_layers": self.layers,
            "layer_types": ["full_attention"] * self.draft_layers,
            "tie_word_embeddings": False,
            "dflash_config": {
                "block_size": self.block_size,
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.taps),
            },
        }

    def _layer_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "max_position_embeddings": self.positions,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


QWEN3_8B = PairShape(
    name="qwen3-8b",
    hidden=4096,
    inner=12288,
    layers=36,
    draft_layers=5,
    taps=(1, 9, 17, 25, 33),
    vocab=151936,
    mask_token_id=151669,
    tied=False,
    published={"GSM8K": 6.54, "MATH500": 7.87, "HumanEval": 6.50, "MT-Bench": 4.24, "average": 6.49},
)
QWEN3_4B = replace(
    QWEN3_8B,
    name="qwen3-4b",
    hidden=2560,
    inner=9728,
    tied=True,
    published={"MT-Bench": 4.35, "average": 6.54},
)
PAIRS: Mapping[str, PairShape] = {shape.name: shape for shape in (QWEN3_8B, QWEN3_4B)}
"""What ``--pair`` takes. The goals are those of the first."""

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
"""What ``--precision`` takes; ``fp8`` is bf16 with an 8-bit target."""

PARITY = PairShape(
    name="parity",
    hidden=256,
    inner=512,
    layers=4,
    draft_layers=2,
    taps=(0, 2),
    vocab=8,
    mask_token_id=7,
    tied=True,
    heads=4,
    kv_heads=2,
    head_dim=64,
    block_size=8,
    positions=1024,
    rope_theta=1e4,
    spread=0.2,
)
"""Small enough for PyTorch in fp32 anywhere. Of 8 tokens some are drafted right by chance."""

TINY = replace(
    PARITY,
    name="tiny",
    hidden=64,
    inner=96,
    layers=3,
    taps=(0, 1),
    tied=False,
    head_dim=16,
    block_size=4,
    published={"nothing: an invented number": 2.0},
)
"""What a dry run takes in place of :data:`PAIRS` and :data:`PARITY`."""
