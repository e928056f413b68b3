"""This project's own decoding: plain, drafted, or adaptive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from dflash_bench.systems.base import Outcome
from dflash_rt.backends import create_backend, takes_threads
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import RequestError
from dflash_rt.generator import Generator
from dflash_rt.request import check_count
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.stream import TokenStream

__all__ = ["ADAPTIVE", "PLAIN", "OwnRun", "OwnSystem", "checked_draft_tokens", "drafted", "own_systems"]

PLAIN = "plain"
"""Plain decoding of the bundle: always measured, and what the tokens of all others are compared with."""

ADAPTIVE = "adaptive"


def drafted(num_draft_tokens: int) -> str:
    """The name of the system that drafts that many tokens in each step; ``plain`` for none."""
    return f"drafted-{num_draft_tokens}" if num_draft_tokens else PLAIN


class OwnSystem:
    """A bundle's generator.

    Its ``num_draft_tokens`` decides what is drafted. ``prefix`` comes before the name. ``apart`` says that no
    other system has its backend: several of those may be in the middle of a prompt at once.
    """

    def __init__(self, generator: Generator, prefix: str = "", *, apart: bool = False) -> None:
        self.generator = generator
        self.apart = apart
        count = generator.limits.num_draft_tokens
        self.num_draft_tokens = count or None
        self.name = prefix + (ADAPTIVE if generator.limits.adaptive else drafted(count))

    def decode(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingParams | None = None, /
    ) -> Outcome:
        """See :class:`~dflash_bench.systems.base.System`; with a seed, all systems find the same tokens."""
        run = self.start(prompt, max_new_tokens, sampling)
        while run.advance():
            pass
        return run.outcome

    def start(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingParams | None = None, /
    ) -> OwnRun:
        """The same step by step."""
        # Greedy, whatever the bundle's own defaults are: every system has to find the same tokens.
        sampling = sampling or SamplingParams()
        return OwnRun(self.generator.stream(list(prompt), max_new_tokens=max_new_tokens, sampling=sampling))

    def close(self) -> None:
        """Close the generator, and its backend with it."""
        self.generator.close()


class OwnRun:
    """A prompt that is decoded step by step. Only its own steps count as its time."""

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream
        self.tokens = 0
        """New tokens so far."""

    def advance(self) -> bool:
        """Take the prefill or the next step; whether there was one."""
        chunk = next(self._stream, None)
        if chunk is None:
            return False
        self.tokens += len(chunk.token_ids)
        return True

    @property
    def outcome(self) -> Outcome:
        """The result, once there are no more steps."""
        result, stats = self._stream.result, self._stream.result.stats
        return Outcome(
            token_ids=result.token_ids,
            prefill_seconds=stats.prefill_seconds,
            decode_seconds=stats.decode_seconds,
            steps=stats.steps,
            accepted_per_step=stats.accepted_per_step,
            stage_seconds=stats.stage_seconds,
            drafted_per_step=stats.drafted_per_step,
        )


def checked_draft_tokens(counts: Sequence[int], bundle: Bundle) -> tuple[int, ...]:
    """Numbers of draft tokens to measure, each once; without any the bundle's own. Raises RequestError."""
    most = bundle.manifest.drafter.block_size - 1
    # A bundle may be set to plain decoding; drafting is what is measured here all the same.
    chosen = tuple(dict.fromkeys(counts)) or (bundle.manifest.generation.num_draft_tokens or most,)
    for count in chosen:
        if check_count("num_draft_tokens", count) > most:
            raise RequestError(
                "a number of draft tokens can't be measured",
                found=count,
                expected=f"1 to {most}, what the drafter drafts at most",
                remedy="choose one in that range; plain decoding is always measured",
            )
    return chosen


def own_systems(
    bundle: Bundle,
    num_draft_tokens: Sequence[int | Literal["auto"]],
    backend: str,
    backend_options: Mapping[str, Any] | None,
    threads: int,
    stack: ExitStack,
    *,
    prefix: str = "",
) -> list[OwnSystem]:
    """A system for each number of draft tokens (0 is plain), all on the same weights; ``stack`` closes them.

    Each has buffers of its own where the backend can share weights without sharing them; elsewhere all have
    the same.
    """
    first = create_backend(
        backend, bundle, threads=threads if takes_threads(backend) else None, options=backend_options
    )
    stack.callback(first.close)
    systems = []
    for count in num_draft_tokens:
        sharing = first.share_weights()
        own = first if sharing is None else sharing
        stack.callback(own.close)
        generator = Generator(bundle, own, num_draft_tokens=count)
        systems.append(OwnSystem(generator, prefix, apart=sharing is not None))
    return systems
