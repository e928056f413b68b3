"""A request, and the checks that refuse a wrong one before any work is done."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from dflash_rt.arrays import IntArray
from dflash_rt.errors import ContextLengthError, PromptError, RequestError, SamplingError
from dflash_rt.sampling.params import SamplingParams

if TYPE_CHECKING:
    from dflash_rt.bundle.manifest import Manifest
    from dflash_rt.text.prompts import TokenIds

__all__ = ["ModelLimits", "NumDraftTokens", "Request", "check_count", "check_ids"]

NumDraftTokens: TypeAlias = int | Literal["auto"] | None
"""Tokens that a step drafts: a number for all steps; ``"auto"``: each step's own, up to the drafter's block
size less one; ``None``: each step's own, up to the bundle's ``num_draft_tokens``."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Sizes, limits and defaults of a model.

    Attributes:
        vocab_size: token ids are below this.
        max_seq_len: prompt and output tokens together, at most.
        prefill_chunk: rows of one prefill pass, at most.
        block_size: rows of a draft block at most, the anchor included.
        num_draft_tokens: tokens that a step drafts, at most; 0 is no drafting.
        adaptive: whether each step drafts as many as promise most; otherwise all draft ``num_draft_tokens``.
        samples_drafts: the drafter samples its proposals at a temperature above 0. A seed's text then depends
            on how many are drafted, so such a request doesn't adapt that number to measured times.
        stop_token_ids: ids that end a text unless a request says otherwise.
        sampling: how tokens are chosen unless a request says otherwise.
    """

    vocab_size: int
    max_seq_len: int
    prefill_chunk: int
    block_size: int
    num_draft_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adaptive: bool = False
    samples_drafts: bool = False

    @classmethod
    def from_manifest(cls, manifest: Manifest, *, num_draft_tokens: NumDraftTokens = None) -> ModelLimits:
        """A bundle's limits; for ``num_draft_tokens`` see :data:`NumDraftTokens`.

        Raises:
            RequestError: ``num_draft_tokens`` is neither ``"auto"`` nor from 0 to the block size less one.
        """
        block_size = manifest.drafter.block_size
        most = block_size - 1
        if num_draft_tokens is None:
            drafts = manifest.generation.num_draft_tokens
        elif isinstance(num_draft_tokens, str):
            if num_draft_tokens != "auto":
                raise _wrong(
                    "num_draft_tokens", num_draft_tokens, f'"auto", or 0 to {most}', 'pass "auto" or a number'
                )
            drafts = most
        else:
            drafts = check_count("num_draft_tokens", num_draft_tokens, least=0)
        if drafts > most:
            raise RequestError(
                "num_draft_tokens is larger than the drafter allows",
                found=drafts,
                expected=f"0 to {most}, the drafter's block_size less one",
                remedy=f"pass at most {most}; 0 is no drafting",
            )
        return cls(
            vocab_size=manifest.target.vocab_size,
            max_seq_len=manifest.limits.max_seq_len,
            prefill_chunk=manifest.limits.prefill_chunk,
            block_size=block_size,
            num_draft_tokens=drafts,
            stop_token_ids=frozenset(manifest.generation.stop_token_ids),
            sampling=SamplingParams(**asdict(manifest.generation.sampling)),
            adaptive=drafts > 0 and (num_draft_tokens is None or isinstance(num_draft_tokens, str)),
            samples_drafts=manifest.drafter.selector_top_k is not None,
        )


@dataclass(frozen=True, eq=False)
class Request:
    """A request that can be run.

    ``prompt`` is int64 ``[rows]``; each step drafts ``num_draft_tokens``, or at most that many if
    ``adaptive``; ``sampling`` has a seed if it needs one.
    """

    prompt: IntArray
    max_new_tokens: int
    num_draft_tokens: int
    adaptive: bool
    stop_token_ids: frozenset[int]
    sampling: SamplingParams

    @classmethod
    def check(
        cls,
        limits: ModelLimits,
        prompt: TokenIds,
        *,
        max_new_tokens: int | None,
        sampling: SamplingParams | None,
        stop_token_ids: Collection[int] | None,
        speculative: bool,
    ) -> Request:
        """Check a request whose prompt was encoded already.

        Raises:
            PromptError: the prompt is empty, or has ids outside the vocabulary.
            ContextLengthError: prompt and output together are longer than the model's limit.
            SamplingError: ``sampling`` isn't a SamplingParams.
            RequestError: any other argument is wrong.
        """
        ids = check_ids("the prompt", prompt, limits.vocab_size)
        if not ids:
            raise PromptError(
                "the prompt is empty",
                found="0 tokens",
                expected="at least one token",
                remedy="pass some text, or start with the model's beginning-of-text token id",
            )
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise SamplingError(
                "sampling has a wrong type",
                found=f"{type(sampling).__name__}",
                expected="dflash_rt.SamplingParams or None",
                remedy="pass sampling=SamplingParams(temperature=0.7), say, or leave it out",
            )
        if not isinstance(speculative, bool):
            raise _wrong("speculative", speculative, "True or False", "pass False for plain decoding")
        if stop_token_ids is None:
            stop_ids = limits.stop_token_ids
        else:
            stop_ids = frozenset(
                check_ids("stop_token_ids", stop_token_ids, limits.vocab_size, error=RequestError)
            )
        params = limits.sampling if sampling is None else sampling
        draws_drafts = limits.samples_drafts and params.temperature > 0
        return cls(
            prompt=np.array(ids, dtype=np.int64),
            max_new_tokens=_room(limits, len(ids), max_new_tokens),
            num_draft_tokens=limits.num_draft_tokens if speculative else 0,
            adaptive=limits.adaptive and speculative and not draws_drafts,
            stop_token_ids=stop_ids,
            sampling=params.seeded(),
        )


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """``value`` as an int of at least ``least``. Raises RequestError for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise _wrong(name, value, f"a whole number, {least} or more", f"pass such a number as {name}")
    return int(value)


