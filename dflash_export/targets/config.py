"""The target's configuration: loaded through transformers, then checked before any long work.

A config is refused when the transformers module, traced as it is, would not be what the graphs compute:
cached rows must never change, attention must be causal with a fixed window per layer, and weights must be
plain floats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dflash_export.errors import CheckpointError, UnsupportedModelError, numbered
from dflash_export.sources.files import is_file, read_json
from dflash_export.sources.gguf import check_gguf_file
from dflash_export.sources.resolve import Source
from dflash_export.targets.checks import (
    SUPPORTED_FAMILIES,
    check_target,
    head_dim,
    raw_problems,
    sliding_windows,
)
from dflash_rt.bundle.manifest import SamplingDefaults
from dflash_rt.errors import Problem, SamplingError
from dflash_rt.sampling.params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "SUPPORTED_FAMILIES",
    "TargetFacts",
    "load_target_config",
    "require_target",
    "sampling_defaults",
    "stop_token_ids",
    "target_facts",
]

_LOG = logging.getLogger("dflash_export")

# Settings of transformers' generate() that would choose other tokens and that the runtime doesn't have, each
# with the values that change nothing; None never does. The second lot counts only where tokens are sampled.
_NOT_TAKEN: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
}
_NOT_TAKEN_SAMPLED: Mapping[str, tuple[object, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}


@dataclass(frozen=True)
class TargetFacts:
    """What the manifest and the pair check need to know about a target.

    ``sliding_windows`` has one entry per layer: a row at position p sees keys ``(p - window, p]``, or all of
    ``[0, p]`` where it is ``None``.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]


def load_target_config(source: Source) -> PreTrainedConfig:
    """Load and check a target's configuration. Takes seconds for GGUF, whose header is slow to parse.

    Raises :class:`~dflash_export.errors.CheckpointError` when it can't be read and
    ``UnsupportedModelError``, with every reason, when it can't be exported faithfully.
    """
    if source.kind == "gguf":
        check_gguf_file(source.path)
        config = _build_config(source, gguf_file=source.path.name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # tensors are dequantised as they are read
    else:
        raw = read_json(source.path / "config.json")
        # Before transformers reads it: for a family that it doesn't know it would talk of remote code.
        _raise_all(list(raw_problems(raw)))
        config = _build_config(source)
    require_target(config)
    return config


def require_target(config: PreTrainedConfig) -> None:
    """Raise ``UnsupportedModelError`` with everything that :func:`check_target` finds."""
    _raise_all(check_target(config))


def target_facts(config: PreTrainedConfig) -> TargetFacts:
    """Read the facts off a config that :func:`check_target` accepts."""
    return TargetFacts(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        sliding_windows=sliding_windows(config),
    )


def stop_token_ids(source: Source, config: PreTrainedConfig) -> tuple[int, ...]:
    """Ids that end a generation: those of generation_config.json, else ``eos_token_id`` of the config.

    Raises :class:`~dflash_export.errors.CheckpointError` when an id isn't an integer inside the vocabulary.
    """
    eos = _generation_config(source).get("eos_token_id")
    where = "generation_config.json"
    if eos is None:
        eos, where = getattr(config, "eos_token_id", None), "config.json"
    ids = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"eos_token_id in {where} is wrong",
                found=repr(eos),
                expected=f"token ids in [0, {config.vocab_size})",
                remedy=f"correct {where}",
            )
    return tuple(dict.fromkeys(ids))


def sampling_defaults(source: Source) -> SamplingDefaults:
    """How generation_config.json wants tokens to be chosen; greedily if there is none.

    As in transformers, temperature and truncation count only with ``do_sample``, and the repetition penalty
    always. A key that is missing or null changes nothing: ``top_k`` too, where transformers 4 put 50. Other
    ways of choosing (``num_beams``, ``suppress_tokens``, ``typical_p`` and so on) are not taken over: the log
    gets a warning for each that the file sets.

    Raises :class:`~dflash_export.errors.CheckpointError` when a value is out of range.
    """
    generation = _generation_config(source)
    _warn_of_the_rest(generation)
    sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    names = ["repetition_penalty", *(sampled if generation.get("do_sample") is True else ())]
    found = {name: generation[name] for name in names if generation.get(name) is not None}
    values = {**dict.fromkeys(names[:1], 1.0), **{name: sampled[name] for name in names[1:]}, **found}
    try:
        params = SamplingParams(**values)
    except SamplingError as error:
        raise CheckpointError(
            f"generation_config.json: {error.problem.what}",
            found=error.problem.found,
            expected=error.problem.expected,
            remedy="correct generation_config.json, or remove it for greedy decoding",
        ) from error
    return SamplingDefaults(
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=params.top_k,
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
    )


def _warn_of_the_rest(generation: Mapping[str, Any]) -> None:
    keys = {**_NOT_TAKEN, **(_NOT_TAKEN_SAMPLED if generation.get("do_sample") is True else {})}
    for key, neutral in keys.items():
        value = generation.get(key)
        if value is not None and value not in neutral:
            _LOG.warning(
                "generation_config.json sets %s to %.100r, which the bundle doesn't take over: "
                "transformers' generate() may choose other tokens because of it",
                key,
                value,
            )


def _generation_config(source: Source) -> dict[str, Any]:
    """generation_config.json, or an empty object."""
    path = source.folder / "generation_config.json"
    # A .gguf file may lie in any folder, so files beside it say nothing about it.
    return read_json(path) if source.kind != "gguf" and is_file(path) else {}


def _build_config(source: Source, **extra: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True, **extra
        )
    # transformers raises plain ValueError, KeyError and OSError, and the validators of its config classes add
    # types of their own. Nothing else runs in this block, so each of them means that the config is no good.
    except Exception as error:
        raise CheckpointError(
            "transformers can't read the target's configuration",
            found=f"{source.id}: {type(error).__name__}: {error}",
            expected=f"a valid config of one of {', '.join(SUPPORTED_FAMILIES)}",
            remedy="compare it with the published one and download it again",
        ) from error
    return config


def _raise_all(problems: list[Problem]) -> None:
    if len(problems) == 1:
        raise UnsupportedModelError(**vars(problems[0]))
    if problems:
        raise UnsupportedModelError(numbered("this target can't be exported faithfully", problems))
