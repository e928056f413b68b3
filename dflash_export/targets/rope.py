"""Which RoPE variants can be exported: those whose frequencies are fixed once the config is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dflash_export.errors import CheckpointError
from dflash_export.sources.config_reader import wrong_value
from dflash_rt.errors import Problem

__all__ = ["normalised_rope", "rope_problems"]

_COMMON = frozenset({"partial_rotary_factor", "rope_theta", "rope_type", "type"})
_LLAMA3 = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")
_YARN = ("attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim")
# Keys that transformers reads for each type (modeling_rope_utils.py); any other key would be lost.
_KEYS: dict[str, frozenset[str]] = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "llama3": _COMMON | frozenset(_LLAMA3),
    "proportional": _COMMON | {"factor"},
    "yarn": _COMMON | frozenset(_YARN) | {"original_max_position_embeddings", "truncate"},
}
_REQUIRED: dict[str, tuple[str, ...]] = {"linear": ("factor",), "llama3": _LLAMA3, "yarn": ("factor",)}
_RUNNING_LENGTH = ("dynamic", "longrope")  # a tuple: what is looked up may be of any type


def rope_problems(rope: Mapping[str, Any] | None, owner: str) -> Iterator[Problem]:
    """Why RoPE with these parameters, in transformers 5's form, can't be exported."""
    if not rope:
        yield Problem(
            f"the {owner} has no RoPE parameters",
            "no rope_parameters and no rope_theta",
            "rope_parameters with rope_type and rope_theta",
            "add them to config.json",
        )
        return
    if any(isinstance(value, Mapping) for value in rope.values()):
        yield Problem(
            f"the {owner} has other RoPE parameters for each kind of layer",
            ", ".join(sorted(rope)),
            "one set for all layers",
            "this architecture isn't supported yet",
        )
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if isinstance(kind, str) and kind in _KEYS:
        yield from _value_problems(rope, kind, owner)
    elif kind in _RUNNING_LENGTH:
        yield Problem(
            f"the {owner}'s RoPE can't be exported",
            f"{kind!r}: frequencies that change with the running length, under rows already cached",
            f"one of {', '.join(_KEYS)}",
            "use a model with a fixed RoPE, or set rope_type to one of the listed if that is what you run",
        )
    else:
        yield Problem(
            f"the {owner}'s RoPE type is not known",
            repr(kind),
            f"one of {', '.join(_KEYS)}",
            "check config.json, or wait for support of this type",
        )


def normalised_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """What transformers 5 makes of either generation of the file (``RotaryEmbeddingConfigMixin``).

    Raises CheckpointError for what isn't one object, or two that differ; for the rest see
    :func:`rope_problems`.
    """
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            raise wrong_value(name, value, "an object or null")
    rope = dict(scaling or parameters or {})
    theta = raw.get("rope_theta")
    contradiction = scaling and parameters and dict(scaling) != dict(parameters)
    if contradiction or (theta is not None and rope.get("rope_theta", theta) != theta):
        raise CheckpointError(
            "the drafter's RoPE is given twice, with different values",
            found=f"rope_theta {theta!r}, rope_scaling {scaling!r}, rope_parameters {parameters!r}",
            expected="one of the two forms, or the same values in both",
            remedy="keep in config.json what the drafter was trained with",
        )
    old_type = rope.pop("type", "default")
    rope.setdefault("rope_type", old_type)
    if theta is not None:
        rope["rope_theta"] = theta
    if raw.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
        if "original_max_position_embeddings" in raw:
            rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return rope


def _value_problems(rope: Mapping[str, Any], kind: str, owner: str) -> Iterator[Problem]:
    if unknown := sorted(set(rope) - _KEYS[kind]):
        yield Problem(
            f"the {owner}'s RoPE has parameters that type {kind!r} doesn't use",
            ", ".join(unknown),
            ", ".join(sorted(_KEYS[kind])),
            "remove them from config.json if they have no meaning",
        )
    needed = ("rope_theta", *_REQUIRED.get(kind, ()))
    wrong = [f"{key} = {rope.get(key)!r}" for key in needed if not _is_positive(rope.get(key))]
    if wrong:
        yield Problem(
            f"the {owner}'s RoPE parameters are incomplete or wrong",
            ", ".join(wrong),
            f"positive numbers for {', '.join(needed)}",
            "take them from the model's own config.json",
        )
    partial = rope.get("partial_rotary_factor", 1.0)
    if kind != "proportional" and partial not in (None, 1, 1.0):
        yield Problem(
            f"the {owner} rotates only a part of each head",
            f"partial_rotary_factor = {partial!r}",
            "1.0",
            "this architecture isn't supported yet",
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
