"""Measures our plain and drafted decoding, and others beside them, in one interleaved run.

For each repeat and each prompt every contender decodes in turn, and each time another one begins; ours, where
their backend allows it, take turns step by step. Ratios are taken between runs of the same prompt in the same
repeat, so that what else the machine does slows both sides.
docs/reference/benchmark.md has the method and every number that comes out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeGuard, TypeVar

from dflash_bench.floor import StepFloor, measure_read_bandwidth, step_floor
from dflash_bench.machine import load_average, package_versions
from dflash_bench.prompts import default_prompts
from dflash_bench.run.report import BESIDE, PLAIN, BenchReport, Conditions
from dflash_bench.systems.base import (
    BenchSetup,
    Contender,
    OurContender,
    OurRun,
    Outcome,
    make_contenders,
)
from dflash_rt.backends import create_backend, takes_threads
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import PromptError, RequestError
from dflash_rt.files import utc_now
from dflash_rt.generator import Generator
from dflash_rt.machine import cpu_name, physical_cores
from dflash_rt.request import check_count
from dflash_rt.text.prompts import Prompt

__all__ = [
    "Decoder",
    "Say",
    "StepDecoder",
    "check_counts",
    "checked_widths",
    "conditions_of",
    "encode_prompts",
    "measure",
    "our_contenders",
    "run_bench",
]

Say: TypeAlias = Callable[[str], None]

_Prompt = TypeVar("_Prompt")
_Prompt_contra = TypeVar("_Prompt_contra", contravariant=True)

# Idle threads of the last contender's pool may spin for a few milliseconds into the next one's time.
_PAUSE_SECONDS = 0.02
_WARM_UP_TOKENS = 8


class Decoder(Protocol[_Prompt_contra]):
    """What :func:`measure` needs of a contender."""

    @property
    def name(self) -> str:
        """Name of its row."""

    def decode(self, prompt: _Prompt_contra, max_new_tokens: int, /) -> Outcome:
        """Decode until a stop token, or until there are ``max_new_tokens``."""


class StepDecoder(Decoder[_Prompt_contra], Protocol[_Prompt_contra]):
    """A contender that can stop between two steps while others run."""

    @property
    def apart(self) -> bool:
        """Whether it is to: whether nobody else has its buffers."""

    def start(self, prompt: _Prompt_contra, max_new_tokens: int, /) -> OurRun:
        """The same as :meth:`decode`, step by step."""


def run_bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    compare: Sequence[str] = (),
    beside: str | os.PathLike[str] | Bundle | None = None,
    max_new_tokens: int = 128,
    repeats: int = 3,
    draft_widths: Sequence[int] = (),
    backend: str = "onnxruntime",
    backend_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    target: str | None = None,
    drafter: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
) -> BenchReport:
    """Measure a bundle's drafted decoding against its plain decoding, and both against others.

    Args:
        bundle: a bundle's folder, or an open bundle.
        prompts: texts, chats or token ids; ``None`` for a few built-in ones.
        compare: names of others to run beside (see :mod:`dflash_bench.systems.base`): ``hf``, ``reference``,
            ``genai``, ``genai-int4``, or ``all``, which skips those that can't run here and says why.
        beside: another bundle of the same vocabulary, such as the one that isn't quantised; it decodes
            plainly and at each width, too, in rows ``beside-…``.
        max_new_tokens: tokens of an answer at most; at least 2, since the first is the prefill's.
        repeats: runs over all prompts.
        draft_widths: rows of a verify pass to measure, each at least 2; empty for the bundle's own.
        backend: what runs the bundle.
        backend_options: options of that backend, as :class:`Generator` takes them.
        threads: CPU threads of every contender; ``None`` for one per core that this process may use.
        target, drafter: checkpoints for contenders that need them, as ``dflash_export.build`` takes them;
            ``None`` for the recipe's, or for the hub ids that the bundle records.
        recipe: the recipe that the bundle was built with.
        cache_folder: where converted models are kept; ``None`` for the user's cache.
        plot: PNG file to write.
        progress: takes lines about how far it is; ``None`` for silence.

    Raises:
        RequestError: an argument is wrong, or matplotlib is missing for ``plot``.
        BackendUnavailableError: what a contender that was named needs isn't installed.
        OutputError: the plot can't be written.
        DFlashError: the bundle, a prompt or a checkpoint can't be used.
    """
    check_counts(max_new_tokens, repeats)
    say = progress or _silent
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    widths = checked_widths(draft_widths, opened)
    setup = BenchSetup(
        bundle=opened,
        threads=physical_cores() if threads is None else check_count("threads", threads),
        draft_widths=widths,
        target=target,
        drafter=drafter,
        recipe=None if recipe is None else Path(recipe),
        cache_folder=None if cache_folder is None else Path(cache_folder),
        say=say,
    )
    if plot is not None:
        from dflash_bench.run.plot import check_plot, draw_plot

        plot = check_plot(plot)
    with ExitStack() as stack:
        say(f"loading {opened.manifest.name}")
        ours = our_contenders(opened, (1, *widths), backend, backend_options, setup.threads, stack)
        second = None if beside is None else _open_beside(beside, setup)
        theirs = (
            []
            if second is None
            else our_contenders(
                second, (1, *widths), backend, backend_options, setup.threads, stack, prefix=BESIDE
            )
        )
        encoded = encode_prompts(
            ours[0].generator, default_prompts(opened) if prompts is None else prompts, max_new_tokens
        )
        if theirs:
            encode_prompts(theirs[0].generator, encoded, max_new_tokens)
        others, skipped = make_contenders(compare, setup)
        for other in others:
            stack.callback(other.close)
        contenders: list[Contender] = [*ours, *theirs, *others]
        load_before = load_average()
        bandwidth = measure_read_bandwidth(setup.threads)
        outcomes = measure(contenders, encoded, max_new_tokens=max_new_tokens, repeats=repeats, say=say)
        # Again, since other programs may have been busy the first time: it is a property of the machine.
        bandwidth = max(bandwidth, measure_read_bandwidth(setup.threads))
    report = BenchReport(
        conditions=conditions_of(
            opened, backend, setup.threads, encoded, max_new_tokens, repeats, load_before, second
        ),
        outcomes=outcomes,
        widths={c.name: c.width for c in contenders if c.width is not None},
        floors=_floors(opened, widths, bandwidth),
        skipped=skipped,
    )
    if plot is not None:
        draw_plot(report, plot)
        say(f"wrote {plot}")
    return report


def check_counts(max_new_tokens: int, repeats: int) -> None:
    """Raise RequestError unless that much can be measured."""
    check_count("repeats", repeats)
    if check_count("max_new_tokens", max_new_tokens) < 2:
        raise RequestError(
            "max_new_tokens is too small to measure decoding",
            found=max_new_tokens,
            expected="at least 2: the first token is the prefill's",
            remedy="pass more",
        )


def conditions_of(
    bundle: Bundle,
    backend: str,
    threads: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    repeats: int,
    load_before: float | None,
    beside: Bundle | None = None,
) -> Conditions:
    """What a run that has just ended was run with."""
    return Conditions(
        bundle=bundle.manifest.name,
        precision=bundle.manifest.precision,
        quantization=_quantization(bundle),
        beside=None if beside is None else _described(beside),
        backend=backend,
        threads=threads,
        prompt_tokens=tuple(map(len, prompts)),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        created=utc_now(),
        cpu=cpu_name(),
        packages=package_versions(),
        load_before=load_before,
        load_after=load_average(),
    )


def measure(
    contenders: Sequence[Decoder[_Prompt]],
    prompts: Sequence[_Prompt],
    *,
    max_new_tokens: int,
    repeats: int,
    say: Say | None = None,
    pause_seconds: float = _PAUSE_SECONDS,
) -> dict[str, dict[tuple[int, int], Outcome]]:
    """Let every contender decode every prompt ``repeats`` times; outcomes by contender and (prompt, repeat).

    Each decodes a few tokens first, untimed: libraries allocate and choose kernels at their first run. Then
    all of them decode a prompt before the next one comes, and each time another one begins, so that none
    always runs after the same warm-up of the machine. Those that are apart (:class:`StepDecoder`) decode it
    together: a machine that changes its speed for a second changes it for all of them.
    """
    say = say or _silent
    for contender in contenders:
        contender.decode(prompts[0], min(max_new_tokens, _WARM_UP_TOKENS))
    outcomes: dict[str, dict[tuple[int, int], Outcome]] = {contender.name: {} for contender in contenders}
    first = 0
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            order = (*contenders[first:], *contenders[:first])
            together = [contender for contender in order if _is_apart(contender)]
            for contender in order:
                if contender not in together:
                    time.sleep(pause_seconds)
                    outcomes[contender.name][number, repeat] = contender.decode(prompt, max_new_tokens)
                elif contender is together[0]:
                    time.sleep(pause_seconds)
                    for one, outcome in _decode_together(together, prompt, max_new_tokens):
                        outcomes[one.name][number, repeat] = outcome
            first = (first + 1) % len(contenders)
            rates = (_rate(name, done[number, repeat]) for name, done in outcomes.items())
            say(f"repeat {repeat + 1}/{repeats}, prompt {number + 1}/{len(prompts)}: {', '.join(rates)}")
    return outcomes


def _is_apart(contender: Decoder[_Prompt]) -> TypeGuard[StepDecoder[_Prompt]]:
    return getattr(contender, "apart", False)


def _decode_together(
    contenders: Sequence[StepDecoder[_Prompt]], prompt: _Prompt, max_new_tokens: int
) -> Iterator[tuple[StepDecoder[_Prompt], Outcome]]:
    """Let all decode a prompt, always the one that has the fewest tokens: they end at about the same time."""
    runs = [contender.start(prompt, max_new_tokens) for contender in contenders]
    running = list(runs)
    while running:
        last = min(running, key=lambda run: run.tokens)
        if not last.advance():
            running.remove(last)
    return zip(contenders, (run.outcome for run in runs), strict=True)


def checked_widths(widths: Sequence[int], bundle: Bundle) -> tuple[int, ...]:
    """Widths to measure, each once; without any the bundle's own. Raises RequestError."""
    block_size = bundle.manifest.drafter.block_size
    own = bundle.manifest.generation.num_draft_tokens + 1
    # A bundle may be set to plain decoding; drafting is what is measured here all the same.
    chosen = tuple(dict.fromkeys(widths)) or (own if own > 1 else block_size,)
    for width in chosen:
        if not 2 <= check_count("draft_widths", width) <= block_size:
            raise RequestError(
                "a draft width can't be measured",
                found=width,
                expected=f"2 to {block_size}, the drafter's block_size",
                remedy="choose one in that range; plain decoding, which is width 1, is always measured",
            )
    return chosen


