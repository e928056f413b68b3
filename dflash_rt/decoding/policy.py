"""How many rows the next step has: the protocol, and the policy that always says the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["FixedWidth", "WidthPolicy"]


class WidthPolicy(Protocol):
    """Chooses the width of each step of one request."""

    @property
    def widest(self) -> int:
        """No step will be wider. 1: the drafter never runs, and needs no features."""

    def choose(self) -> int:
        """Rows of the next step's verify pass, 1 (plain decoding) to :attr:`widest`.

        Called once a step, perhaps before the step before it is observed.
        """

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        """A step of ``width`` rows is done; its first ``accepted`` drafts were confirmed.

        It took ``seconds``, all between two tokens included but the caller; ``None`` if that isn't known.
        """


@dataclass(frozen=True)
class FixedWidth:
    """The same width at every step."""

    widest: int

    def choose(self) -> int:
        return self.widest

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        """Nothing to learn."""
