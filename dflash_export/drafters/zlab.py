"""A drafter's configuration in z-lab's format, both generations of it.

Old files have ``block_size``, ``rope_theta`` and ``rope_scaling`` at the top level; new ones nest
``block_size`` in ``dflash_config`` and have ``rope_parameters``. What a value means follows the reference,
``dflash/model.py`` of the PyPI package ``dflash`` 0.1.0, and the ``Qwen3Config`` that it builds from the same
file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from dflash_export.drafters.config import REMEDY, DrafterConfig, DrafterKind
from dflash_export.errors import CheckpointError, ExportError, UnsupportedModelError
from dflash_export.sources.config_reader import ConfigReader, Findings
from dflash_export.targets.rope import normalised_rope, rope_problems

__all__ = ["DFLASH2_KEYS", "DFlash", "build_target_layer_ids", "parse_layers", "refuse_variants"]

_LAYER_TYPES = ("full_attention", "sliding_attention")
_DFLASH_KEYS = frozenset(
    {
        "block_size",
        "causal",
        "final_logit_softcapping",
        "input_embedding_scale",
        "is_causal",
        "mask_token_id",
        "output_multiplier",
        "target_layer_ids",
    }
)
DFLASH2_KEYS = frozenset({"conv_group_size", "conv_kernel_size", "selector_rank", "selector_top_k"})
# Keys of formats whose graphs differ from z-lab's. Each would be passed over, and drafts would be wrong.
_FOREIGN_KEYS = frozenset(
    {
        "aux_hidden_state_layer_ids",
        "eagle_aux_hidden_state_layer_ids",
        "sample_from_anchor",
        "sliding_window_non_causal",
    }
)


def build_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Taps of a drafter that doesn't list them: spread from layer 1 to the third layer from the end.

    The rule of the reference's function of the same name, Python's rounding of halves to even included.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + index * span / (num_draft_layers - 1)) for index in range(num_draft_layers))


@dataclass(frozen=True)
class DFlash(DrafterKind):
    """The first generation: block diffusion alone."""

    name = "dflash-v1"
    told_by = "architectures ['DFlashDraftModel']"
    reference_class = "DFlashDraftModel"

    @classmethod
    def matches(cls, raw: Mapping[str, Any]) -> bool:
        return raw.get("architectures") == ["DFlashDraftModel"]

    @classmethod
    def parse(cls, raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
        if found := DFLASH2_KEYS & _all_keys(raw):
            raise UnsupportedModelError(
                "this drafter is half a DFlash 2 drafter",
                found=f"architecture DFlashDraftModel with {', '.join(sorted(found))}",
                expected="architecture DFlash2DraftModel, or none of these keys",
                remedy="use the config.json that was published with the drafter",
            )
        refuse_variants(raw)
        return parse_layers(raw, findings, lambda _: cls())


def _all_keys(raw: Mapping[str, Any]) -> set[str]:
    dflash = raw.get("dflash_config")
    return set(raw) | (set(dflash) if isinstance(dflash, Mapping) else set())


def refuse_variants(raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a file that isn't quite z-lab's format."""
    vocab = raw.get("draft_vocab_size")
    foreign = sorted(_all_keys(raw) & _FOREIGN_KEYS)
    if vocab is not None and vocab != raw.get("vocab_size"):
        foreign.append(f"draft_vocab_size {vocab!r}")
    if raw.get("quantization_config") is not None:
        foreign.append("quantization_config")
    if foreign or raw.get("model_type", "qwen3") != "qwen3":
        raise UnsupportedModelError(
            "this drafter differs from z-lab's format",
            found=", ".join([*foreign, f"model_type {raw.get('model_type', 'qwen3')!r}"]),
            expected="model_type 'qwen3', the target's whole vocabulary, weights that aren't quantised",
            remedy=REMEDY,
        )