def our_contenders(
    bundle: Bundle,
    widths: Sequence[int | Literal["auto"]],
    backend: str,
    backend_options: Mapping[str, Any] | None,
    threads: int,
    stack: ExitStack,
    *,
    prefix: str = "",
) -> list[OurContender]:
    """One of ours for each width, all on the same weights; ``stack`` closes them.

    Each has buffers of its own where the backend can share weights without sharing them, and where it
    can't all have the same.
    """
    first = create_backend(
        backend, bundle, threads=threads if takes_threads(backend) else None, options=backend_options
    )
    stack.callback(first.close)
    contenders = []
    for width in widths:
        shared = first.share_weights()
        own = first if shared is None else shared
        stack.callback(own.close)
        generator = Generator(bundle, own, num_draft_tokens="auto" if width == "auto" else width - 1)
        contenders.append(OurContender(generator, prefix, apart=shared is not None))
    return contenders


def _open_beside(beside: str | os.PathLike[str] | Bundle, setup: BenchSetup) -> Bundle:
    bundle = beside if isinstance(beside, Bundle) else Bundle.open(beside)
    mine, other = (b.manifest.target.vocab_size for b in (setup.bundle, bundle))
    if mine != other:
        raise RequestError(
            "the bundle beside has another vocabulary",
            found=f"{other} tokens in {bundle.root}",
            expected=f"{mine} tokens, since both get the same token ids",
            remedy="name a bundle of the same target",
        )
    checked_widths(setup.draft_widths, bundle)
    return bundle


