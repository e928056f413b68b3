"""What quantisation changed: the target before and after it, in PyTorch, over text that the target wrote."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dflash_export.errors import VerifyError
from dflash_export.pairing.read import Pair
from dflash_export.progress import Progress
from dflash_export.quantize.dequantized import put_dequantized
from dflash_export.quantize.text import encode_prompts
from dflash_export.reference import (
    generate_greedy,
    generate_reference,
    load_drafter,
    load_target,
    reference_version,
    teacher_forced,
)
from dflash_rt.bundle.manifest import QuantizationCost, QuantizationInfo
from dflash_rt.text.prompts import PromptEncoder

__all__ = ["measure_cost"]

_QUESTIONS = (
    "Why do leaves change colour in autumn?",
    "Write a Python function that counts the words of a text.",
    "Give me a recipe for a simple vegetable soup.",
    "What is the difference between a virus and a bacterium?",
    "Tell a short story about a lighthouse keeper.",
    "A train travels 120 km in 90 minutes. How fast is it?",
    "Nenne drei Sehenswürdigkeiten in Wien.",
    "List the planets in order and say one thing about each.",
)


def measure_cost(
    folder: Path,
    pair: Pair,
    encoder: PromptEncoder,
    quantization: QuantizationInfo,
    progress: Progress,
) -> QuantizationCost:
    """Compare the target of ``folder`` with the checkpoint that it came from.

    The text is what the checkpoint answers to built-in prompts, greedily. Loads the target in fp32, once.
    Tokens per step are those of the reference's loop with ``pair.num_draft_tokens``, each target with its own
    answers; they stay ``None`` in plain decoding, and where PyPI ``dflash`` isn't installed or can't load the
    drafter.

    Raises:
        VerifyError: PyTorch can't load the target.
    """
    room = max(1, pair.limits.max_seq_len - pair.measured_tokens)
    prompts = encode_prompts(encoder, _QUESTIONS, pair.facts.vocab_size, room)
    with (
        progress.stage("measuring what quantisation changed", total=4 * len(prompts)) as stage,
        contextlib.ExitStack() as threads,
    ):
        model = load_target(pair.target)
        threads.enter_context(_quickest_threads(model))
        loop = _Loop(pair)
        before, text = [], []
        for prompt in prompts:
            text.append(loop.answer(model, prompt))
            stage.advance()
            before.append(torch.from_numpy(teacher_forced(model, prompt, text[-1]).logits))
            stage.advance()
        steps_before = loop.take_tokens_per_step()
        put_dequantized(model, folder, quantization, check=False)
        same = divergence = 0.0
        for prompt, answer, wanted in zip(prompts, text, before, strict=True):
            found = torch.from_numpy(teacher_forced(model, prompt, answer).logits)
            same += float((found.argmax(-1) == wanted.argmax(-1)).sum())
            divergence += _divergence(wanted, found)
            stage.advance()
            if loop.drafter is not None:
                loop.answer(model, prompt)
            stage.advance()
    tokens = sum(map(len, text))
    return QuantizationCost(
        tokens=tokens,
        top1_agreement=round(same / tokens, 4),
        kl_divergence=round(max(0.0, divergence / tokens), 6),
        tokens_per_step_before=steps_before,
        tokens_per_step=loop.take_tokens_per_step(),
    )


@contextlib.contextmanager
def _quickest_threads(model: Any) -> Iterator[None]:
    """One thread for this block, or as many as PyTorch has: whichever feeds a token to ``model`` faster.

    PyTorch's threads wait for each other in every operator. Where other programs have the cores, two of them
    took nine times as long as one, and the measurement a quarter of an hour. The setting is the process's.
    """
    before = torch.get_num_threads()
    seconds = {}
    try:
        for count in {1, before}:
            torch.set_num_threads(count)
            seconds[count] = min(_token_seconds(model) for _ in range(3))
        torch.set_num_threads(min(seconds, key=seconds.__getitem__))
        yield
    finally:
        torch.set_num_threads(before)


def _token_seconds(model: Any) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return time.perf_counter() - began


def _divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Sum over the rows of KL(wanted ‖ found), nats. Both float32 ``[tokens, vocab]`` logits."""
    wanted, found = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum())


class _Loop:
    """Greedy answers, by the reference's loop where it can be had, and the steps that they took."""

    def __init__(self, pair: Pair) -> None:
        self.drafter: Any | None = None
        if pair.num_draft_tokens > 0 and reference_version() is not None:
            with contextlib.suppress(VerifyError):  # a drafter that the reference doesn't know
                self.drafter = load_drafter(pair.drafter)
        self._block_size = pair.num_draft_tokens + 1
        self._new_tokens, self._stops = pair.measured_tokens, pair.stop_token_ids
        self._steps = self._tokens = 0

    def answer(self, model: Any, prompt: Sequence[int]) -> tuple[int, ...]:
        if self.drafter is None:
            return generate_greedy(
                model, prompt, max_new_tokens=self._new_tokens, stop_token_ids=self._stops
            ).token_ids
        run = generate_reference(
            self.drafter,
            model,
            prompt,
            max_new_tokens=self._new_tokens,
            stop_token_ids=self._stops,
            block_size=self._block_size,
        )
        self._steps += len(run.tokens_by_step)
        self._tokens += len(run.token_ids) - 1  # the first comes from the prefill
        return run.token_ids

    def take_tokens_per_step(self) -> float | None:
        """Of the answers since the last call; ``None`` if there were no steps."""
        result = round(self._tokens / self._steps, 3) if self._steps else None
        self._steps = self._tokens = 0
        return result
