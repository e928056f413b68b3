"""Time: a budget that work checks before it starts something, so that it ends cleanly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Budget"]


@dataclass
class Budget:
    """Minutes of wall clock from its creation; ``None``: no end."""

    minutes: float | None
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)
    _longest: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def allows_another(self, since: float | None) -> bool:
        """Whether one more piece fits, if it takes no longer than the longest so far.

        ``since`` is what :attr:`seconds` was when the last piece began, ``None`` before the first, which is
        always allowed: every call makes some progress.
        """
        if since is None or self.minutes is None:
            return True
        now = self.seconds
        self._longest = max(self._longest, now - since)
        return now + self._longest < 60 * self.minutes
