"""Numbers and tables as reports print them, in plain text and in markdown, and as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["aligned", "cell", "joined", "markdown", "rounded"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def cell(value: object, form: str = "", unit: str = "", *, missing: str = "-") -> str:
    """A cell; ``missing`` is what couldn't be measured."""
    return missing if value is None else f"{value:{form}}{unit}"


def joined(sections: Iterable[Iterable[str]]) -> str:
    """Sections of lines, with an empty line between them."""
    return "\n\n".join(map("\n".join, sections))


def rounded(value: float | None) -> float | None:
    """Six significant digits, for JSON."""
    return None if value is None else float(f"{value:.6g}")
