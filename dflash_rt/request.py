"""Requests: everything a caller can get wrong is found here, before any work is done."""

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

__all__ = ["DraftWidth", "ModelLimits", "Request", "check_count", "check_ids"]

DraftWidth: TypeAlias = int | Literal["auto"] | None
"""Rows of a verify pass: a number for all steps; ``"auto"``: each step's own, up to the drafter's block size;
``None``: each step's own, up to the bundle's ``draft_width``."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the loop and the checks need to know of a model: sizes, limits and defaults.

    Attributes:
        vocab_size: token ids are below this.
        max_seq_len: prompt and output tokens together, at most.
        prefill_chunk: rows of one prefill pass, at most.
        block_size: rows of a draft block at most, the anchor included.
        draft_width: rows of a verify pass in a drafted step, at most; 1 is no drafting.
        adaptive: whether each step takes the width that promises most; otherwise all take ``draft_width``.
        samples_drafts: the drafter samples its proposals at a temperature above 0. Then a seed's text depends
            on the widths, so that such a request never takes widths that depend on the clock.
        stop_token_ids: ids that end a text unless a request says otherwise.
        sampling: how tokens are chosen unless a request says otherwise.
    """

    vocab_size: int
    max_seq_len: int
    prefill_chunk: int
    block_size: int
    draft_width: int
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adaptive: bool = False
    samples_drafts: bool = False

    @classmethod
    def from_manifest(cls, manifest: Manifest, *, draft_width: DraftWidth = None) -> ModelLimits:
        """A bundle's limits; for ``draft_width`` see :data:`DraftWidth`.

        Raises:
            RequestError: ``draft_width`` is neither ``"auto"`` nor from 1 to the drafter's block size.
        """
        block_size = manifest.drafter.block_size
        if draft_width is None:
            width = manifest.generation.draft_width
        elif isinstance(draft_width, str):
            if draft_width != "auto":
                raise _wrong(
                    "draft_width", draft_width, f'"auto", or 1 to {block_size}', 'pass "auto" or a number'
                )
            width = block_size
        else:
            width = check_count("draft_width", draft_width)
        if width > block_size:
            raise RequestError(
                "draft_width is larger than a draft block",
                found=width,
                expected=f"1 to {block_size}, the drafter's block_size",
                remedy=f"pass at most {block_size}; 1 is no drafting",
            )
        return cls(
            vocab_size=manifest.target.vocab_size,
            max_seq_len=manifest.limits.max_seq_len,
            prefill_chunk=manifest.limits.prefill_chunk,
            block_size=block_size,
            draft_width=width,
            stop_token_ids=frozenset(manifest.generation.stop_token_ids),
            sampling=SamplingParams(**asdict(manifest.generation.sampling)),
            adaptive=width > 1 and (draft_width is None or isinstance(draft_width, str)),
            samples_drafts=manifest.drafter.selector_top_k is not None,
        )


@dataclass(frozen=True, eq=False)
class Request:
    """A request that can be run.

    ``prompt`` is int64 ``[rows]``; ``width`` is the rows of a verify pass, at most if ``adaptive``;
    ``sampling`` has a seed if it needs one.
    """

    prompt: IntArray
    max_new_tokens: int
    width: int
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
        """Check a request whose prompt is token ids by now.

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
            width=limits.draft_width if speculative else 1,
            adaptive=limits.adaptive and speculative and not draws_drafts,
            stop_token_ids=stop_ids,
            sampling=params.seeded(),
        )


def check_count(name: str, value: object) -> int:
    """``value`` as an int of at least 1. Raises RequestError for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise _wrong(name, value, "a whole number, 1 or more", f"pass such a number as {name}")
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