def _quantization(bundle: Bundle) -> str | None:
    info = bundle.manifest.quantization
    if info is None:
        return None
    blocks = "" if info.block_size is None else f" in blocks of {info.block_size}"
    activations = "" if info.activations is None else f", activations {info.activations}"
    return f"{info.weights}{blocks}{activations}, head {info.head or bundle.manifest.precision}"


def _described(bundle: Bundle) -> str:
    parts = [bundle.manifest.precision, _quantization(bundle)]
    return f"{bundle.manifest.name} ({', '.join(part for part in parts if part)})"


def encode_prompts(generator: Generator, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of all prompts. Whatever a request would be refused for is found here, before the run."""
    if not prompts:
        raise PromptError(
            "there is no prompt to measure with",
            found="an empty list",
            expected="at least one prompt",
            remedy="pass some, or None for the built-in ones",
        )
    encoded = [generator.encode(prompt) for prompt in prompts]
    for ids in encoded:
        generator.stream(ids, max_new_tokens=max_new_tokens).close()
    return encoded


def _floors(bundle: Bundle, widths: Sequence[int], bandwidth: float) -> Mapping[str, StepFloor]:
    names = {PLAIN: 1, **{f"drafted-{width}": width for width in widths}}
    floors = {name: step_floor(bundle, width, bandwidth) for name, width in names.items()}
    return {name: floor for name, floor in floors.items() if floor is not None}


def _rate(name: str, outcome: Outcome) -> str:
    return f"{name} {outcome.tokens_per_second:.1f}" if outcome.measurable else f"{name} -"


def _silent(line: str) -> None:
    pass
