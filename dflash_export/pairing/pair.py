"""Whether a target and a drafter belong together: checked before anything is traced, all problems at once.

Reads configs and tensor headers, one row of the embedding, and nothing else of the weights. The exception is
a target that says its head is tied and stores one all the same: then the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

from dflash_export.drafters.config import DrafterConfig
from dflash_export.errors import pair_error
from dflash_export.pairing.tensors import EMBEDDING, target_tensor_problems, tensor_problems
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.weights import Weights
from dflash_export.targets.checks import activation_problems, check_target
from dflash_export.targets.config import TargetFacts, target_facts
from dflash_export.targets.rope import rope_problems
from dflash_rt.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["check_pair", "require_pair"]

# What the shapes of a drafter's tensors follow from.
_SHAPES_FROM = frozenset(
    {
        "attention_bias",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "target_layer_ids",
        "vocab_size",
    }
)


def require_pair(problems: Sequence[Problem], findings: Findings) -> None:
    """Raise :class:`~dflash_export.errors.PairError` with everything that :func:`check_pair` found.

    If that is a single error of the drafter's config.json, it is raised as it is.
    """
    if problems:
        raise pair_error(problems, findings.errors)


def check_pair(
    target_config: PreTrainedConfig,
    target_weights: Weights,
    drafter: DrafterConfig,
    drafter_weights: Weights,
    *,
    max_seq_len: int,
    tokenizer_size: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    findings: Findings | None = None,
) -> list[Problem]:
    """Everything that is wrong with this pair; empty when it can be exported.

    ``max_seq_len`` is the limit in tokens, prompt and output together. ``tokenizer_size`` is the tokenizer's
    highest id plus 1, ``None`` without one. ``chat_template_kwargs`` are those that the bundle will render
    its template with. ``findings`` are what is wrong with the drafter's config.json: they come first, and
    nothing is said about values that defaults replace. Raises
    :class:`~dflash_export.errors.CheckpointError` only when a file can't be read.
    """
    if problems := check_target(target_config):
        return problems  # its sizes mean nothing then
    target = target_facts(target_config)
    findings = findings or Findings()
    wrong = findings.wrong
    # The block is embedded by the drafter where it has an embedding of its own.
    own = drafter.kind.embedding
    weights, embedding = (target_weights, EMBEDDING) if own is None else (drafter_weights, own)

    def embedding_row(index: int) -> torch.Tensor | None:
        """``[1, hidden]``; None for a matrix that is missing or of a wrong shape, reported elsewhere."""
        if embedding not in weights.names():
            return None
        fits = weights.shape(embedding) == (target.vocab_size, target.hidden_size)
        return weights.rows(embedding, index, index + 1) if fits else None

    problems = [
        *(error.problem for error in findings.errors),
        *_size_problems(target, drafter, wrong),
        *([] if "target_layer_ids" in wrong else _tap_problems(target, drafter)),
        *_draft_problems(drafter, wrong),
        *_length_problems(target, drafter, max_seq_len),
        *_tokenizer_problems(target, tokenizer_size),
        *([] if "mask_token_id" in wrong else _mask_problems(target, embedding_row, drafter, tokenizer_size)),
        *_template_problems(chat_template, chat_template_kwargs or {}),
    ]
    if not wrong & (_SHAPES_FROM | drafter.kind.shape_keys):
        shapes = drafter.tensor_shapes()
        problems += tensor_problems("drafter", shapes, drafter_weights, drafter.kind.not_floats)
    problems += drafter.kind.problems(drafter, target.num_layers, drafter_weights, wrong)
    return [*problems, *target_tensor_problems(target_config, target_weights)]


def _size_problems(target: TargetFacts, drafter: DrafterConfig, wrong: Set[str]) -> Iterator[Problem]:
    for what, name, found, expected in (
        ("hidden size", "hidden_size", drafter.hidden_size, target.hidden_size),
        ("vocabulary", "vocab_size", drafter.vocab_size, target.vocab_size),
        ("number of target layers", "num_target_layers", drafter.num_target_layers, target.num_layers),
    ):
        if found is not None and found != expected and name not in wrong:
            yield Problem(
                f"the drafter was made for a target with another {what}",
                f"{name} = {found} in the drafter",
                f"{expected}, as in the target",
                "use the drafter that was trained for this target, and its matching revision",
            )


def _tap_problems(target: TargetFacts, drafter: DrafterConfig) -> Iterator[Problem]:
    taps = drafter.feature_layers
    first = drafter.kind.first_layer_id
    outside = [tap for tap in taps if not 0 <= tap < target.num_layers]
    if outside:
        yield Problem(
            "the drafter taps layers that the target doesn't have",
            f"layer ids {[tap + first for tap in outside]}",
            f"{first} to {target.num_layers - 1 + first}",
            "use the drafter of this target; ids of the speculators format are one higher than z-lab's",
        )
    if len(set(taps)) != len(taps):
        yield Problem(
            "the drafter taps a layer twice",
            f"layer ids {[tap + first for tap in taps]}",
            "each layer once",
            "use the config.json that was published with the drafter",
        )


def _draft_problems(drafter: DrafterConfig, wrong: Set[str]) -> Iterator[Problem]:
    remedy = "use the config.json that was published with the drafter"
    yield from rope_problems(drafter.rope_parameters, "drafter")
    yield from activation_problems(drafter.hidden_act, "drafter")
    if drafter.block_size < 2 and "block_size" not in wrong:
        found, expected = f"block_size {drafter.block_size}", "2 or more: the anchor and at least one draft"
        yield Problem("the drafter drafts nothing", found, expected, remedy)
    if len(drafter.layer_types) != drafter.num_layers and "num_hidden_layers" not in wrong:
        found = f"{len(drafter.layer_types)} layer_types for {drafter.num_layers} layers"
        yield Problem("the drafter's layer_types don't fit", found, "one for each layer", remedy)
    slides = "sliding_attention" in drafter.layer_types
    if drafter.sliding_window is None and slides and not wrong & {"use_sliding_window", "sliding_window"}:
        # Qwen3Config drops the window when use_sliding_window is false; the reference's loop then fails.
        found, expected = (
            "sliding_attention layers, no window",
            "use_sliding_window true, sliding_window in rows",
        )
        yield Problem("the drafter's sliding layers have no window", found, expected, remedy)
    heads_known = not wrong & {"num_attention_heads", "num_key_value_heads"}
    if heads_known and drafter.num_attention_heads % drafter.num_key_value_heads:
        found = f"{drafter.num_attention_heads} heads, {drafter.num_key_value_heads} key/value heads"
        yield Problem("the drafter's heads don't fit together", found, "a multiple", remedy)
    if drafter.head_dim % 2 and "head_dim" not in wrong:
        found = f"head_dim {drafter.head_dim}"
        yield Problem("the drafter's head size can't be rotated", found, "an even number", remedy)


def _length_problems(target: TargetFacts, drafter: DrafterConfig, max_seq_len: int) -> Iterator[Problem]:
    limits = {"target": target.max_position_embeddings, "drafter": drafter.max_position_embeddings}
    if max_seq_len < 2:
        found, expected = f"max_seq_len {max_seq_len}", "2 or more: a prompt and an output"
        yield Problem("the length limit leaves no room", found, expected, "choose a higher one")
        return
    for owner, limit in limits.items():
        if limit < max_seq_len:
            yield Problem(
                f"the length limit is beyond the {owner}'s positions",
                f"max_seq_len {max_seq_len}, max_position_embeddings {limit}",
                f"at most {limit}",
                f"choose max_seq_len {min(limits.values())} or less",
            )


def _tokenizer_problems(target: TargetFacts, tokenizer_size: int | None) -> Iterator[Problem]:
    if tokenizer_size is not None and tokenizer_size > target.vocab_size:
        yield Problem(
            "the tokenizer gives ids that the target has no embedding for",
            f"ids up to {tokenizer_size - 1}",
            f"at most {target.vocab_size - 1}",
            "use the tokenizer that belongs to the target",
        )


def _mask_problems(
    target: TargetFacts,
    embedding_row: Callable[[int], torch.Tensor | None],
    drafter: DrafterConfig,
    tokenizer_size: int | None,
) -> Iterator[Problem]:
    """The mask token needs an embedding row that means something.

    z-lab's Qwen3 and Qwen3.5 drafters use the first row after the tokenizer's own ids (151669, 248077): a row
    of the padding, and the very one that they were trained with. So a row out there is refused only if it is
    all zeros; a row that the tokenizer knows is refused also if it equals the padding, that is if it was
    never trained.
    """
    mask = drafter.mask_token_id
    remedy = "check mask_token_id against the drafter's model card and its revision"
    if mask >= target.vocab_size:
        found, expected = f"mask_token_id {mask}", f"below {target.vocab_size}"
        yield Problem("the mask token is outside the target's vocabulary", found, expected, remedy)
        return
    row = embedding_row(mask)
    if row is None:
        return
    if not bool(row.any()):
        found = f"embedding row {mask} is all zeros"
        yield Problem("the mask token has no embedding", found, "a row that was trained", remedy)
    elif tokenizer_size is not None and mask < tokenizer_size < target.vocab_size:
        padding = embedding_row(tokenizer_size)
        if padding is not None and torch.equal(row, padding):
            found = f"embedding row {mask} equals padding row {tokenizer_size}"
            yield Problem("the mask token's embedding is padding", found, "a row that was trained", remedy)


def _template_problems(template: str | None, kwargs: Mapping[str, Any]) -> Iterator[Problem]:
    if template is None:
        if kwargs:
            found, expected = f"chat_template_kwargs {dict(kwargs)}", "none without a chat template"
            yield Problem("there is no chat template to give arguments to", found, expected, "leave them out")
    elif "enable_thinking" in template and "enable_thinking" not in kwargs:
        yield Problem(
            "the chat template can think or not, and it isn't stated which the drafter was trained for",
            "enable_thinking in the template, not in chat_template_kwargs",
            "enable_thinking true or false",
            "state it: z-lab's drafters for Qwen3-4B and 8B are trained with false, "
            "those for Qwen3.5 with true; in the wrong mode less than half as many drafts are accepted",
        )
