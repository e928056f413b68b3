"""Systems that decode a prompt: their protocol, their setup, their outcomes and their refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dflash_bench.interleave import Decoder, Say, silent
from dflash_rt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["BenchSetup", "Outcome", "System", "SystemFactory", "missing", "require_fp32"]


@dataclass(frozen=True)
class Outcome:
    """One prompt decoded once by one system.

    The first new token is the prefill's, for every system alike; steps decide the others.

    Attributes:
        token_ids: all new tokens, a stop token included.
        prefill_seconds: from the call to the first new token.
        decode_seconds: from the first new token to the last.
        steps: passes of the target after the prefill.
        accepted_per_step: drafts that the target confirmed in each step; ``None`` if that isn't known.
        stage_seconds: part of ``decode_seconds`` spent inside the backend's runs, by stage; ``None`` for
            systems that aren't this project's.
        drafted_per_step: tokens that each step drafted; ``None`` if that isn't known.
        step_seconds: of each step; ``None`` if that isn't known.
    """

    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: int
    accepted_per_step: tuple[int, ...] | None = None
    stage_seconds: Mapping[str, float] | None = None
    drafted_per_step: tuple[int, ...] | None = None
    step_seconds: tuple[float, ...] | None = None

    @property
    def decoded_tokens(self) -> int:
        """Tokens that steps decided: all but the first."""
        return max(len(self.token_ids) - 1, 0)

    @property
    def measurable(self) -> bool:
        """Whether there is a rate at all: an answer of one token has no step."""
        return self.steps > 0 and self.decoded_tokens > 0 and self.decode_seconds > 0

    @property
    def tokens_per_second(self) -> float:
        """Decode rate. Only of a measurable outcome."""
        return self.decoded_tokens / self.decode_seconds

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step. Only of a measurable outcome."""
        return self.decode_seconds / self.steps

    @property
    def speed(self) -> str:
        """Tokens per second, for a line of progress."""
        return f"{self.tokens_per_second:.1f}" if self.measurable else "-"


class System(Decoder[Sequence[int], Outcome], Protocol):
    """One way of decoding greedily. Whatever it loads is loaded when it is made: `decode` only decodes.

    Its name has the number of draft tokens where it drafts: ``"hf"``, ``"reference-3"``.
    """

    @property
    def num_draft_tokens(self) -> int | None:
        """Tokens that it drafts in each step; ``None`` if it doesn't draft."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


@dataclass(frozen=True)
class BenchSetup:
    """What a system is made from.

    Attributes:
        bundle: the bundle that is measured; the manifest says which target and drafter it came from.
        threads: CPU threads that every system has to use.
        num_draft_tokens: numbers of drafted tokens that are measured, each at least 1.
        target, drafter: where the checkpoints are, for systems that can't use a bundle; ``None``: ``recipe``
            or the manifest says.
        recipe: the recipe that the bundle was built with.
        cache_folder: where a system keeps what it had to convert; ``None``: the user's cache.
        say: takes lines about what is going on.
        shared: what several systems need and load once, by a name that they agree on.
    """

    bundle: Bundle
    threads: int
    num_draft_tokens: tuple[int, ...]
    target: str | None = None
    drafter: str | None = None
    recipe: Path | None = None
    cache_folder: Path | None = None
    say: Say = silent
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, sorted: the bundle's."""
        return tuple(sorted(self.bundle.manifest.generation.stop_token_ids))


SystemFactory: TypeAlias = Callable[[BenchSetup], Sequence[System]]
"""Makes one system, or one for each number of draft tokens. Raises a DFlashError when it can't."""


def require_fp32(setup: BenchSetup, name: str) -> None:
    """Raise BackendUnavailableError for a bundle of another precision."""
    precision = setup.bundle.manifest.precision
    if precision != "fp32":
        raise BackendUnavailableError(
            f"{name} decodes in fp32 and the bundle doesn't",
            found=f"a bundle of precision {precision}",
            expected="fp32: anything else would compare two different things",
            remedy=f"leave {name} out of --compare, or build the bundle with --precision fp32",
        )


def missing(name: str, package: str, remedy: str) -> BackendUnavailableError:
    """The error for a system whose package isn't installed."""
    return BackendUnavailableError(
        f"{name} can't be compared with",
        found=f"{package} isn't installed",
        expected=f"the package {package}",
        remedy=f"{remedy}; or leave it out of --compare",
    )
