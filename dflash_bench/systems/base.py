"""What a benchmark compares: a small protocol, our own two ways of decoding, and how others are found.

Others come from installed packages, through entry points of the group ``dflash_rt.contenders``::

    [options.entry_points]
    dflash_rt.contenders =
        hf = dflash_bench.systems.baselines:make_hf

where ``make_hf`` is a :data:`ContenderFactory`. That is how this package compares itself with PyTorch without
ever importing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from dflash_rt.errors import BackendUnavailableError, DFlashError, RequestError
from dflash_rt.generator import Generator
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.stream import GenerationResult, TokenStream

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = [
    "ALL",
    "ENTRY_POINT_GROUP",
    "BenchSetup",
    "Contender",
    "ContenderFactory",
    "OurContender",
    "OurRun",
    "Outcome",
    "find_factories",
    "make_contenders",
]

ENTRY_POINT_GROUP = "dflash_rt.contenders"
ALL = "all"
"""In place of names: every contender that is installed and can be made; the others are skipped."""


@dataclass(frozen=True)
class Outcome:
    """One prompt decoded once by one contender.

    The first new token is the prefill's, for every contender alike; steps decide the others.

    Attributes:
        token_ids: all new tokens, a stop token included.
        prefill_seconds: from the call to the first new token.
        decode_seconds: from the first new token to the last.
        steps: passes of the target after the prefill.
        accepted_per_step: drafts that the target confirmed in each step; ``None`` if that isn't known.
        stage_seconds: part of ``decode_seconds`` spent inside the backend's runs, by stage; ``None`` for
            contenders that aren't ours.
        width_per_step: rows of the verify pass of each step; ``None`` if that isn't known.
    """

    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: int
    accepted_per_step: tuple[int, ...] | None = None
    stage_seconds: Mapping[str, float] | None = None
    width_per_step: tuple[int, ...] | None = None

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


class Contender(Protocol):
    """One way of decoding greedily. Whatever it loads is loaded when it is made: `decode` only decodes."""

    @property
    def name(self) -> str:
        """Name of its row, such as ``"hf"``; with its width where it has one, such as ``"reference-4"``."""

    @property
    def width(self) -> int | None:
        """Rows of a verify pass; ``None`` if it doesn't draft."""

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Outcome:
        """Decode until one of the setup's stop tokens, or until there are ``max_new_tokens``."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


def _silent(line: str) -> None:
    del line


@dataclass(frozen=True)
class BenchSetup:
    """What a contender is made from.

    Attributes:
        bundle: the bundle that is measured; the manifest says which target and drafter it came from.
        threads: CPU threads that every contender has to use.
        draft_widths: widths that are measured, each at least 2.
        target, drafter: where the checkpoints are, for what can't use a bundle; ``None``: ``recipe`` or the
            manifest says.
        recipe: the recipe that the bundle was built with.
        cache_folder: where a contender keeps what it had to convert; ``None``: the user's cache.
        say: takes lines about what is going on.
        shared: what several contenders need and load once, by a name that they agree on.
    """

    bundle: Bundle
    threads: int
    draft_widths: tuple[int, ...]
    target: str | None = None
    drafter: str | None = None
    recipe: Path | None = None
    cache_folder: Path | None = None
    say: Callable[[str], None] = _silent
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, sorted: the bundle's."""
        return tuple(sorted(self.bundle.manifest.generation.stop_token_ids))


ContenderFactory: TypeAlias = Callable[[BenchSetup], Sequence[Contender]]
"""Makes one contender, or one for each draft width. Raises a DFlashError when it can't."""


