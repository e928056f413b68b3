"""The time that a run may take."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Budget", "SkippedError"]


class SkippedError(Exception):
    """A part can't be done here and now. Its text is the reason, as the report shows it."""


class Budget:
    """Seconds until the run has to be done. ``clock`` gives seconds since any fixed moment."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self.seconds = seconds

    @property
    def left(self) -> float:
        """Seconds that are left; never negative."""
        return max(0.0, self._end - self._clock())

    def require(self, seconds: float) -> None:
        """Raise :class:`SkippedError` if fewer than ``seconds`` are left."""
        left = self.left
        if left < seconds:
            raise SkippedError(
                f"no time: it may take {seconds:.0f} s, and {left:.0f} s of {self.seconds:.0f} s are left"
            )
