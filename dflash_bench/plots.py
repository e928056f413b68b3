"""What the pictures of benchmarks share: the check of a file's name, the frame, the colours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_rt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dflash_bench.report import Conditions

__all__ = ["FAINT", "INK", "check_plot", "new_figure", "save", "tidy"]

INK, FAINT = "#222222", "#dddddd"


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
        raise _cannot_write(path, error) from error
    return path


def new_figure(width: float, height: float, conditions: Conditions, more: str = "") -> Figure:
    """An empty figure, in inches, with what was run as its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(
        f"{conditions.bundle} ({conditions.precision}) on {conditions.backend}, "
        f"{conditions.threads} threads{more}",
        fontsize=12,
        color=INK,
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. Raises OutputError."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise _cannot_write(path, error) from error


def tidy(axes: Any, title: str, *, grid: str, x: str = "", y: str = "") -> None:
    """Titles of one part of a figure and of its axes; no frame, and faint lines behind what is drawn."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the plot {path} can't be written",
        found=error.strerror or error,
        expected="a file in a writable folder",
        remedy="choose another path",
    )
