"""How far a long piece of work is: a bar on a terminal, lines elsewhere, nothing for library calls.

A function that takes long has a parameter ``progress: Progress | None = None``, where ``None`` means
:data:`SILENT`. It opens a stage for each part of the work::

    with progress.stage("tracing graphs", total=5) as stage:
        for graph in graphs:
            trace(graph)
            stage.advance()

Stages may be nested. Everything goes to stderr: stdout is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as _Bars

__all__ = ["SILENT", "LineProgress", "Progress", "RichProgress", "SilentProgress", "Stage", "make_progress"]


class Stage(Protocol):
    """One part of the work, while it is open."""

    def advance(self, amount: float = 1) -> None:
        """Say that ``amount`` more of the stage's total is done, in whatever unit the total counts."""


class Progress(Protocol):
    """Where a long function tells how far it is."""

    def stage(self, name: str, total: float | None = None) -> AbstractContextManager[Stage]:
        """Open a stage called ``name``. ``total=None``: the amount of work is unknown."""


@dataclass(frozen=True)
class _Stage:
    advance: Callable[..., None]


class SilentProgress:
    """Says nothing. The default of every library call."""

    def stage(self, name: str, total: float | None = None) -> AbstractContextManager[Stage]:
        """Open a stage that nobody sees."""
        return nullcontext(_Stage(lambda *_: None))


class LineProgress:
    """A line when a stage begins, one at each further quarter, and one with the seconds it took."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Open a stage that writes lines."""
        self._write(f"{name} ...")
        began, done, quarter = time.monotonic(), 0.0, 0

        def advance(amount: float = 1) -> None:
            nonlocal done, quarter
            done += amount
            reached = min(int(4 * done / total), 3) if total else 0
            if reached > quarter:
                quarter = reached
                self._write(f"{name}: {25 * quarter} %")

        yield _Stage(advance)
        # Not reached after an exception: the error message that follows says more than "done" would.
        self._write(f"{name}: done in {time.monotonic() - began:.1f} s")

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class RichProgress:
    """Bars on a terminal. ``rich`` is imported when the first stage opens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: _Bars | None = None
        self._open_stages = 0

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Open a stage that draws a bar."""
        bars = self._bars if self._bars is not None else self._make_bars()
        self._bars = bars
        # A terminal has room for one live display, so nested stages share it.
        self._open_stages += 1
        bars.start()  # does nothing if it runs already
        task = bars.add_task(name, total=total)
        try:
            yield _Stage(partial(bars.advance, task))
            bars.update(task, total=total or 1, completed=total or 1)
        finally:
            bars.stop_task(task)
            self._open_stages -= 1
            if self._open_stages == 0:
                bars.stop()
                self._bars = None  # finished bars stay on the screen; the next ones start below them

    def _make_bars(self) -> _Bars:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        return Progress(*columns, console=Console(file=self._stream))


SILENT: Progress = SilentProgress()


def make_progress(stream: TextIO | None = None) -> Progress:
    """The progress for a command: bars if ``stream`` (default: stderr) is a terminal, lines otherwise."""
    chosen = sys.stderr if stream is None else stream
    return RichProgress(chosen) if chosen.isatty() else LineProgress(chosen)
