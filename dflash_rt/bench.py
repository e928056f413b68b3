"""Measures our plain and drafted decoding, and others beside them, in one interleaved run.

For each repeat and each prompt every contender decodes in turn, and each time another one begins. Ratios are
taken between runs of the same prompt in the same repeat, so that what else the machine does slows both sides.
docs/benchmark.md has the method and every number that comes out.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dflash_rt._version import __version__
from dflash_rt.backends import create_backend
from dflash_rt.bench_contenders import BenchSetup, Contender, OurContender, Outcome, make_contenders
from dflash_rt.bench_floor import StepFloor, measure_read_bandwidth, physical_cores, step_floor
from dflash_rt.bench_report import PLAIN, BenchReport, Conditions
from dflash_rt.bundle import Bundle
from dflash_rt.errors import PromptError, RequestError
from dflash_rt.generator import Generator
from dflash_rt.prompts import Prompt
from dflash_rt.request import check_count

__all__ = ["default_prompts", "measure", "run_bench"]

Say: TypeAlias = Callable[[str], None]

# Idle threads of the last contender's pool may spin for a few milliseconds into the next one's time.
_PAUSE_SECONDS = 0.02
_WARM_UP_TOKENS = 8

_QUESTIONS = (
    "Why is the sky blue?",
    "Write an email to my landlord about a broken window.",
    "Explain how a bicycle stays upright.",
    "List five things to take on a hike, with a reason for each.",
)
_RANDOM_PROMPT_TOKENS = 32
_PACKAGES = ("dflash", "numpy", "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def run_bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    compare: Sequence[str] = (),
    max_new_tokens: int = 128,
    repeats: int = 3,
    draft_widths: Sequence[int] = (),
    backend: str = "onnxruntime",
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
        compare: names of others to run beside (see :mod:`dflash_rt.bench_contenders`): ``hf``, ``reference``,
            ``genai``, or ``all``, which skips those that can't run here and says why.
        max_new_tokens: tokens of an answer at most; at least 2, since the first is the prefill's.
        repeats: runs over all prompts.
        draft_widths: rows of a verify pass to measure, each at least 2; empty for the bundle's own.
        backend: what runs the bundle.
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
    check_count("repeats", repeats)
    if check_count("max_new_tokens", max_new_tokens) < 2:
        raise RequestError(
            "max_new_tokens is too small to measure decoding",
            found=max_new_tokens,
            expected="at least 2: the first token is the prefill's",
            todo="pass more",
        )
    say = progress or _silent
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    widths = _checked_widths(draft_widths, opened)
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
        from dflash_rt.bench_plot import check_plot, draw_plot

        plot = check_plot(plot)
    with ExitStack() as stack:
        say(f"loading {opened.manifest.name}")
        ours = _our_contenders(setup, backend, stack)
        encoded = _encode(ours[0], default_prompts(opened) if prompts is None else prompts, max_new_tokens)
        others, skipped = make_contenders(compare, setup)
        for other in others:
            stack.callback(other.close)
        contenders: list[Contender] = [*(OurContender(generator) for generator in ours), *others]
        load_before = _load_average()
        bandwidth = measure_read_bandwidth(setup.threads)
        outcomes = measure(contenders, encoded, max_new_tokens=max_new_tokens, repeats=repeats, say=say)
        # Again, since other programs may have been busy the first time: it is a property of the machine.
        bandwidth = max(bandwidth, measure_read_bandwidth(setup.threads))
    report = BenchReport(
        conditions=Conditions(
            bundle=opened.manifest.name,
            precision=opened.manifest.precision,
            backend=backend,
            threads=setup.threads,
            prompt_tokens=tuple(map(len, encoded)),
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            cpu=_cpu_name(),
            packages=_versions(),
            load_before=load_before,
            load_after=_load_average(),
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


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    say: Say | None = None,
    pause_seconds: float = _PAUSE_SECONDS,
) -> dict[str, dict[tuple[int, int], Outcome]]:
    """Let every contender decode every prompt ``repeats`` times; outcomes by contender and (prompt, repeat).

    Each decodes a few tokens first, untimed: libraries allocate and choose kernels at their first run. Then
    all of them decode a prompt before the next one comes, and each time another one begins, so that none
    always runs after the same warm-up of the machine.
    """
    say = say or _silent
    for contender in contenders:
        contender.decode(prompts[0], min(max_new_tokens, _WARM_UP_TOKENS))
    outcomes: dict[str, dict[tuple[int, int], Outcome]] = {contender.name: {} for contender in contenders}
    first = 0
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            for contender in (*contenders[first:], *contenders[:first]):
                time.sleep(pause_seconds)
                outcomes[contender.name][number, repeat] = contender.decode(prompt, max_new_tokens)
            first = (first + 1) % len(contenders)
            rates = (_rate(name, done[number, repeat]) for name, done in outcomes.items())
            say(f"repeat {repeat + 1}/{repeats}, prompt {number + 1}/{len(prompts)}: {', '.join(rates)}")
    return outcomes


def default_prompts(bundle: Bundle) -> list[Prompt]:
    """A few prompts that suit a bundle: chats, texts, or random ids if there is no tokenizer."""
    tokenizer = bundle.manifest.tokenizer
    if tokenizer is None:
        numbers = np.random.default_rng(0).integers(
            bundle.manifest.target.vocab_size, size=(len(_QUESTIONS), _RANDOM_PROMPT_TOKENS)
        )
        return [list(map(int, row)) for row in numbers]
    if tokenizer.chat_template is None:
        return list(_QUESTIONS)
    return [[{"role": "user", "content": question}] for question in _QUESTIONS]


def _checked_widths(widths: Sequence[int], bundle: Bundle) -> tuple[int, ...]:
    block_size = bundle.manifest.drafter.block_size
    own = bundle.manifest.generation.draft_width
    # A bundle may be set to plain decoding; drafting is what is measured here all the same.
    chosen = tuple(dict.fromkeys(widths)) or (own if own > 1 else block_size,)
    for width in chosen:
        if not 2 <= check_count("draft_widths", width) <= block_size:
            raise RequestError(
                "a draft width can't be measured",
                found=width,
                expected=f"2 to {block_size}, the drafter's block_size",
                todo="choose one in that range; plain decoding, which is width 1, is always measured",
            )
    return chosen


def _our_contenders(setup: BenchSetup, backend: str, stack: ExitStack) -> list[Generator]:
    """Generators for plain decoding and each width, on one backend: the same sessions and caches for all."""
    shared = create_backend(backend, setup.bundle, threads=setup.threads)
    stack.callback(shared.close)
    return [Generator(setup.bundle, shared, draft_width=width) for width in (1, *setup.draft_widths)]


def _encode(generator: Generator, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of all prompts. Whatever a request would be refused for is found here, before the run."""
    if not prompts:
        raise PromptError(
            "there is no prompt to measure with",
            found="an empty list",
            expected="at least one prompt",
            todo="pass some, or None for the built-in ones",
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


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Versions of what may have taken part, as far as installed."""
    found = {"dflash-rt": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
