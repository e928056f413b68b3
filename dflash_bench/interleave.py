"""Runs every system on every prompt in turn, so that what disturbs the machine disturbs all of them.

For each repeat and each prompt every system decodes, and each time another one begins; systems that can stop
between two steps take turns step by step. docs/reference/benchmark.md has the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from dflash_bench.budget import Budget, SkippedError

__all__ = ["Decoder", "Say", "Timed", "measure", "silent"]

Say: TypeAlias = Callable[[str], None]

# Idle threads of the last system's pool may spin for a few milliseconds into the next one's time.
_PAUSE_SECONDS = 0.02
_WARM_UP_TOKENS = 8


class Timed(Protocol):
    """What a system measured in one run."""

    @property
    def speed(self) -> str:
        """Its speed for a line of progress."""


Result = TypeVar("Result", bound=Timed)
_Result_co = TypeVar("_Result_co", bound=Timed, covariant=True)
_Prompt = TypeVar("_Prompt")
_Prompt_contra = TypeVar("_Prompt_contra", contravariant=True)


class Decoder(Protocol[_Prompt_contra, _Result_co]):
    """What :func:`measure` needs of a system.

    One that can stop between two steps while others run says so: its ``apart`` is true as long as no other
    system has its buffers. Its ``start``, called like :meth:`decode`, then returns a run: ``advance()`` takes
    the next step and says whether there was one, ``tokens`` counts the new tokens so far, and ``outcome`` is
    the result once there are no more steps (:class:`~dflash_bench.systems.own.OwnRun`).
    """

    @property
    def name(self) -> str:
        """Name of its row."""

    def decode(self, prompt: _Prompt_contra, max_new_tokens: int, /) -> _Result_co:
        """Decode until a stop token, or until there are ``max_new_tokens``."""


def silent(line: str) -> None:
    """Progress that nobody sees."""
    del line


def measure(
    systems: Sequence[Decoder[_Prompt, Result]],
    prompts: Sequence[_Prompt],
    *,
    max_new_tokens: int,
    repeats: int,
    say: Say = silent,
    pause_seconds: float = _PAUSE_SECONDS,
    warm_up_tokens: int = _WARM_UP_TOKENS,
    budget: Budget | None = None,
    optional: Collection[str] = (),
    missing: dict[str, str] | None = None,
) -> dict[str, dict[tuple[int, int], Result]]:
    """Let every system decode every prompt ``repeats`` times; results by system and (prompt, repeat).

    Each decodes up to ``warm_up_tokens`` first, untimed: libraries allocate and choose kernels at their first
    run. Then all of them decode a prompt before the next one comes, and each time another one begins, so that
    none always runs after the same warm-up of the machine. Those that are apart decode it together: a machine
    that changes its speed for a second changes it for all of them.

    One of ``optional`` that fails is left out from then on, and ``missing`` gets the reason. With a
    ``budget`` the run stops after whole repeats when the next one may not fit, judged by the slowest so far.

    Raises:
        SkippedError: the budget wasn't enough for one repeat.
    """
    results: dict[str, dict[tuple[int, int], Result]] = {system.name: {} for system in systems}

    def attempt(system: Decoder[_Prompt, Result], prompt: _Prompt, tokens: int) -> Result | None:
        try:
            return system.decode(prompt, tokens)
        except Exception as error:
            if system.name not in optional or missing is None:
                raise
            missing[system.name] = f"{type(error).__name__}: {error}"
            del results[system.name]
            return None

    longest, left = 0.0, 0.0 if budget is None else budget.left
    for system in systems:
        attempt(system, prompts[0], min(max_new_tokens, warm_up_tokens))
    first = 0
    for repeat in range(repeats):
        if budget is not None:
            longest, left = max(longest, left - budget.left), budget.left
            if longest > left:
                break
        for number, prompt in enumerate(prompts):
            order = [one for one in (*systems[first:], *systems[:first]) if one.name in results]
            together = [system for system in order if getattr(system, "apart", False)]
            for system in order:
                if system in together[1:]:
                    continue
                time.sleep(pause_seconds)
                if system in together:
                    for one, outcome in _decode_together(together, prompt, max_new_tokens):
                        results[one.name][number, repeat] = outcome
                elif (result := attempt(system, prompt, max_new_tokens)) is not None:
                    results[system.name][number, repeat] = result
            first = (first + 1) % len(systems)
            speeds = ", ".join(f"{name} {done[number, repeat].speed}" for name, done in results.items())
            say(f"repeat {repeat + 1}/{repeats}, prompt {number + 1}/{len(prompts)}: {speeds}")
    if budget is not None and not any(results.values()):
        raise SkippedError(f"no time: a repeat takes {longest:.0f} s, and {budget.left:.0f} s are left")
    return results


def _decode_together(
    systems: Sequence[Any], prompt: object, max_new_tokens: int
) -> Iterator[tuple[Any, Any]]:
    """Let all decode a prompt, always the one that has the fewest tokens: they end at about the same time."""
    runs = [system.start(prompt, max_new_tokens) for system in systems]
    running = list(runs)
    while running:
        last = min(running, key=lambda run: run.tokens)
        if not last.advance():
            running.remove(last)
    return zip(systems, (run.outcome for run in runs), strict=True)
