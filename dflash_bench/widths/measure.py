"""``dflash-bench widths``: the number of draft tokens that adapts against fixed ones, over a mix of prompts.

All systems are this project's own, on the same weights, interleaved step by step where the backend allows it,
with the same text for each: greedy prompts have no choice, and sampled ones have a seed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from dflash_bench.interleave import Say, measure, silent
from dflash_bench.machine import load_average
from dflash_bench.plots import check_plot
from dflash_bench.prompts import encode_prompts, mixed_prompts
from dflash_bench.report import check_counts, conditions_of
from dflash_bench.systems.base import Outcome
from dflash_bench.systems.own import OwnRun, OwnSystem, checked_draft_tokens, drafted, own_systems
from dflash_bench.widths.plot import draw_widths
from dflash_bench.widths.report import WidthsReport
from dflash_rt.bundle.folder import Bundle
from dflash_rt.machine import physical_cores
from dflash_rt.request import check_count
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.text.prompts import Prompt

__all__ = ["run_widths"]


_Case: TypeAlias = tuple[Sequence[int], SamplingParams]


class _Sampling:
    """A system for prompts that come with their sampling."""

    def __init__(self, system: OwnSystem) -> None:
        self._system = system
        self.name, self.apart = system.name, system.apart

    def decode(self, case: _Case, max_new_tokens: int, /) -> Outcome:
        prompt, sampling = case
        return self._system.decode(prompt, max_new_tokens, sampling)

    def start(self, case: _Case, max_new_tokens: int, /) -> OwnRun:
        prompt, sampling = case
        return self._system.start(prompt, max_new_tokens, sampling)


def run_widths(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 128,
    repeats: int = 3,
    num_draft_tokens: Sequence[int] = (),
    backend: str = "onnxruntime",
    backend_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
) -> WidthsReport:
    """Decode a mix of prompts plainly, with fixed numbers of draft tokens, and with the number that adapts.

    Args as of :func:`dflash_bench.run.measure.run_bench`, but for:
        prompts: texts, chats or token ids, decoded greedily; ``None`` for the built-in mix, of which some are
            sampled.
        num_draft_tokens: fixed numbers to measure, each at least 1; empty for 1, 2, 3, 5, 7, 11, … and as
            many as the drafter drafts.

    Raises:
        RequestError: an argument is wrong, or matplotlib is missing for ``plot``.
        OutputError: the plot can't be written.
        DFlashError: the bundle or a prompt can't be used.
    """
    check_counts(max_new_tokens, repeats)
    say = progress or silent
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    counts = checked_draft_tokens(
        num_draft_tokens or _some_counts(opened.manifest.drafter.block_size), opened
    )
    threads = physical_cores() if threads is None else check_count("threads", threads)
    plot = None if plot is None else check_plot(plot)
    if prompts is None:
        mix = mixed_prompts(opened)
    else:
        mix = [(f"prompt {i}", prompt, SamplingParams()) for i, prompt in enumerate(prompts, 1)]
    with ExitStack() as stack:
        say(f"loading {opened.manifest.name}")
        systems = own_systems(opened, (0, *counts, "auto"), backend, backend_options, threads, stack)
        encoded = encode_prompts(systems[0].generator, [prompt for _, prompt, _ in mix], max_new_tokens)
        cases = [(ids, sampling) for ids, (_, _, sampling) in zip(encoded, mix, strict=True)]
        load_before = load_average()
        outcomes = measure(
            [_Sampling(system) for system in systems],
            cases,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            say=say,
        )
        costs = systems[-1].generator.step_costs
        assert costs is not None
        report = WidthsReport(
            conditions=conditions_of(opened, backend, threads, encoded, max_new_tokens, repeats, load_before),
            kinds=tuple(kind for kind, _, _ in mix),
            sampled=tuple(sampling.temperature > 0 for _, _, sampling in mix),
            outcomes=outcomes,
            num_draft_tokens={drafted(count): count for count in (0, *counts)},
            costs=costs,
        )
    if plot is not None:
        draw_widths(report, plot)
        say(f"wrote {plot}")
    return report


def _some_counts(block_size: int) -> list[int]:
    """Draft tokens of verify passes of 2, 3, 4, 6, 8, 12, 16, … rows, and of a whole block."""
    rows = (base << power for power in range(block_size.bit_length()) for base in (2, 3))
    return [*sorted(count - 1 for count in rows if count < block_size), block_size - 1]
