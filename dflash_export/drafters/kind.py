"""Which kind of drafter a config.json belongs to; everything that is none of them is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dflash_export.errors import UnsupportedModelError

__all__ = ["DFLASH2_KEYS", "DrafterKind", "drafter_kind"]

DrafterKind = Literal["dflash-v1", "dflash-v2", "speculators"]

_ARCHITECTURES: dict[str, DrafterKind] = {"DFlashDraftModel": "dflash-v1", "DFlash2DraftModel": "dflash-v2"}
DFLASH2_KEYS = frozenset({"conv_group_size", "conv_kernel_size", "selector_rank", "selector_top_k"})
_SPECULATORS_KEYS = frozenset({"speculators_config", "speculators_model_type", "transformer_layer_config"})
# Keys of formats whose graphs differ from z-lab's. Each would be passed over, and drafts would be wrong.
_FOREIGN_KEYS = frozenset(
    {
        "aux_hidden_state_layer_ids",
        "eagle_aux_hidden_state_layer_ids",
        "sample_from_anchor",
        "sliding_window_non_causal",
    }
)
_REMEDY = "use a DFlash or DFlash 2 drafter in z-lab's format, or a DFlash drafter in the speculators format"


def drafter_kind(raw: Mapping[str, Any]) -> DrafterKind:
    """The kind of drafter that a config.json describes.

    Raises:
        UnsupportedModelError: none that can be exported.
    """
    if set(raw) & _SPECULATORS_KEYS:
        return _speculators_kind(raw)
    dflash = raw.get("dflash_config")
    keys = set(raw) | (set(dflash) if isinstance(dflash, Mapping) else set())
    architectures = raw.get("architectures") or []
    kinds = [kind for name, kind in _ARCHITECTURES.items() if architectures == [name]]
    if not kinds:
        raise UnsupportedModelError(
            "this is not a DFlash drafter",
            found=f"architectures {architectures}, model_type {raw.get('model_type')!r}",
            expected=" or ".join(f"architectures ['{name}']" for name in _ARCHITECTURES),
            remedy="check that target and drafter weren't swapped, or " + _REMEDY,
        )
    kind = kinds[0]
    if kind == "dflash-v1" and keys & DFLASH2_KEYS:
        raise UnsupportedModelError(
            "this drafter is half a DFlash 2 drafter",
            found=f"architecture DFlashDraftModel with {', '.join(sorted(keys & DFLASH2_KEYS))}",
            expected="architecture DFlash2DraftModel, or none of these keys",
            remedy="use the config.json that was published with the drafter",
        )
    _refuse_variants(raw, keys)
    return kind


def _speculators_kind(raw: Mapping[str, Any]) -> DrafterKind:
    found = raw.get("speculators_model_type")
    if found != "dflash":
        raise UnsupportedModelError(
            "this drafter of the speculators format isn't a DFlash drafter",
            found=f"speculators_model_type {found!r}",
            expected="speculators_model_type 'dflash'",
            remedy=_REMEDY,
        )
    return "speculators"


def _refuse_variants(raw: Mapping[str, Any], keys: set[str]) -> None:
    vocab = raw.get("draft_vocab_size")
    foreign = sorted(keys & _FOREIGN_KEYS)
    if vocab is not None and vocab != raw.get("vocab_size"):
        foreign.append(f"draft_vocab_size {vocab!r}")
    if raw.get("quantization_config") is not None:
        foreign.append("quantization_config")
    if foreign or raw.get("model_type", "qwen3") != "qwen3":
        raise UnsupportedModelError(
            "this drafter differs from z-lab's format",
            found=", ".join([*foreign, f"model_type {raw.get('model_type', 'qwen3')!r}"]),
            expected="model_type 'qwen3', the target's whole vocabulary, weights that aren't quantised",
            remedy=_REMEDY,
        )
