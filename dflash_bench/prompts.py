"""Prompts for benchmarks: a few questions, and a mix in which drafting helps some and not others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dflash_rt.errors import PromptError
from dflash_rt.sampling.params import SamplingParams

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle
    from dflash_rt.generator import Generator
    from dflash_rt.text.prompts import Prompt

__all__ = ["BenchPrompt", "default_prompts", "encode_prompts", "mixed_prompts"]

_QUESTIONS = (
    "Why is the sky blue?",
    "Write an email to my landlord about a broken window.",
    "Explain how a bicycle stays upright.",
    "List five things to take on a hike, with a reason for each.",
)
_RANDOM_PROMPT_TOKENS = 32
_SEED = 1  # of sampled answers: any fixed one, so that every system decodes the same text


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt of a mix: what it is an example of, its text, and how its answer is sampled."""

    kind: str
    text: str
    chat: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)


_MIX = (
    BenchPrompt("question", "Why is the sky blue?"),
    BenchPrompt("letter", "Write an email to my landlord about a broken window."),
    BenchPrompt("list", "List five things to take on a hike, with a reason for each."),
    BenchPrompt("code", "Write a Python function that returns the n-th Fibonacci number."),
    BenchPrompt("repetition", "The cat sat on the mat. The cat sat on the mat. The cat sat", chat=False),
    BenchPrompt("counting", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,", chat=False),
    BenchPrompt("story", "Once upon a time there was a lighthouse keeper who", chat=False),
    BenchPrompt("German", "Warum ist der Himmel blau? Bitte antworte auf Deutsch."),
    BenchPrompt("French", "La Révolution française a commencé en", chat=False),
    BenchPrompt(
        "random words",
        "gravel oboe seventeen lint purple under sixpence walrus hinge oatmeal forty lamp evict",
        chat=False,
        sampling=SamplingParams(temperature=1.0, top_k=50, seed=_SEED),
    ),
    BenchPrompt(
        "temperature 0.8",
        "Explain how a bicycle stays upright.",
        sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=_SEED),
    ),
    BenchPrompt(
        "temperature 1.5",
        "Tell me about the sea.",
        sampling=SamplingParams(temperature=1.5, top_k=50, seed=_SEED),
    ),
)


def default_prompts(bundle: Bundle) -> list[Prompt]:
    """A few prompts that suit a bundle: chats, texts, or random ids if there is no tokenizer."""
    return _suited(bundle, [(question, True) for question in _QUESTIONS])


def mixed_prompts(bundle: Bundle) -> list[tuple[str, Prompt, SamplingParams]]:
    """The mix for a bundle: kind, prompt and sampling of each.

    Without a chat template questions become plain texts, and without a tokenizer all are random ids.
    """
    kinds = [item.kind for item in _MIX]
    if bundle.manifest.tokenizer is None:
        kinds = [f"random ids {number}" for number in range(len(_MIX))]
    prompts = _suited(bundle, [(item.text, item.chat) for item in _MIX])
    return [(kind, prompt, item.sampling) for kind, prompt, item in zip(kinds, prompts, _MIX, strict=True)]


def encode_prompts(generator: Generator, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of all prompts. Whatever a request would be refused for is found here, before the run."""
    if not prompts:
        raise PromptError(
            "there is no prompt to measure with",
            found="an empty list",
            expected="at least one prompt",
            remedy="pass some, or None for the built-in ones",
        )
    encoded = [generator.encode(prompt) for prompt in prompts]
    for ids in encoded:
        generator.stream(ids, max_new_tokens=max_new_tokens).close()
    return encoded


def _suited(bundle: Bundle, texts: Sequence[tuple[str, bool]]) -> list[Prompt]:
    """Prompts of texts, each with whether it is a question for a chat."""
    tokenizer, vocabulary = bundle.manifest.tokenizer, bundle.manifest.target.vocab_size
    if tokenizer is None:
        numbers = np.random.default_rng(0).integers(vocabulary, size=(len(texts), _RANDOM_PROMPT_TOKENS))
        return list(numbers.tolist())
    chats = tokenizer.chat_template is not None
    return [[{"role": "user", "content": text}] if chats and chat else text for text, chat in texts]
