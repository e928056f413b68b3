"""The picture of a benchmark: which drafts are accepted, and where the time of a step goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_bench.run.report import PLAIN
from dflash_bench.stats import OUTSIDE
from dflash_rt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from dflash_bench.run.report import BenchReport

__all__ = ["cannot_write", "check_plot", "draw_plot", "tidy"]

# The drafter's stages in one hue, the target's in another; outside is what should not be seen.
_STAGE_COLORS = {
    "inject": "#f6c667",
    "draft": "#ef9234",
    "draft_head": "#c9611c",
    "embed": "#a8d5c2",
    "target": "#4c94b8",
    "target_head": "#23577a",
    OUTSIDE: "#d1495b",
}
_OTHER_STAGE_COLOR = "#7d8597"
_WIDTH_COLORS = ("#5b4b8a", "#a99bd0", "#4f7f5c", "#a7c9a0", "#8a5a44", "#d3b29e", "#7d8597")
_INK, _FAINT = "#222222", "#dddddd"
_LABELLED_SHARE = 0.045  # of the longest bar: a narrower part has no room for its number
_BAR_HEIGHT = 0.6


def check_plot(path: str | os.PathLike[str]) -> Path:
    """The path of a plot that can be drawn later; its folder is made. For use before a long run.

    Raises:
        RequestError: matplotlib isn't installed, or the path doesn't end in ``.png``.
        OutputError: the file can't be written.
    """
    path = Path(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError(
            "a plot needs matplotlib",
            found=error,
            expected="the package matplotlib",
            remedy="pip install 'dflash-export[bench]', or leave out the plot",
        ) from error
    if path.suffix.lower() != ".png":
        raise RequestError(
            "the plot has a wrong file name",
            found=str(path),
            expected="a name that ends in .png",
            remedy="choose such a name",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def draw_plot(report: BenchReport, path: Path) -> None:
    """Draw a report and write it as PNG; a file that is there is replaced.

    Raises:
        OutputError: the file can't be written.
    """
    from matplotlib.figure import Figure

    bars = len(report.ours)
    figure = Figure(figsize=(12.5, 2.6 + 0.75 * max(bars, 3)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    conditions = report.conditions
    figure.suptitle(
        f"{conditions.bundle} ({conditions.precision}) on {conditions.backend}, "
        f"{conditions.threads} threads, {len(conditions.prompt_tokens)} prompts",
        fontsize=12,
        color=_INK,
    )
    _draw_acceptance(left, report)
    _draw_stages(right, report)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise cannot_write(path, error) from error


def _draw_acceptance(axes: Any, report: BenchReport) -> None:
    """Share of the steps in which the draft at each position was accepted, beside each other by width."""
    names = report.drafted
    slot = 0.8 / max(len(names), 1)
    positions, highest = 0, 0.0
    for index, name in enumerate(names):
        percent = [100 * s for s in report.summaries[name].accepted_by_position(report.widths[name]) or []]
        positions, highest = max(positions, len(percent)), max(highest, *percent, 0.0)
        offset = (index - (len(names) - 1) / 2) * slot
        tokens = report.summaries[name].tokens_per_step or 0
        bars = axes.bar(
            [position + 1 + offset for position in range(len(percent))],
            percent,
            width=0.92 * slot,
            color=_WIDTH_COLORS[index % len(_WIDTH_COLORS)],
            label=f"width {report.widths[name]}: {tokens:.2f} tokens a step",
        )
        if len(names) <= 3:  # more would be too narrow for numbers
            labels = [f"{value:.1f}" if 0 < value < 1 else f"{value:.0f}" for value in percent]
            axes.bar_label(bars, labels, padding=2, fontsize=8, color=_INK)
    axes.set_title("Drafts accepted, by position", fontsize=11, color=_INK)
    axes.set_xlabel("position of the draft after the anchor")
    axes.set_ylabel("% of steps")
    axes.set_xticks(range(1, positions + 1))
    axes.set_ylim(0, min(105, 20 * (1.08 * highest // 20 + 1)))
    if names:
        axes.legend(frameon=False, fontsize=9)
    tidy(axes, grid="y")


def _draw_stages(axes: Any, report: BenchReport) -> None:
    """Milliseconds of a step by stage, a bar for each of ours, with the floor where it is known."""
    splits: Mapping[str, Mapping[str, float]] = {
        name: stages for name in report.ours if (stages := report.summaries[name].stage_ms) is not None
    }
    totals = {name: sum(split.values()) for name, split in splits.items()}
    longest = max(totals.values(), default=1.0)
    for row, (name, split) in enumerate(splits.items()):
        begin = 0.0
        for stage, value in split.items():
            color = _STAGE_COLORS.get(stage, _OTHER_STAGE_COLOR)
            axes.barh(row, value, left=begin, height=_BAR_HEIGHT, color=color)
            if value > _LABELLED_SHARE * longest:
                place = (begin + value / 2, row)
                axes.text(
                    *place, f"{value:.1f}", ha="center", va="center", fontsize=8.5, color=_ink_on(color)
                )
            begin += value
        cost = None if name == PLAIN else report.step_cost(name)
        more = "" if cost is None else f"  ({cost.median:.2f} x plain)"
        text = axes.text(
            begin + 0.012 * longest, row, f"{begin:.1f} ms{more}", va="center", fontsize=9, color=_INK
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
        if name in report.floors:
            # Beside the bar and not across it, where the numbers are.
            floor, half = report.floors[name].milliseconds, _BAR_HEIGHT / 2
            axes.vlines(
                [floor, floor], [row - half - 0.13, row + half], [row - half, row + half + 0.13], color=_INK
            )
    axes.set_title("Time of a step, by stage", fontsize=11, color=_INK)
    axes.set_xlabel("milliseconds")
    axes.set_yticks(range(len(splits)), list(splits))
    axes.set_ylim(len(splits) - 0.45, -0.55)
    axes.set_xlim(0, 1.33 * longest)
    _add_stage_legend(axes, {stage for split in splits.values() for stage in split}, bool(report.floors))
    tidy(axes, grid="x")


def _add_stage_legend(axes: Any, stages: set[str], with_floor: bool) -> None:
    """Below the axes, in the order of a step."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    known = [stage for stage in _STAGE_COLORS if stage in stages]
    handles: list[Any] = [Patch(color=_STAGE_COLORS[stage], label=stage) for stage in known]
    handles += [Patch(color=_OTHER_STAGE_COLOR, label=stage) for stage in sorted(stages - {*known})]
    if with_floor:
        label = "floor: reading the weights"
        handles.append(Line2D([], [], color=_INK, marker="|", linestyle="none", markersize=9, label=label))
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, frameon=False, fontsize=9
    )


def _ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on ``#rrggbb``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"


def tidy(axes: Any, *, grid: str) -> None:
    """No frame, and faint lines behind what is drawn."""
    axes.grid(axis=grid, color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, length=0)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error for a plot whose file the system refuses."""
    return OutputError(
        f"the plot {path} can't be written",
        found=error.strerror or error,
        expected="a file in a writable folder",
        remedy="choose another path",
    )
