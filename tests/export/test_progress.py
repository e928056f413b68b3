from __future__ import annotations

import io
import re
import sys

import pytest

from dflash_export.progress import SILENT, LineProgress, Progress, RichProgress, make_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(progress: Progress) -> None:
    with progress.stage("outer", total=8) as outer:
        for _ in range(8):
            outer.advance()
        with progress.stage("inner") as inner:
            inner.advance(3)


def test_silent(capfd: pytest.CaptureFixture[str]) -> None:
    work(SILENT)
    assert capfd.readouterr() == ("", "")


def test_lines() -> None:
    stream = io.StringIO()
    work(LineProgress(stream))
    lines = [re.sub(r"\d+\.\d s", "T", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "outer ...",
        "outer: 25 %",
        "outer: 50 %",
        "outer: 75 %",
        "inner ...",
        "inner: done in T",
        "outer: done in T",
    ]


def test_lines_survive_too_much_progress() -> None:
    stream = io.StringIO()
    with LineProgress(stream).stage("copy", total=2) as stage:
        stage.advance(5)
    assert [line.split(" in ")[0] for line in stream.getvalue().splitlines()] == [
        "copy ...",
        "copy: 75 %",
        "copy: done",
    ]


def test_empty_stage() -> None:
    for progress in (LineProgress(io.StringIO()), RichProgress(Terminal())):
        with progress.stage("nothing to do", total=0) as stage:
            stage.advance(0)


def test_bars() -> None:
    terminal = Terminal()
    progress = RichProgress(terminal)
    work(progress)
    work(progress)  # the first bars are finished; new ones can follow
    assert terminal.getvalue().count("outer") >= 2
    assert "inner" in terminal.getvalue()
    assert (
        terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") > 0
    )  # cursor is back


@pytest.mark.parametrize("make", [lambda: LineProgress(io.StringIO()), lambda: RichProgress(Terminal())])
def test_errors_pass_through(make: type[Progress]) -> None:
    progress: Progress = make()
    with pytest.raises(KeyError), progress.stage("outer"), progress.stage("inner", total=3):
        raise KeyError("stop")
    work(progress)


def test_a_failed_stage_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), LineProgress(stream).stage("copy"):
        raise KeyError("stop")
    assert stream.getvalue() == "copy ...\n"


def test_choice() -> None:
    assert isinstance(make_progress(Terminal()), RichProgress)
    assert isinstance(make_progress(io.StringIO()), LineProgress)


def test_default_is_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(make_progress())
    assert capsys.readouterr().out == ""
    assert "outer" in sys.stderr.getvalue()  # type: ignore[attr-defined]
