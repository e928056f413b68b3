"""Counters and times of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GenerationStats"]


@dataclass(frozen=True)
class GenerationStats:
    """Counters and times of one request. Values that follow from others are properties.

    The first new token comes from the prefill; every later one from a step. Times are in seconds of work on
    the request. They leave out waiting for other requests, tokenizing the prompt, and the caller's own work
    between two chunks.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens returned, a stop token included.
        num_draft_tokens: tokens that a step drafts, at most; 0 for plain decoding.
        accepted_per_step: for each step, how many drafts the target confirmed. The last step's counts in
            full even if a stop or the length limit drops some of them, since this measures the drafter.
        drafted_per_step: for each step, how many tokens were drafted; 0 for a plain step.
        prefill_seconds: until the first token was there.
        decode_seconds: in all steps together.
        stage_seconds: part of ``decode_seconds`` spent inside the backend's runs, by stage
            (see :attr:`dflash_rt.backends.base.Backend.run_seconds`).
    """

    prompt_tokens: int
    new_tokens: int
    num_draft_tokens: int
    accepted_per_step: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    stage_seconds: Mapping[str, float]
    drafted_per_step: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Number of steps: a verify pass each, and a draft pass before it unless the step was plain."""
        return len(self.accepted_per_step)

    @property
    def steps_by_draft_tokens(self) -> dict[int, int]:
        """How many steps drafted each number of tokens, small numbers first."""
        return dict(sorted(Counter(self.drafted_per_step).items()))

    @property
    def accepted_by_position(self) -> tuple[int, ...]:
        """In how many steps the draft at each 0-based position was accepted; length ``num_draft_tokens``."""
        counts = self.accepted_per_step
        return tuple(sum(count > position for count in counts) for position in range(self.num_draft_tokens))

    @property
    def drafted_by_position(self) -> tuple[int, ...]:
        """In how many steps there was a draft at each 0-based position; length ``num_draft_tokens``."""
        counts = self.drafted_per_step
        return tuple(sum(count > position for count in counts) for position in range(self.num_draft_tokens))

    @property
    def tokens_per_step(self) -> float:
        """Tokens returned by steps (all but the first) divided by steps; 0.0 without a step."""
        return (self.new_tokens - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens returned by steps divided by ``decode_seconds``; 0.0 without a step."""
        return (self.new_tokens - 1) / self.decode_seconds if self.steps and self.decode_seconds else 0.0

    @property
    def backend_seconds(self) -> float:
        """Part of ``decode_seconds`` spent inside the backend's runs."""
        return sum(self.stage_seconds.values())

    def as_dict(self) -> dict[str, object]:
        """Fields and properties as JSON values, for logs and ``--json``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "accepted_by_position": list(self.accepted_by_position),
            "drafted_by_position": list(self.drafted_by_position),
            "steps_by_draft_tokens": {str(n): steps for n, steps in self.steps_by_draft_tokens.items()},
            "accepted_per_step": list(self.accepted_per_step),
            "drafted_per_step": list(self.drafted_per_step),
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "backend_seconds": self.backend_seconds,
            "stage_seconds": dict(self.stage_seconds),
        }