def parse_layers(
    raw: Mapping[str, Any],
    findings: Findings,
    kind: Callable[[ConfigReader], DrafterKind],
    more_keys: Set[str] = frozenset(),
) -> DrafterConfig:
    """Read what all kinds have, in z-lab's format, and add to ``findings`` what is wrong with it.

    ``kind(read)`` reads the rest, which may stand in ``dflash_config`` under the names ``more_keys``.
    """
    read = ConfigReader(raw, _DFLASH_KEYS | more_keys, findings)
    layers, heads = read.count("num_hidden_layers"), read.count("num_attention_heads")
    target_layers = read.count("num_target_layers")
    if (
        findings.wrong & {"num_hidden_layers", "num_target_layers"}
        and read.raw("target_layer_ids", None) is None
    ):
        findings.wrong.add("target_layer_ids")  # the default would follow from stand-ins
    softcap = read.optional_number("final_logit_softcapping")
    is_causal = raw.get("is_causal")
    # Values that are absent are Qwen3Config's own defaults: the reference builds its modules from that class.
    config = DrafterConfig(
        hidden_size=read.count("hidden_size"),
        intermediate_size=read.count("intermediate_size"),
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=(
            heads if read.raw("num_key_value_heads", 0) is None else read.count("num_key_value_heads", 32)
        ),
        head_dim=read.count("head_dim", 128),
        vocab_size=read.count("vocab_size"),
        num_target_layers=target_layers,
        max_position_embeddings=read.count("max_position_embeddings", 32768),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        hidden_act=read.text("hidden_act", "silu"),
        attention_bias=read.flag("attention_bias"),
        block_size=read.count("block_size"),
        mask_token_id=read.index("mask_token_id"),
        feature_layers=read.indices("target_layer_ids", build_target_layer_ids(target_layers, layers)),
        layer_types=_layer_types(read, layers),
        sliding_window=_sliding_window(read),
        # The reference reads this one at the top level only; _check_causality compares the other spellings.
        is_causal=is_causal if type(is_causal) is bool else None,
        rope_parameters=_rope(raw, read.count("max_position_embeddings", 32768), findings),
        input_embedding_scale=read.number("input_embedding_scale", 1.0),
        output_multiplier=read.number("output_multiplier", 1.0),
        # The reference applies the cap only where it is above zero.
        final_logit_softcapping=softcap if softcap is not None and softcap > 0 else None,
        kind=kind(read),
    )
    _check_causality(read, config)
    return config


def _sliding_window(read: ConfigReader) -> int | None:
    if not read.flag("use_sliding_window") or read.raw("sliding_window", 4096) is None:
        return None
    return read.count("sliding_window", 4096)


def _layer_types(read: ConfigReader, layers: int) -> tuple[str, ...]:
    kinds = read.raw("layer_types", None)
    if kinds is None:
        first = layers if _sliding_window(read) is None else read.index("max_window_layers", 28)
        return tuple(_LAYER_TYPES[layer >= first] for layer in range(layers))
    if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
        error = UnsupportedModelError(
            "the drafter has layers of a kind that isn't supported",
            found=repr(kinds),
            expected=f"a list of {' and '.join(_LAYER_TYPES)}",
            remedy="use a drafter that has only these",
        )
        read.findings.add(error, "layer_types")
        return (_LAYER_TYPES[0],) * layers
    return tuple(kinds)


def _rope(raw: Mapping[str, Any], positions: int, findings: Findings) -> dict[str, Any]:
    try:
        rope = normalised_rope(raw, positions)
        errors: list[ExportError] = [
            UnsupportedModelError(
                problem.what, found=problem.found, expected=problem.expected, remedy=problem.remedy
            )
            for problem in rope_problems(rope, "drafter")
        ]
    except CheckpointError as contradiction:
        errors = [contradiction]
    for error in errors:
        findings.add(error, "rope_parameters")
    return {"rope_type": "default", "rope_theta": 10000.0} if errors else rope


def _check_causality(read: ConfigReader, config: DrafterConfig) -> None:
    """Other readers know ``dflash_config.is_causal`` and ``causal``; the reference doesn't. They have to
    agree.
    """
    for name in ("is_causal", "causal"):
        value = read.optional_flag(name)
        unknown = read.findings.wrong & {"is_causal", "causal", "layer_types", "num_hidden_layers"}
        if value is not None and not unknown and set(config.layer_is_causal) != {value}:
            error = CheckpointError(
                f"{name} contradicts what the reference implementation does with this file",
                found=f"{name} {value}, and per layer {config.layer_is_causal} in the reference",
                expected="the same for all layers: the reference reads only a top-level is_causal",
                remedy="set is_causal at the top level of config.json to what the drafter was trained with",
            )
            read.findings.add(error, name)
