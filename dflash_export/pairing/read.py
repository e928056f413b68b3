"""What is known of a pair, and of a build's options, before any weights are opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import read_drafter_config
from dflash_export.errors import ExportError, RecipeError, pair_error
from dflash_export.options import BuildOptions
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.resolve import Source, resolve_drafter, resolve_target
from dflash_export.targets.config import TargetFacts, load_target_config, stop_token_ids, target_facts
from dflash_rt.bundle.manifest import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Pair", "read_pair"]

# Rows of one prefill pass. A mixture of experts gathers the weights of every (row, expert) pair.
_PREFILL_CHUNK, _PREFILL_CHUNK_MOE = 256, 16
# With eight answers of that length, two cores take about a minute for a target of 135M.
_MEASURED_TOKENS = 32


@dataclass(frozen=True)
class Pair:
    """Where both models are, what their configs say, and the limits of their bundle.

    ``findings`` is what is wrong with the drafter's config: reported with what is wrong with the pair.
    ``measured_tokens`` is how long an answer is, at most, that quantisation is measured over.
    """

    target: Source
    drafter: Source
    config: PreTrainedConfig
    facts: TargetFacts
    drafter_config: DrafterConfig
    findings: Findings
    limits: Limits
    stop_token_ids: tuple[int, ...]
    num_draft_tokens: int
    measured_tokens: int


def read_pair(options: BuildOptions) -> Pair:
    """Find both models and read their configs.

    Raises:
        SourceError, CheckpointError: a model can't be found, or its config read.
        UnsupportedModelError: the target would not be exported faithfully.
        PairError: neither config can be used.
        RecipeError: an option doesn't suit the models.
    """
    target = resolve_target(options.target, revision=options.target_revision)
    drafter = resolve_drafter(options.drafter, revision=options.drafter_revision)
    # What is wrong with the drafter's config is reported with what is wrong with the pair, unless one of the
    # two can't be used at all.
    drafter_config, findings = read_drafter_config(drafter)
    try:
        config = load_target_config(target)
    except ExportError as error:
        errors = [error, *findings.errors]
        raise pair_error([error.problem for error in errors], errors) from error.__cause__
    if drafter_config is None:
        raise pair_error([error.problem for error in findings.errors], findings.errors)
    facts = target_facts(config)
    limits = _limits(facts, drafter_config, config, options)
    return Pair(
        target=target,
        drafter=drafter,
        config=config,
        facts=facts,
        drafter_config=drafter_config,
        findings=findings,
        limits=limits,
        stop_token_ids=stop_token_ids(target, config),
        num_draft_tokens=_num_draft_tokens(options.num_draft_tokens, drafter_config.block_size, findings),
        measured_tokens=_measured_tokens(options.measure_tokens, limits),
    )


def _limits(
    facts: TargetFacts, drafter: DrafterConfig, config: PreTrainedConfig, options: BuildOptions
) -> Limits:
    max_seq_len, prefill_chunk = options.max_seq_len, options.prefill_chunk
    if max_seq_len is None:
        max_seq_len = min(facts.max_position_embeddings, drafter.max_position_embeddings)
    if prefill_chunk is None:
        is_moe = getattr(config, "num_experts", None) is not None
        prefill_chunk = min(_PREFILL_CHUNK_MOE if is_moe else _PREFILL_CHUNK, max_seq_len)
    elif prefill_chunk > max_seq_len:
        raise _too_large("prefill_chunk", prefill_chunk, f"at most max_seq_len, {max_seq_len}")
    return Limits(max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)


def _num_draft_tokens(wanted: int | None, block_size: int, findings: Findings) -> int:
    most = block_size - 1  # a block holds the anchor, too
    if wanted is None or "block_size" in findings.wrong:  # the export won't go on then
        return most
    if wanted > most:
        expected = f"0 (no drafting) to {most}: the drafter was trained for one less than its block_size"
        raise _too_large("num_draft_tokens", wanted, expected)
    return wanted


def _measured_tokens(wanted: int | None, limits: Limits) -> int:
    """At least one row is left for the prompt."""
    if wanted is None:
        return max(1, min(_MEASURED_TOKENS, limits.max_seq_len - 1))
    if wanted >= limits.max_seq_len:
        expected = f"less than max_seq_len, {limits.max_seq_len}: the prompt needs room, too"
        raise _too_large("measure_tokens", wanted, expected)
    return wanted


def _too_large(option: str, found: int, expected: str) -> RecipeError:
    remedy = "choose a smaller number, or leave the option out"
    return RecipeError(f"{option} is out of range", found=found, expected=expected, remedy=remedy)
