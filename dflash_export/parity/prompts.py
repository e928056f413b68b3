"""What a parity run asks when nobody says what to ask: short and long, code, numbers, several scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dflash_export.errors import VerifyError
from dflash_rt import Generator
from dflash_rt.bundle.manifest import Manifest
from dflash_rt.text.prompts import Prompt

__all__ = ["PromptInput", "encode_prompts"]

_QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a linked list, and explain it line by line.",
    "Explique en deux phrases comment fonctionne une batterie.",
    "用一句话介绍长城。🙂 And once more in English, please.",
    "What is 17 * 23? Show each step.",
    "Hi",
)
_PLAIN_TEXTS = ("def fibonacci(n):\n    ",)
_RANDOM_LENGTHS = (1, 2, 7, 16, 33, 64)
_LONGEST = 4096  # rows; a longer prompt would prove nothing more


@dataclass(frozen=True)
class PromptInput:
    """One prompt: what a reader sees of it, and its token ids."""

    text: str
    token_ids: tuple[int, ...]


def _default_prompts(generator: Generator, manifest: Manifest, max_new_tokens: int) -> list[PromptInput]:
    """The built-in prompts that fit the bundle; random token ids where it has no tokenizer.

    One is longer than a prefill chunk if that fits.
    """
    room = manifest.limits.max_seq_len - max_new_tokens
    if manifest.tokenizer is None:
        prompts = _random_ids(manifest, room)
    else:
        has_template = manifest.tokenizer.chat_template is not None
        questions = [_user(text) if has_template else text for text in _QUESTIONS]
        prompts = [_encode(generator, prompt) for prompt in (*questions, *_PLAIN_TEXTS)]
        prompts += _long_prompt(generator, manifest.limits.prefill_chunk, room, has_template)
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= room]
    if not fitting:
        raise VerifyError(
            "no built-in prompt fits the bundle",
            found=f"max_seq_len {manifest.limits.max_seq_len}, max_new_tokens {max_new_tokens}",
            expected="room for a prompt and its output",
            remedy="lower max_new_tokens, or give shorter prompts",
        )
    return fitting


def encode_prompts(
    generator: Generator, manifest: Manifest, prompts: Any, max_new_tokens: int
) -> list[PromptInput]:
    """The caller's prompts, all checked before any work; for None the built-in ones that fit the bundle.

    Raises VerifyError when there are none, and what :meth:`dflash_rt.Generator.stream` raises for a bad one.
    """
    if prompts is None:
        return _default_prompts(generator, manifest, max_new_tokens)
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence) or not prompts:
        raise VerifyError(
            "there are no prompts to compare",
            found=f"{prompts!r}"[:80],
            expected="a list of prompts: texts, chats or lists of token ids",
            remedy="pass a list, or leave prompts out for the built-in ones",
        )
    encoded = []
    for prompt in prompts:
        item = _encode(generator, prompt)
        generator.stream(list(item.token_ids), max_new_tokens=max_new_tokens).close()  # checks, runs nothing
        encoded.append(item)
    return encoded


def _encode(generator: Generator, prompt: Prompt) -> PromptInput:
    """One prompt as the generator would feed it in."""
    return PromptInput(_shown(prompt), tuple(generator.encode(prompt)))


def _shown(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        return str(items[-1].get("content"))
    return f"{len(items)} token ids"


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _random_ids(manifest: Manifest, room: int) -> list[PromptInput]:
    generator = np.random.default_rng(0)
    chunk = manifest.limits.prefill_chunk
    lengths = sorted({*_RANDOM_LENGTHS, chunk, chunk + 1, 2 * chunk + 3})
    return [
        PromptInput(
            f"{length} random token ids",
            tuple(generator.integers(0, manifest.target.vocab_size, length).tolist()),
        )
        for length in lengths
        if length <= min(room, _LONGEST)
    ]


def _long_prompt(generator: Generator, chunk: int, room: int, has_template: bool) -> list[PromptInput]:
    """A prompt of more than one prefill chunk, if there is room for it."""
    lines = 8
    while True:
        text = "\n".join(
            f"Ferry {n}: leaves at {5 + n % 18}:{n * 7 % 60:02d}, seats {40 + n * 13 % 97}."
            for n in range(1, lines + 1)
        )
        text += "\n\nSummarise this timetable in one sentence."
        found = _encode(generator, _user(text) if has_template else text)
        if len(found.token_ids) > min(room, _LONGEST):
            return []
        if len(found.token_ids) > chunk:
            return [found]
        lines += max(2, lines // 4)
