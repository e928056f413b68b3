"""Why a target can't be exported faithfully, found in its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dflash_export.targets.rope import rope_problems
from dflash_rt.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "SUPPORTED_FAMILIES",
    "activation_problems",
    "check_target",
    "head_dim",
    "raw_problems",
    "sliding_windows",
]

# model_type -> the one architecture that is traced for it.
SUPPORTED_FAMILIES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Values of these keys change the maths in other families, and the modules traced here pass over them: a
# checkpoint that sets one of them was not made for the module that would be traced. Neutral values are
# harmless.
_FOREIGN_KEYS: Mapping[str, tuple[object, ...]] = {
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_sinks": (False,),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "per_layer_config": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


def check_target(config: PreTrainedConfig) -> list[Problem]:
    """Every reason why the target of a config that transformers has read can't be exported faithfully."""
    problems = list(raw_problems(config.to_dict()))
    if config.model_type not in SUPPORTED_FAMILIES:
        return problems
    size_problems = list(_size_problems(config))
    problems += [*size_problems, *rope_problems(getattr(config, "rope_parameters", None), "target")]
    return problems if size_problems else [*problems, *_layer_problems(config)]


def head_dim(config: PreTrainedConfig) -> int:
    """Size of one head, in values."""
    stated: int | None = getattr(config, "head_dim", None)
    if stated is not None:
        return stated
    derived: int = config.hidden_size // config.num_attention_heads
    return derived


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """As the attention modules of transformers 5 derive them.

    Qwen2 and Qwen3 go by ``layer_types`` (``use_sliding_window`` false has already set ``sliding_window`` to
    ``None`` then); Mistral and Qwen3-MoE apply ``sliding_window`` to every layer; Llama has none.
    """
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type in ("qwen2", "qwen3"):
        return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)
    layers: int = config.num_hidden_layers
    return (window if config.model_type in ("mistral", "qwen3_moe") else None,) * layers


def raw_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems that the object of a config.json shows by itself, before transformers reads it."""
    model_type, architectures = str(raw.get("model_type")), raw.get("architectures") or []
    supported = ", ".join(SUPPORTED_FAMILIES)
    if model_type not in SUPPORTED_FAMILIES:
        found = f"model_type {model_type!r}, architectures {architectures}"
        if "auto_map" in raw:
            found += ", with code of its own (auto_map), which is never run"
        remedy = "use a target of those families"
        yield Problem("this target's family isn't supported", found, supported, remedy)
        return
    if architectures and architectures != [SUPPORTED_FAMILIES[model_type]]:
        yield Problem(
            "this target isn't the plain language model of its family",
            f"architectures {architectures}",
            SUPPORTED_FAMILIES[model_type],
            "use a checkpoint of the causal language model",
        )
    auto_map = raw.get("auto_map")
    if isinstance(auto_map, Mapping) and "AutoModelForCausalLM" in auto_map:
        yield Problem(
            "this target brings code of its own, which is never run",
            f"auto_map {auto_map['AutoModelForCausalLM']!r}",
            "a model that transformers implements",
            "if the code is nothing but a copy of transformers', remove auto_map from config.json",
        )
    if raw.get("quantization_config") is not None:
        settings = raw["quantization_config"]
        method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else "unknown"
        yield Problem(
            "this target is quantised",
            f"quantization_config with method {method}",
            "weights in float32, float16 or bfloat16, or a .gguf file",
            "export the checkpoint that it was made from",
        )
    if nested := sorted({"text_config", "vision_config", "audio_config"} & set(raw)):
        yield Problem(
            "this target wraps a language model in another one",
            ", ".join(nested),
            "a language model alone",
            "export the language model's own checkpoint",
        )
    for key, neutral in _FOREIGN_KEYS.items():
        if raw.get(key) is not None and raw[key] not in neutral:
            yield Problem(
                f"{key} is set, which {model_type} has no use for",
                repr(raw[key]),
                "unset",
                "the checkpoint was made for another architecture; remove the key only if it has no effect",
            )


def _size_problems(config: PreTrainedConfig) -> Iterator[Problem]:
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    wrong = [f"{name} = {value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
    if wrong:
        found = ", ".join(wrong)
        yield Problem("sizes are missing or wrong", found, "positive integers", "correct config.json")
        return
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield Problem(
            "query heads can't be shared out among the key/value heads",
            f"{heads} heads, {kv_heads} key/value heads",
            "a multiple",
            "correct config.json",
        )
    if config.model_type == "qwen3_moe":
        yield from _mixture_problems(config)
    yield from activation_problems(config.hidden_act, "target")
    size = head_dim(config)
    if type(size) is not int or size < 2 or size % 2:
        yield Problem("the head size can't be rotated", repr(size), "an even number", "correct config.json")


def activation_problems(name: object, owner: str) -> Iterator[Problem]:
    """Whether transformers has the activation function of ``hidden_act``."""
    from transformers.activations import ACT2FN

    if not (isinstance(name, str) and name in ACT2FN):
        expected = "a name that transformers has, such as silu"
        yield Problem(f"the {owner}'s hidden_act isn't known", repr(name), expected, "correct config.json")


def _mixture_problems(config: PreTrainedConfig) -> Iterator[Problem]:
    experts, chosen, inner = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    if not (1 <= chosen <= experts and inner >= 1):
        found = f"num_experts {experts}, num_experts_per_tok {chosen}, moe_intermediate_size {inner}"
        expected = "positive, and num_experts_per_tok at most num_experts"
        yield Problem("the mixture of experts doesn't fit together", found, expected, "correct config.json")


def _layer_problems(config: PreTrainedConfig) -> Iterator[Problem]:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        unknown = sorted(set(map(str, layer_types)) - _LAYER_TYPES)
        if unknown or len(layer_types) != config.num_hidden_layers:
            yield Problem(
                "layer_types can't be exported",
                f"{len(layer_types)} entries; not supported: {', '.join(unknown) or 'none'}",
                f"{config.num_hidden_layers} entries of {', '.join(sorted(_LAYER_TYPES))}",
                "use a target without other kinds of attention",
            )
            return
        if config.model_type not in ("qwen2", "qwen3") and len(set(layer_types)) > 1:
            yield Problem(
                f"{config.model_type} has one kind of attention, and layer_types asks for two",
                ", ".join(sorted(set(layer_types))),
                "the same kind for all layers",
                "the checkpoint was made for another architecture",
            )
            return
    windows = set(sliding_windows(config))
    slides = layer_types is not None and "sliding_attention" in layer_types and config.model_type != "llama"
    wrong = any(window is not None and (type(window) is not int or window < 1) for window in windows)
    if wrong or (slides and windows == {None}):
        found = f"sliding_window {config.sliding_window!r}, {'some' if slides else 'no'} sliding layers"
        expected = "a positive integer where layers slide; use_sliding_window true for qwen2 and qwen3"
        yield Problem("the sliding window is wrong", found, expected, "correct config.json")
