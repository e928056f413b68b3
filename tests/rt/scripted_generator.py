"""Generators with scripted answers: a scripted backend and a tokenizer of single bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dflash_rt.backends.scripted import Drafter, ScriptedBackend, follow
from dflash_rt.generator import Generator
from dflash_rt.request import ModelLimits
from dflash_rt.text.prompts import PromptEncoder
from dflash_rt.text.tokenizer import Tokenizer

END = 256  # "</s>", special: no text
BEGIN = 257  # "<s>", special; goes before every text prompt
VOCAB = 258
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ mood }}\n{% endfor %}>"


def write_byte_tokenizer(path: Path) -> Path:
    """A byte-level tokenizer without merges, so that every byte is a token."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", BEGIN)]
    )
    tokenizer.save(str(path))
    return path


@cache
def byte_tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer(write_byte_tokenizer(Path(folder) / "tokenizer.json"))


def encode(text: str) -> list[int]:
    """Token ids of ``text`` alone, one for each of its UTF-8 bytes."""
    return byte_tokenizer().encode(text, add_special_tokens=False)


def mostly_right(prompt: list[int], answer: list[int], *, wrong_every: int = 3) -> Drafter:
    """A drafter that is wrong at every n-th position, so that blocks are accepted in part."""
    script = [*prompt, *answer]

    def draft(prefix: tuple[int, ...], count: int) -> list[int]:
        places = range(len(prefix), len(prefix) + count)
        return [script[p] if p < len(script) and p % wrong_every else 0 for p in places]

    return draft


def limits(**changes: Any) -> ModelLimits:
    values = {
        "vocab_size": VOCAB,
        "max_seq_len": 200,
        "prefill_chunk": 8,
        "block_size": 5,
        "num_draft_tokens": 4,
        "stop_token_ids": frozenset({END}),
    }
    return ModelLimits(**(values | changes))


def prompts(**changes: Any) -> PromptEncoder:
    return PromptEncoder(**({"tokenizer": byte_tokenizer(), "chat_template": TEMPLATE} | changes))


def scripted_generator(
    answer: str | list[int],
    *,
    prompt: list[int] | None = None,
    drafter: Drafter | None = None,
    raise_at: Mapping[int, BaseException] | None = None,
    **changes: Any,
) -> Generator:
    """A generator that answers ``prompt`` (``[1]`` unless given) with ``answer``, then END for ever."""
    prompt = [1] if prompt is None else prompt
    tokens = encode(answer) if isinstance(answer, str) else answer
    known = limits(**changes)
    backend = ScriptedBackend(
        follow([*prompt, *tokens, *[END] * known.max_seq_len]),
        drafter or mostly_right(prompt, tokens),
        block_size=known.block_size,
        prefill_chunk=known.prefill_chunk,
        max_rows=known.max_seq_len,
        raise_at=raise_at,
    )
    return Generator.from_parts(known, backend, prompts())