def check_ids(
    name: str, values: object, vocab_size: int, *, error: type[RequestError] = PromptError
) -> list[int]:
    """Token ids as a list of ints. Raises ``error`` for other types and for ids outside the vocabulary."""
    if isinstance(values, np.ndarray):
        items = values.tolist() if values.ndim == 1 and values.dtype.kind in "iu" else None
        found = f"an array {values.dtype} {list(values.shape)}"
    else:
        items = list(values) if isinstance(values, list | tuple | set | frozenset | range) else None
        found = type(values).__name__
    if items is None:
        raise error(
            f"{name} can't be read as token ids",
            found=found,
            expected="a list of ints, or an array of integers with one axis",
            remedy="convert it to a list of ints first",
        )
    for position, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, Integral):
            raise error(
                f"{name} has something at position {position} that isn't a token id",
                found=f"{item!r} ({type(item).__name__})",
                expected="an int",
                remedy="pass token ids only; text goes in as one str, a chat as a list of messages",
            )
        if not 0 <= int(item) < vocab_size:
            raise error(
                f"{name} has a token id at position {position} that is outside the vocabulary",
                found=int(item),
                expected=f"0 to {vocab_size - 1}",
                remedy="encode the text with the tokenizer of this bundle's target",
            )
    return [int(item) for item in items]


def _room(limits: ModelLimits, prompt_tokens: int, max_new_tokens: int | None) -> int:
    most = limits.max_seq_len - prompt_tokens
    wanted = max(most, 1) if max_new_tokens is None else check_count("max_new_tokens", max_new_tokens)
    if wanted <= most:
        return wanted
    if most > 0:
        remedy = f"pass at most max_new_tokens={most}, or shorten the prompt"
    else:
        remedy = f"shorten the prompt to {limits.max_seq_len - 1} tokens or less"
    raise ContextLengthError(
        "the prompt and its output don't fit the bundle's limit",
        found=f"{prompt_tokens} prompt tokens + max_new_tokens {wanted} = {prompt_tokens + wanted}",
        expected=f"at most max_seq_len {limits.max_seq_len}",
        remedy=f"{remedy}; or build with a larger --max-seq-len",
    )


def _wrong(name: str, found: object, expected: str, remedy: str) -> RequestError:
    return RequestError(
        f"{name} is wrong", found=f"{found!r} ({type(found).__name__})", expected=expected, remedy=remedy
    )
