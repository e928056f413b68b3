"""The picture of a benchmark: which drafts are accepted, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash_bench.plots import INK, new_figure, save, tidy
from dflash_bench.run.report import BenchReport
from dflash_bench.stats import OUTSIDE
from dflash_bench.systems.own import PLAIN

__all__ = ["draw_plot"]

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
_DRAFTED_COLORS = ("#5b4b8a", "#a99bd0", "#4f7f5c", "#a7c9a0", "#8a5a44", "#d3b29e", "#7d8597")
_LABELLED_SHARE = 0.045  # of the longest bar: a narrower part has no room for its number
_BAR_HEIGHT = 0.6


def draw_plot(report: BenchReport, path: Path) -> None:
    """Draw a report and write it as PNG; a file that is there is replaced.

    Raises:
        OutputError: the file can't be written.
    """
    conditions = report.conditions
    figure = new_figure(
        12.5, 2.6 + 0.75 * max(len(report.own), 3), conditions, f", {len(conditions.prompt_tokens)} prompts"
    )
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    _draw_acceptance(left, report)
    _draw_stages(right, report)
    save(figure, path)


def _draw_acceptance(axes: Any, report: BenchReport) -> None:
    """Share of the steps in which the draft at each position was accepted, side by side."""
    names = report.drafted
    slot = 0.8 / max(len(names), 1)
    positions, highest = 0, 0.0
    for index, name in enumerate(names):
        percent = [
            100 * s for s in report.summaries[name].accepted_by_position(report.num_draft_tokens[name]) or []
        ]
        positions, highest = max(positions, len(percent)), max(highest, *percent, 0.0)
        offset = (index - (len(names) - 1) / 2) * slot
        tokens = report.summaries[name].tokens_per_step or 0
        bars = axes.bar(
            [position + 1 + offset for position in range(len(percent))],
            percent,
            width=0.92 * slot,
            color=_DRAFTED_COLORS[index % len(_DRAFTED_COLORS)],
            label=f"{report.num_draft_tokens[name]} drafts: {tokens:.2f} tokens a step",
        )
        if len(names) <= 3:  # more would be too narrow for numbers
            labels = [f"{value:.1f}" if 0 < value < 1 else f"{value:.0f}" for value in percent]
            axes.bar_label(bars, labels, padding=2, fontsize=8, color=INK)
    axes.set_xticks(range(1, positions + 1))
    axes.set_ylim(0, min(105, 20 * (1.08 * highest // 20 + 1)))
    if names:
        axes.legend(frameon=False, fontsize=9)
    tidy(
        axes,
        "Drafts accepted, by position",
        grid="y",
        x="position of the draft after the anchor",
        y="% of steps",
    )


def _draw_stages(axes: Any, report: BenchReport) -> None:
    """Milliseconds of a step by stage, a bar for each own system, with the floor where it is known."""
    splits: Mapping[str, Mapping[str, float]] = {
        name: stages for name in report.own if (stages := report.summaries[name].stage_ms) is not None
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
            begin + 0.012 * longest, row, f"{begin:.1f} ms{more}", va="center", fontsize=9, color=INK
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
        if name in report.floors:
            # Beside the bar and not across it, where the numbers are.
            floor, half = report.floors[name].milliseconds(report.bytes_per_second), _BAR_HEIGHT / 2
            axes.vlines(
                [floor, floor], [row - half - 0.13, row + half], [row - half, row + half + 0.13], color=INK
            )
    axes.set_yticks(range(len(splits)), list(splits))
    axes.set_ylim(len(splits) - 0.45, -0.55)
    axes.set_xlim(0, 1.33 * longest)
    _add_stage_legend(axes, {stage for split in splits.values() for stage in split}, bool(report.floors))
    tidy(axes, "Time of a step, by stage", grid="x", x="milliseconds")


def _add_stage_legend(axes: Any, stages: set[str], with_floor: bool) -> None:
    """Below the axes, in the order of a step."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    known = [stage for stage in _STAGE_COLORS if stage in stages]
    handles: list[Any] = [Patch(color=_STAGE_COLORS[stage], label=stage) for stage in known]
    handles += [Patch(color=_OTHER_STAGE_COLOR, label=stage) for stage in sorted(stages - {*known})]
    if with_floor:
        label = "floor: reading the weights"
        handles.append(Line2D([], [], color=INK, marker="|", linestyle="none", markersize=9, label=label))
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, frameon=False, fontsize=9
    )


def _ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on ``#rrggbb``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"
