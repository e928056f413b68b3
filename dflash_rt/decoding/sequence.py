"""The state of one sequence that is being decoded."""

from __future__ import annotations

import numpy as np

from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Inject

__all__ = ["Sequence"]


class Sequence:
    """Tokens, how many rows are committed, and which features the drafter still lacks.

    Everything that a rollback, a pause or a second slot would need is here; a backend owns buffers only.

    Attributes:
        prompt: int64 ``[prompt_rows]``; not changed.
        new_tokens: tokens decided so far, in order; the last one is the next anchor.
        start: rows committed to the caches; the next rows fed in begin here.
        injected: rows whose features the drafter's cache holds, if the request drafts at all.
        fed: end of the last pass; rows from ``start`` to here were fed in and rejected.
        accepted_per_step: for each step, how many drafted tokens the target confirmed.
        verify_len_per_step: for each step, the rows of its verify pass; 1 is a plain step.
    """

    def __init__(self, prompt: IntArray) -> None:
        self.prompt = prompt
        self.new_tokens: list[int] = []
        self.start = 0
        self.injected = 0
        self.fed = 0
        self.accepted_per_step: list[int] = []
        self.verify_len_per_step: list[int] = []

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

    @property
    def uninjected(self) -> Inject | None:
        """Features that the drafter's cache lacks; ``None`` if it has them all."""
        rows = self.fed - self.injected
        return Inject(start=np.array([self.injected], dtype=np.int64), rows=rows) if rows else None

    def next_prompt_rows(self, limit: int) -> IntArray:
        """The next ``limit`` prompt tokens at most, int64 ``[batch, rows]``."""
        return self.prompt[None, self.start : self.start + limit]

    def commit_prefill(self, rows: int) -> None:
        """``rows`` prompt rows are in the caches, their features too."""
        self.start += rows
        self.injected = self.fed = self.start

    def commit_step(self, accepted: int, verify_len: int, *, injected: bool) -> None:
        """Keep the anchor's row and ``accepted`` drafted rows of a verify pass that had ``verify_len`` rows.

        ``injected`` says whether the step injected first; then only its own rows are lacking now.

        The rollback is this one addition: rows from the new ``start`` on are garbage, and the next block
        overwrites them before anything reads them.
        """
        if injected:
            self.injected = self.start
        self.fed = self.start + verify_len
        self.start += accepted + 1
        self.accepted_per_step.append(accepted)
        self.verify_len_per_step.append(verify_len)
