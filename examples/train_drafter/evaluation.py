"""Tokens a step on prompts that training never saw, by the reference's own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_export.errors import VerifyError
from dflash_export.reference import generate_reference, load_drafter
from dflash_export.sources.resolve import resolve_drafter
from examples.train_drafter.target import Target

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """One drafter at one width, over all prompts. ``tokens_per_step`` counts the bonus: tokens / steps."""

    width: int
    prompts: int
    tokens: int
    steps: int
    lowest: float
    highest: float

    @property
    def tokens_per_step(self) -> float:
        """Tokens decided in a step, over all steps of all prompts."""
        return self.tokens / self.steps

    def to_json(self) -> dict[str, Any]:
        """The numbers, for evaluation.json."""
        return {**asdict(self), "tokens_per_step": round(self.tokens_per_step, 4)}


def evaluate(
    folder: Path,
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    widths: Sequence[int],
    max_new_tokens: int,
    log: Callable[[str], None],
) -> list[Score]:
    """Score the drafter in ``folder`` as it is on disk, in float32, with ``dflash.model.dflash_generate``.

    ``prompts`` are token ids. The first token of an answer comes from the prefill and belongs to no step.
    """
    drafter: Any = load_drafter(resolve_drafter(folder)).to(target.model.device)
    scores = []
    for width in widths:
        runs = []
        for prompt in prompts:
            run = generate_reference(
                drafter,
                target.model,
                prompt,
                max_new_tokens=max_new_tokens,
                stop_token_ids=target.stop_token_ids,
                block_size=width,
            )
            if run.tokens_by_step:
                runs.append(run.tokens_by_step)
        if not runs:
            raise VerifyError(
                "no prompt was long enough to measure",
                found=f"{len(prompts)} answers without a step",
                expected="answers of two tokens or more",
                remedy="give other prompts, or a higher max_new_tokens",
            )
        each = [sum(steps) / len(steps) for steps in runs]
        tokens, steps = sum(map(sum, runs)), sum(map(len, runs))
        scores.append(Score(width, len(runs), tokens, steps, round(min(each), 3), round(max(each), 3)))
        log(f"evaluation: {folder.name}, width {width}: {scores[-1].tokens_per_step:.3f} tokens a step")
    return scores
