"""Measures a bundle's plain and drafted decoding, and baselines, in one interleaved run.

Ratios are taken between runs of the same prompt in the same repeat, so that what else the machine does slows
both sides. docs/reference/benchmark.md has the method and every number that comes out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dflash_bench.floor import measure_read_bandwidth, step_floor
from dflash_bench.interleave import Say, measure, silent
from dflash_bench.machine import load_average
from dflash_bench.plots import check_plot
from dflash_bench.prompts import default_prompts, encode_prompts
from dflash_bench.report import check_counts, conditions_of
from dflash_bench.run.plot import draw_plot
from dflash_bench.run.report import BASELINE, BenchReport
from dflash_bench.systems.base import BenchSetup, System
from dflash_bench.systems.own import checked_draft_tokens, drafted, own_systems
from dflash_bench.systems.registry import make_systems
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import RequestError
from dflash_rt.machine import physical_cores
from dflash_rt.request import check_count
from dflash_rt.text.prompts import Prompt

__all__ = ["run_bench"]


def run_bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    compare: Sequence[str] = (),
    baseline: str | os.PathLike[str] | Bundle | None = None,
    max_new_tokens: int = 128,
    repeats: int = 3,
    num_draft_tokens: Sequence[int] = (),
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
    """Measure a bundle's drafted decoding against its plain decoding, and both against baselines.

    Args:
        bundle: a bundle's folder, or an open bundle.
        prompts: texts, chats or token ids; ``None`` for a few built-in ones.
        compare: names of other systems to run (see :mod:`dflash_bench.systems.registry`): ``hf``,
            ``reference``, ``genai``, ``genai-int4``, or ``all``, which skips those that can't run here and
            says why.
        baseline: another bundle of the same vocabulary, such as the one that isn't quantised; it decodes
            plainly and drafted, too, in rows ``baseline-…``.
        max_new_tokens: tokens of an answer at most; at least 2, since the first is the prefill's.
        repeats: runs over all prompts.
        num_draft_tokens: numbers of drafted tokens to measure, each at least 1; empty for the bundle's own.
        backend: what runs the bundle.
        backend_options: options of that backend, as :class:`Generator` takes them.
        threads: CPU threads of every system; ``None`` for one per core that this process may use.
        target, drafter: checkpoints for systems that need them, as ``dflash_export.build`` takes them;
            ``None`` for the recipe's, or for the hub ids that the bundle records.
        recipe: the recipe that the bundle was built with.
        cache_folder: where converted models are kept; ``None`` for the user's cache.
        plot: PNG file to write.
        progress: takes lines about how far it is; ``None`` for silence.

    Raises:
        RequestError: an argument is wrong, or matplotlib is missing for ``plot``.
        BackendUnavailableError: what a system that was named needs isn't installed.
        OutputError: the plot can't be written.
        DFlashError: the bundle, a prompt or a checkpoint can't be used.
    """
    check_counts(max_new_tokens, repeats)
    say = progress or silent
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    counts = checked_draft_tokens(num_draft_tokens, opened)
    setup = BenchSetup(
        bundle=opened,
        threads=physical_cores() if threads is None else check_count("threads", threads),
        num_draft_tokens=counts,
        target=target,
        drafter=drafter,
        recipe=None if recipe is None else Path(recipe),
        cache_folder=None if cache_folder is None else Path(cache_folder),
        say=say,
    )
    plot = None if plot is None else check_plot(plot)
    with ExitStack() as stack:
        say(f"loading {opened.manifest.name}")
        run_with = (backend, backend_options, setup.threads, stack)
        own = own_systems(opened, (0, *counts), *run_with)
        encoded = encode_prompts(
            own[0].generator, default_prompts(opened) if prompts is None else prompts, max_new_tokens
        )
        second = None if baseline is None else _open_baseline(baseline, setup)
        if second is not None:
            of_second = own_systems(second, (0, *counts), *run_with, prefix=BASELINE)
            encode_prompts(of_second[0].generator, encoded, max_new_tokens)
            own += of_second
        others, skipped = make_systems(compare, setup)
        for other in others:
            stack.callback(other.close)
        systems: list[System] = [*own, *others]
        load_before = load_average()
        bandwidth = measure_read_bandwidth(setup.threads)
        outcomes = measure(systems, encoded, max_new_tokens=max_new_tokens, repeats=repeats, say=say)
        # Again, since other programs may have been busy the first time: it is a property of the machine.
        bandwidth = max(bandwidth, measure_read_bandwidth(setup.threads))
    floors = {drafted(count): step_floor(opened, count + 1) for count in (0, *counts)}
    report = BenchReport(
        conditions=conditions_of(
            opened, backend, setup.threads, encoded, max_new_tokens, repeats, load_before, second
        ),
        outcomes=outcomes,
        num_draft_tokens={s.name: s.num_draft_tokens for s in systems if s.num_draft_tokens is not None},
        floors={name: floor for name, floor in floors.items() if floor and floor.operations is not None},
        bytes_per_second=bandwidth,
        skipped=skipped,
    )
    if plot is not None:
        draw_plot(report, plot)
        say(f"wrote {plot}")
    return report


def _open_baseline(baseline: str | os.PathLike[str] | Bundle, setup: BenchSetup) -> Bundle:
    bundle = baseline if isinstance(baseline, Bundle) else Bundle.open(baseline)
    expected, found = (b.manifest.target.vocab_size for b in (setup.bundle, bundle))
    if expected != found:
        raise RequestError(
            "the baseline bundle has another vocabulary",
            found=f"{found} tokens in {bundle.root}",
            expected=f"{expected} tokens, since both get the same token ids",
            remedy="name a bundle of the same target",
        )
    checked_draft_tokens(setup.num_draft_tokens, bundle)
    return bundle
