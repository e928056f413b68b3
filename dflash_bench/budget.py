"""The time that a run may take, and parts that are run in it, skipped or failed, each with its reason."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

from dflash_rt.errors import DFlashError

__all__ = ["Budget", "Part", "Parts", "SkippedError"]

P = ParamSpec("P")
T = TypeVar("T")
State = Literal["running", "done", "skipped", "failed"]


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


@dataclass
class Part:
    """One piece of the suite. ``reason`` says why it was skipped or failed."""

    name: str
    state: State = "running"
    seconds: float = 0.0
    reason: str | None = None


@dataclass
class Parts:
    """Runs pieces one after another; if one of them raises, the next is run all the same.

    ``changed`` is called when a part begins or ends, so that a report is never behind by more than the
    part that is running.
    """

    budget: Budget
    changed: Callable[[], None]
    parts: list[Part] = field(default_factory=list)

    def run(
        self, name: str, seconds: float, work: Callable[P, T], *args: P.args, **options: P.kwargs
    ) -> T | None:
        """Call ``work`` if ``seconds`` are left, and return its result; ``None`` if it doesn't end."""
        part = Part(name)
        self.parts.append(part)
        self.changed()
        began = time.monotonic()
        try:
            self.budget.require(seconds)
            result = work(*args, **options)
            part.state = "done"
            return result
        except SkippedError as skipped:
            part.state, part.reason = "skipped", str(skipped)
        except DFlashError as error:
            part.state, part.reason = "failed", str(error)
        except Exception as error:  # noqa: BLE001  # of any library: the other parts are still worth having
            trace = traceback.extract_tb(error.__traceback__)[-1]
            part.state = "failed"
            part.reason = f"{type(error).__name__}: {error} ({trace.filename}:{trace.lineno})"
        finally:
            part.seconds = time.monotonic() - began
            self.changed()
        return None

    def skip(self, name: str, reason: str) -> None:
        """Note a part that isn't even begun."""
        self.parts.append(Part(name, "skipped", reason=reason))
        self.changed()
