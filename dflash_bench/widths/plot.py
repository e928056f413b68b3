"""The picture of ``dflash-bench widths``: costs, acceptance, chosen widths, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dflash_bench.plots import INK, new_figure, save, tidy
from dflash_bench.systems.own import ADAPTIVE, PLAIN
from dflash_bench.widths.report import WidthsReport

__all__ = ["draw_widths"]

_OWN, _OTHER = "#23577a", "#ef9234"


def draw_widths(report: WidthsReport, path: Path) -> None:
    """Draw a report and write it as PNG; a file that is there is replaced. Raises OutputError."""
    prompts = 1 + 0.36 * len(report.kinds)
    figure = new_figure(13, 3.6 + prompts, report.conditions)
    (costs, accepted), (chosen, result) = figure.subplots(2, 2, height_ratios=(3.2, 0.4 + prompts))
    _draw_costs(costs, report)
    _draw_accepted(accepted, report)
    _draw_chosen(chosen, report)
    _draw_result(result, report)
    save(figure, path)


def _draw_costs(axes: Any, report: WidthsReport) -> None:
    counts = range(report.costs.widest)
    axes.plot(counts, report.costs.relative, "o-", color=_OWN, label="measured at load")
    fixed = report.num_draft_tokens.items()
    measured = {count: cost for name, count in fixed if (cost := report.step_cost(name))}
    axes.plot(
        list(measured), [c.median for c in measured.values()], "x", color=_OTHER, label="in this run, median"
    )
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes, "Cost of a step, in plain steps", grid="y", x="draft tokens")


def _draw_accepted(axes: Any, report: WidthsReport) -> None:
    widest = report.widest
    for name, color in ((widest, _OTHER), (ADAPTIVE, _OWN)):
        percent = [100 * share for share in report.accepted(name)]
        axes.plot(range(1, len(percent) + 1), percent, "o-", color=color, label=name)
    axes.set_xticks(range(1, report.costs.widest))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    tidy(
        axes,
        "Drafts accepted, by position",
        grid="y",
        x="position of the draft after the anchor",
        y="% of the steps that drafted it",
    )


def _draw_chosen(axes: Any, report: WidthsReport) -> None:
    """A bar for each prompt, split by draft tokens: the more, the darker."""
    from matplotlib import colormaps

    counts = list(report.chosen())
    shades = colormaps["Blues"]
    for row in range(len(report.kinds)):
        begin, shares = 0.0, report.chosen(row)
        for count in counts:
            share = 100 * shares.get(count, 0.0)
            shade = shades(0.15 + 0.8 * count / max(report.costs.widest - 1, 1))
            axes.barh(
                row, share, left=begin, height=0.7, color=shade, label=f"{count} drafts" if not row else None
            )
            begin += share
    _prompt_axis(axes, report)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9)
    tidy(axes, "Draft tokens chosen", grid="x", x="% of steps")


def _draw_result(axes: Any, report: WidthsReport) -> None:
    """Adaptive over plain by prompt; with it the fixed number that is best over all prompts."""
    over_plain, best = report.over_plain, report.best_fixed
    for row, kind in enumerate(report.kinds):
        plain, fixed = report.rate(PLAIN, row), report.rate(best, row)
        if kind in over_plain:
            axes.barh(row, over_plain[kind], height=0.7, color=_OWN, label=None if row else ADAPTIVE)
            axes.text(0.02, row, f"{over_plain[kind]:.2f}", va="center", fontsize=9, color="white")
        if plain and fixed:
            axes.plot(fixed / plain, row, "D", color=_OTHER, label=None if row else f"{best}, best fixed")
    axes.axvline(1.0, color=INK, linewidth=0.8)
    _prompt_axis(axes, report)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)
    tidy(axes, "Tokens per second over plain decoding", grid="x")


def _prompt_axis(axes: Any, report: WidthsReport) -> None:
    axes.set_yticks(range(len(report.kinds)), report.kinds)
    axes.set_ylim(len(report.kinds) - 0.4, -0.6)
