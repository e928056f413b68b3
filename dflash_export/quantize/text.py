"""The text that a target is calibrated on: its own greedy answers to a list of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dflash_rt.text.prompts import Prompt, PromptEncoder

__all__ = ["CALIBRATION_PROMPTS", "CalibrationText", "encode_prompts", "write_text"]

# None of them is among the prompts that the cost of quantisation is measured on.
CALIBRATION_PROMPTS = (
    "Why is the sky blue on a clear day?",
    "Write a Python function that reverses a linked list.",
    "How do I bake a simple loaf of bread?",
    "What is the capital of Australia, and why is it not Sydney?",
    "Write an email asking a colleague to move a meeting to Thursday.",
    "What is 17 times 24? Show the steps.",
    "Was ist der Unterschied zwischen Wetter und Klima?",
    "Give me a JSON object with the name, age and city of a person.",
    "Write a short poem about autumn rain.",
    "How does a refrigerator keep food cold?",
    "Compare electric cars and petrol cars in a table.",
    "Who was Marie Curie, and what did she discover?",
    "Translate into French: The train leaves at nine in the morning.",
    "List five tips for learning a new language.",
    "Write an SQL query that finds the ten best-selling products.",
    "Explain photosynthesis to a ten-year-old.",
    "Describe a day in the life of a medieval blacksmith.",
    "What are the main causes of inflation?",
    "Write the opening paragraph of a detective novel.",
    "How many legs do three spiders and two dogs have together?",
    "Explain the difference between a list and a tuple in Python.",
    "What should I see in Rome in two days?",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "What does the HTTP status code 404 mean?",
    "Give three arguments for and three against working from home.",
    "Tell me a joke about computers.",
    "Suggest a healthy breakfast with oats and fruit.",
    "Describe how a bill becomes a law in the United States.",
    "What is a black hole?",
    "How can I sleep better at night?",
    "Name the largest oceans from the biggest to the smallest.",
    "Write a haiku about the sea.",
)
_ROW = 512  # tokens of a row at most
_RANDOM_PROMPTS, _RANDOM_TOKENS = 8, 16


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """int64 ``rows [rows, tokens]``: texts one after another, cut into rows of one length."""

    prompts: int
    rows: torch.Tensor

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows.numel()

    @property
    def sha256(self) -> str:
        """Of the token ids as little-endian int32."""
        return hashlib.sha256(self.rows.numpy().astype("<i4").tobytes()).hexdigest()


def encode_prompts(
    encoder: PromptEncoder, texts: Sequence[str], vocab_size: int, room: int
) -> list[list[int]]:
    """Token ids of ``texts``, each at most ``room`` long; random ones where there is no tokenizer."""
    if encoder.tokenizer is None:
        random = np.random.default_rng(1)
        shape = min(_RANDOM_PROMPTS, len(texts)), min(_RANDOM_TOKENS, room)
        return [[int(token) for token in row] for row in random.integers(0, vocab_size, shape)]
    plain = encoder.chat_template is None
    prompts: list[Prompt] = [text if plain else [{"role": "user", "content": text}] for text in texts]
    return [list(encoder.encode(prompt, None))[:room] for prompt in prompts]


def write_text(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stop_token_ids: Collection[int]
) -> CalibrationText:
    """Let ``model`` answer all ``prompts`` at once, greedily, with at most ``new_tokens`` each."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    stops = sorted(stop_token_ids)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    output = model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    flat: list[int] = []
    for prompt, answer in zip(prompts, output, strict=True):
        ends = [at for at, token in enumerate(answer) if token in stop_token_ids]
        flat += [*prompt, *answer[: ends[0] + 1 if ends else None]]
    length = min(_ROW, len(flat), int(model.config.max_position_embeddings))
    rows = torch.tensor(flat[: len(flat) // length * length]).view(-1, length)
    return CalibrationText(len(prompts), rows)
