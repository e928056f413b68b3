"""What a build says while it runs: its log, and how far it is."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

from dflash_export.progress import Stage

__all__ = ["BuildMonitor", "make_logger", "make_monitor"]

_KEPT = 20


def make_logger(trt: ModuleType) -> Any:
    """A ``trt.ILogger`` that keeps the last errors in ``.errors`` and prints nothing."""

    class _Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors = [*self.errors[1 - _KEPT :], message]

    return _Logger()


class BuildMonitor:
    """Turns the phases of a build into one fraction between 0 and 1.

    Phases are nested: a phase of n steps is as far as the steps that it finished, plus the share of the step
    that its furthest child is in. Called from several threads.
    """

    def __init__(self, stage: Stage) -> None:
        self.cancelled = False
        self._stage = stage
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._told = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> bool:
        """Step ``step`` (from 0) of a phase is done. False asks the builder to stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = max(self._phases[name].done, step + 1)
                self._tell(self._fraction())
        return not self.cancelled

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(name, None)

    def _fraction(self) -> float:
        return max((self._of(name) for name, p in self._phases.items() if p.parent is None), default=0.0)

    def _of(self, name: str) -> float:
        phase = self._phases[name]
        inside = max((self._of(child) for child, p in self._phases.items() if p.parent == name), default=0.0)
        return min((phase.done + inside) / phase.steps, 1.0)

    def _tell(self, fraction: float) -> None:
        if fraction > self._told:
            self._stage.advance(fraction - self._told)
            self._told = fraction


class _Phase:
    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent = parent
        self.steps = steps
        self.done = 0


def make_monitor(trt: ModuleType, monitor: BuildMonitor) -> Any:
    """``monitor`` as the library wants it. An interrupt stops the build instead of passing through C++."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                monitor.start(phase_name, parent_phase, num_steps)
            except KeyboardInterrupt:
                monitor.cancelled = True

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return monitor.step(phase_name, step)
            except KeyboardInterrupt:
                monitor.cancelled = True
                return False

        def phase_finish(self, phase_name: str) -> None:
            try:
                monitor.finish(phase_name)
            except KeyboardInterrupt:
                monitor.cancelled = True

    return _Monitor()
