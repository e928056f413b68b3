"""The picture of ``dflash-rt bench --widths``: costs, acceptance, chosen widths, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dflash_bench.run.plot import cannot_write, tidy
from dflash_bench.widths.report import ADAPTIVE, WidthsReport

__all__ = ["draw_widths"]

_OURS, _OTHER, _INK = "#23577a", "#ef9234", "#222222"


def draw_widths(report: WidthsReport, path: Path) -> None:
    """Draw a report and write it as PNG; a file that is there is replaced. Raises OutputError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6 + 0.36 * len(report.kinds)), layout="constrained", facecolor="white")
    (costs, accepted), (chosen, result) = figure.subplots(
        2, 2, height_ratios=(3.2, 1.4 + 0.36 * len(report.kinds))
    )
    conditions = report.conditions
    figure.suptitle(
        f"{conditions.bundle} ({conditions.precision}) on {conditions.backend}, {conditions.threads} threads",
        fontsize=12,
        color=_INK,
    )
    _draw_costs(costs, report)
    _draw_accepted(accepted, report)
    _draw_chosen(chosen, report)
    _draw_result(result, report)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise cannot_write(path, error) from error


def _draw_costs(axes: Any, report: WidthsReport) -> None:
    axes.plot(
        range(1, report.costs.widest + 1), report.costs.relative, "o-", color=_OURS, label="measured at load"
    )
    measured = {width: cost for name, width in report.widths.items() if (cost := report.step_cost(name))}
    axes.plot(
        list(measured), [c.median for c in measured.values()], "x", color=_OTHER, label="in this run, median"
    )
    axes.set_title("Cost of a step, in plain steps", fontsize=11, color=_INK)
    axes.set_xlabel("width: rows of a verify pass")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes, grid="y")


def _draw_accepted(axes: Any, report: WidthsReport) -> None:
    widest = max(report.widths, key=lambda name: report.widths[name])
    for name, color in ((widest, _OTHER), (ADAPTIVE, _OURS)):
        percent = [100 * share for share in report.accepted(name)]
        axes.plot(range(1, len(percent) + 1), percent, "o-", color=color, label=name)
    axes.set_title("Drafts accepted, by position", fontsize=11, color=_INK)
    axes.set_xlabel("position of the draft after the anchor")
    axes.set_ylabel("% of the steps that drafted it")
    axes.set_xticks(range(1, report.costs.widest))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes, grid="y")


def _draw_chosen(axes: Any, report: WidthsReport) -> None:
    """A bar for each prompt, split by width: the wider, the darker."""
    from matplotlib import colormaps

    widths = list(report.chosen())
    shades = colormaps["Blues"]
    for row in range(len(report.kinds)):
        begin, shares = 0.0, report.chosen(row)
        for width in widths:
            share = 100 * shares.get(width, 0.0)
            shade = shades(0.15 + 0.8 * (width - 1) / max(report.costs.widest - 1, 1))
            axes.barh(
                row, share, left=begin, height=0.7, color=shade, label=f"width {width}" if not row else None
            )
            begin += share
    axes.set_title("Widths chosen", fontsize=11, color=_INK)
    axes.set_xlabel("% of steps")
    _prompt_axis(axes, report)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9)
    tidy(axes, grid="x")


def _draw_result(axes: Any, report: WidthsReport) -> None:
    """Adaptive over plain by prompt; beside it the fixed width that is best over all prompts."""
    over_plain, best = report.over_plain, report.best_fixed
    for row, kind in enumerate(report.kinds):
        plain, fixed = report.rate("plain", row), report.rate(best, row)
        if kind in over_plain:
            axes.barh(row, over_plain[kind], height=0.7, color=_OURS, label=None if row else ADAPTIVE)
            axes.text(0.02, row, f"{over_plain[kind]:.2f}", va="center", fontsize=9, color="white")
        if plain and fixed:
            axes.plot(fixed / plain, row, "D", color=_OTHER, label=None if row else f"{best}, best fixed")
    axes.axvline(1.0, color=_INK, linewidth=0.8)
    axes.set_title("Tokens per second over plain decoding", fontsize=11, color=_INK)
    _prompt_axis(axes, report)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)
    tidy(axes, grid="x")


def _prompt_axis(axes: Any, report: WidthsReport) -> None:
    axes.set_yticks(range(len(report.kinds)), report.kinds)
    axes.set_ylim(len(report.kinds) - 0.4, -0.6)