class OurContender:
    """This package's own decoding: plain at width 1, drafted above, or adaptive.

    ``generator``'s ``num_draft_tokens`` decides. ``prefix`` comes before the name. ``apart`` says that no
    other contender has its backend: several of those may be in the middle of a prompt at once.
    """

    def __init__(self, generator: Generator, prefix: str = "", *, apart: bool = False) -> None:
        self.generator = generator
        self.apart = apart
        rows = generator.limits.num_draft_tokens + 1
        self.width = rows if rows > 1 else None
        self.name = f"drafted-{rows}" if rows > 1 else "plain"
        if generator.limits.adaptive:
            self.name = "adaptive"
        self.name = prefix + self.name

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Outcome:
        """See :class:`Contender`."""
        # Greedy, whatever the bundle's own defaults are: every contender has to find the same tokens.
        return self.sample(prompt_ids, max_new_tokens, SamplingParams())

    def sample(self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: SamplingParams) -> Outcome:
        """The same with a sampling of one's own; with a seed, all of ours find the same tokens."""
        run = self.start(prompt_ids, max_new_tokens, sampling)
        while run.advance():
            pass
        return run.outcome

    def start(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: SamplingParams | None = None
    ) -> OurRun:
        """The same step by step."""
        greedy = SamplingParams()
        return OurRun(
            self.generator.stream(
                list(prompt_ids), max_new_tokens=max_new_tokens, sampling=sampling or greedy
            )
        )

    def close(self) -> None:
        """Close the generator, and its backend with it."""
        self.generator.close()


class OurRun:
    """A prompt that one of ours decodes step by step. Only its own steps count as its time."""

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
        """What it came to, once there are no more steps."""
        return _outcome(self._stream.result)


def _outcome(result: GenerationResult) -> Outcome:
    stats = result.stats
    return Outcome(
        token_ids=result.token_ids,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=stats.decode_seconds,
        steps=stats.steps,
        accepted_per_step=stats.accepted_per_step,
        stage_seconds=stats.stage_seconds,
        width_per_step=tuple(drafts + 1 for drafts in stats.drafted_per_step),
    )


def find_factories(names: Iterable[str]) -> dict[str, EntryPoint]:
    """Entry points by name; for :data:`ALL` every one there is.

    Raises:
        RequestError: a name that no installed package provides.
    """
    known = {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=_name)}
    wanted = list(dict.fromkeys(names))
    if ALL in wanted:
        wanted = [*(name for name in wanted if name != ALL), *(name for name in known if name not in wanted)]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise RequestError(
            "there is nothing of that name to compare with",
            found=", ".join(map(repr, unknown)),
            expected=", ".join([*known, ALL])
            if known
            else f"a package with entry points {ENTRY_POINT_GROUP}",
            remedy="check the spelling; hf, reference and genai come with dflash-export once it is installed",
        )
    return {name: known[name] for name in wanted}


def make_contenders(compare: Sequence[str], setup: BenchSetup) -> tuple[list[Contender], dict[str, str]]:
    """Make what ``compare`` names, and say why some were left out.

    A contender asked for by name has to work; one that came with :data:`ALL` may be skipped. Returns the
    contenders, and the reasons of those skipped by name.

    Raises:
        RequestError: an unknown name.
        DFlashError: a contender asked for by name can't be made; those made before it are closed.
    """
    made: list[Contender] = []
    skipped: dict[str, str] = {}
    for name, entry in find_factories(compare).items():
        setup.say(f"loading {name}")
        try:
            made += _load(name, entry)(setup)
        except DFlashError as error:
            if name in compare:
                for contender in made:
                    contender.close()
                raise
            skipped[name] = _in_one_line(error)
            setup.say(f"{name} is skipped: {skipped[name]}")
    return made, skipped


def _name(entry: EntryPoint) -> str:
    return entry.name


def _load(name: str, entry: EntryPoint) -> ContenderFactory:
    try:
        return cast(ContenderFactory, entry.load())
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(
            f"{name} can't be imported",
            found=error,
            expected=f"what its package promises: {entry.value}",
            remedy="install what is missing; for hf and reference: pip install 'dflash-export[export]'",
        ) from error


def _in_one_line(error: DFlashError) -> str:
    found = error.problem.found
    return error.problem.what + (f" ({' '.join(found.split())})" if found else "")
