"""Telling a DFlash v1 drafter in z-lab's format from everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_rt.errors import UnsupportedModelError

__all__ = ["refuse_other_kinds"]

_ARCHITECTURE = "DFlashDraftModel"
_DFLASH2_KEYS = frozenset({"conv_group_size", "conv_kernel_size", "selector_rank", "selector_top_k"})
_SPECULATORS_KEYS = frozenset({"speculators_config", "speculators_model_type", "transformer_layer_config"})
# Keys of formats whose graphs differ from v1's. Each would be passed over, and drafts would be wrong.
_FOREIGN_KEYS = frozenset(
    {"aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids", "sliding_window_non_causal"}
)


def refuse_other_kinds(raw: Mapping[str, Any]) -> None:
    """Raise :class:`~dflash_rt.errors.UnsupportedModelError` unless the config.json is a v1 drafter's."""
    dflash = raw.get("dflash_config")
    keys = set(raw) | (set(dflash) if isinstance(dflash, Mapping) else set())
    architectures = raw.get("architectures") or []
    todo = "use a DFlash v1 drafter in z-lab's format"
    if architectures == ["DFlash2DraftModel"] or keys & _DFLASH2_KEYS:
        raise UnsupportedModelError(
            "this is a DFlash 2 drafter, which isn't supported yet",
            found=", ".join(sorted(keys & _DFLASH2_KEYS)) or f"architectures {architectures}",
            expected=f"architecture {_ARCHITECTURE}: DFlash 2 adds convolutions and a candidate selector",
            todo=todo,
        )
    if keys & _SPECULATORS_KEYS:
        raise UnsupportedModelError(
            "this drafter is in the speculators format, which isn't supported yet",
            found=f"speculators_model_type {raw.get('speculators_model_type')!r}",
            expected="z-lab's format: speculators adds a vocabulary of its own and numbers its taps from 1",
            todo=todo,
        )
    if architectures != [_ARCHITECTURE]:
        raise UnsupportedModelError(
            "this is not a DFlash drafter",
            found=f"architectures {architectures}, model_type {raw.get('model_type')!r}",
            expected=f"architectures ['{_ARCHITECTURE}']",
            todo="check that target and drafter weren't swapped, or " + todo,
        )
    vocab = raw.get("draft_vocab_size")
    foreign = sorted(keys & _FOREIGN_KEYS)
    if vocab is not None and vocab != raw.get("vocab_size"):
        foreign.append(f"draft_vocab_size {vocab!r}")
    if raw.get("quantization_config") is not None:
        foreign.append("quantization_config")
    if foreign or raw.get("model_type", "qwen3") != "qwen3":
        raise UnsupportedModelError(
            "this drafter differs from z-lab's DFlash v1",
            found=", ".join([*foreign, f"model_type {raw.get('model_type', 'qwen3')!r}"]),
            expected="model_type 'qwen3', the target's whole vocabulary, weights that aren't quantised",
            todo=todo,
        )
