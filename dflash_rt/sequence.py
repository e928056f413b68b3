"""The state of one sequence that is being decoded."""

from __future__ import annotations

import numpy as np

from dflash_rt.backends.base import Inject, IntArray

__all__ = ["Sequence"]


class Sequence:
    """Tokens, how many rows are committed, and which features the drafter still lacks.

    Everything that a rollback, a pause or a second slot would need is here; a backend owns buffers only.

    Attributes:
        prompt: int64 ``[prompt_rows]``; not changed.
        new_tokens: tokens decided so far, in order; the last one is the next anchor.
        start: rows committed to the caches; the next rows fed in begin here.
        uninjected: feature rows of the last verify pass that the drafter's cache doesn't hold yet.
        accepted_per_step: for each step, how many drafted tokens the target confirmed.
    """

    def __init__(self, prompt: IntArray) -> None:
        self.prompt = prompt
        self.new_tokens: list[int] = []
        self.start = 0
        self.uninjected: Inject | None = None
        self.accepted_per_step: list[int] = []

    @property
    def prompt_rows(self) -> int:
        """Number of prompt tokens."""
        return int(self.prompt.shape[0])

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is committed."""
        return self.start >= self.prompt_rows

    @property
    def starts(self) -> IntArray:
        """``start`` as the backend takes it: int64 ``[batch]``, a fresh array."""
        return np.array([self.start], dtype=np.int64)

    @property
    def anchors(self) -> IntArray:
        """The last decided token as the backend takes it: int64 ``[batch]``, a fresh array."""
        return np.array([self.new_tokens[-1]], dtype=np.int64)

    def next_prompt_rows(self, limit: int) -> IntArray:
        """The next ``limit`` prompt tokens at most, int64 ``[batch, rows]``."""
        return self.prompt[None, self.start : self.start + limit]

    def commit_prefill(self, rows: int) -> None:
        """``rows`` prompt rows are in the caches."""
        self.start += rows

    def commit_step(self, accepted: int, width: int) -> None:
        """Keep the anchor's row and ``accepted`` drafted rows of a verify pass that had ``width`` rows.

        The rollback is this one addition: rows from the new ``start`` on are garbage, and the next block
        overwrites them before anything reads them.
        """
        if width > 1:
            self.uninjected = Inject(start=self.starts, rows=width)
        self.start += accepted + 1
        self.accepted_per_step.append(accepted)
