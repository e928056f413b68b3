"""``dflash-rt bench --widths``: the width that adapts against every fixed width, over a mix of prompts.

All contenders are our own, on the same weights. The run is interleaved as in :mod:`dflash_bench.run.measure`,
step by step where the backend allows it, with the same text for each: greedy prompts have no choice, and
sampled ones have a seed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dflash_bench.machine import load_average
from dflash_bench.prompts import mixed_prompts
from dflash_bench.run.measure import (
    Say,
    check_counts,
    checked_widths,
    conditions_of,
    encode_prompts,
    measure,
    our_contenders,
)
from dflash_bench.systems.base import OurContender, OurRun, Outcome
from dflash_bench.widths.report import WidthsReport
from dflash_rt.bundle.folder import Bundle
from dflash_rt.machine import physical_cores
from dflash_rt.request import check_count
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.text.prompts import Prompt

__all__ = ["run_widths"]


@dataclass(frozen=True)
class _Case:
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


class _Ours:
    """One of ours, for prompts that come with their sampling."""

    def __init__(self, contender: OurContender) -> None:
        self._contender = contender
        self.name = contender.name
        self.apart = contender.apart

    def decode(self, case: _Case, max_new_tokens: int, /) -> Outcome:
        return self._contender.sample(case.prompt_ids, max_new_tokens, case.sampling)

    def start(self, case: _Case, max_new_tokens: int, /) -> OurRun:
        return self._contender.start(case.prompt_ids, max_new_tokens, case.sampling)


def run_widths(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 128,
    repeats: int = 3,
    draft_widths: Sequence[int] = (),
    backend: str = "onnxruntime",
    backend_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
) -> WidthsReport:
    """Decode a mix of prompts plainly, at fixed widths, and at the width that adapts.

    Args:
        bundle: a bundle's folder, or an open bundle.
        prompts: texts, chats or token ids, decoded greedily; ``None`` for the built-in mix, of which some are
            sampled.
        max_new_tokens: tokens of an answer at most; at least 2.
        repeats: runs over all prompts.
        draft_widths: fixed widths to measure, each at least 2; empty for 2, 3, 4, 6, 8, 12, …
            and the block size.
        backend: what runs the bundle.
        backend_options: options of that backend, as :class:`Generator` takes them.
        threads: CPU threads; ``None`` for one per core that this process may use.
        plot: PNG file to write.
        progress: takes lines about how far it is; ``None`` for silence.

    Raises:
        RequestError: an argument is wrong, or matplotlib is missing for ``plot``.
        OutputError: the plot can't be written.
        DFlashError: the bundle or a prompt can't be used.
    """
    check_counts(max_new_tokens, repeats)
    say = progress or _silent
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    widths = checked_widths(draft_widths or _some_widths(opened.manifest.drafter.block_size), opened)
    threads = physical_cores() if threads is None else check_count("threads", threads)
    if plot is not None:
        from dflash_bench.run.plot import check_plot

        plot = check_plot(plot)
    if prompts is None:
        mix = mixed_prompts(opened)
    else:
        mix = [(f"prompt {i}", prompt, SamplingParams()) for i, prompt in enumerate(prompts, 1)]
    with ExitStack() as stack:
        say(f"loading {opened.manifest.name}")
        contenders = our_contenders(opened, (1, *widths, "auto"), backend, backend_options, threads, stack)
        encoded = encode_prompts(contenders[0].generator, [prompt for _, prompt, _ in mix], max_new_tokens)
        cases = [_Case(tuple(ids), sampling) for ids, (_, _, sampling) in zip(encoded, mix, strict=True)]
        load_before = load_average()
        outcomes = measure(
            [_Ours(contender) for contender in contenders],
            cases,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            say=say,
        )
        costs = contenders[-1].generator.step_costs
        assert costs is not None
        report = WidthsReport(
            conditions=conditions_of(opened, backend, threads, encoded, max_new_tokens, repeats, load_before),
            kinds=tuple(kind for kind, _, _ in mix),
            sampled=tuple(sampling.temperature > 0 for _, _, sampling in mix),
            outcomes=outcomes,
            widths={"plain": 1, **{f"drafted-{width}": width for width in widths}},
            costs=costs,
        )
    if plot is not None:
        from dflash_bench.widths.plot import draw_widths

        draw_widths(report, plot)
        say(f"wrote {plot}")
    return report


def _silent(line: str) -> None:
    pass


def _some_widths(block_size: int) -> list[int]:
    """2, 3, 4, 6, 8, 12, 16, … below the block size, and the block size."""
    steps = (base << power for power in range(block_size.bit_length()) for base in (2, 3))
    return [*sorted(width for width in steps if width < block_size), block_size]
