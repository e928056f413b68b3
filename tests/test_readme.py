"""What README.md shows works: its Python runs on the demo pair, and its command lines are right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dflash_bench.cli import main as bench_main
from dflash_export.cli import main as export_main
from dflash_rt import Bundle
from dflash_rt.cli.main import main as rt_main

ROOT = Path(__file__).parents[1]
GROUPS = {"dflash-bench": bench_main, "dflash-export": export_main, "dflash-rt": rt_main}


def blocks(language: str, text: str) -> list[str]:
    """Fenced blocks of a language, ``""`` for those that name none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in fences if name == language]


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(blocks("", README)).replace("\\\n", " ").splitlines()
LINES = [line for line in COMMANDS if line.startswith(tuple(GROUPS))]


def test_the_python_runs(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    engines.mkdir()
    (engines / "smollm2-135m").symlink_to(smollm2_bundle.root)
    greedy, sampled = blocks("python", README)
    # Where two answers would run together, a mark shows that neither is empty.
    printed = run(greedy.replace("    for chunk", "    print('=' * 40)\n    for chunk", 1), tmp_path)
    answer, _, streamed = printed.partition("=" * 40)
    assert re.search(r"\w+ .*\w+.* (stop|length) \d+\.\d+$", answer.strip(), re.DOTALL), answer
    assert len(answer.split()) > 10
    assert len(streamed.split()) > 10
    assert re.search(r"(\w+\W+){10}.*\{\d+: \d+.*\}$", run(sampled, tmp_path).strip(), re.DOTALL)


def run(code: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_there_are_command_lines() -> None:
    commands = {name for group in GROUPS.values() for name in group.commands}
    assert {line.split()[1] for line in LINES} == commands


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line: str) -> None:
    """Every option exists and takes what it is given; nothing is run."""
    program, name, *arguments = shlex.split(line, comments=True)
    command = GROUPS[program].commands[name]
    context = command.make_context(name, arguments)
    assert name == "gpu" or {"target", "recipe", "bundle"} & {
        key for key, value in context.params.items() if value
    }


def test_the_check_of_command_lines_sees_mistakes() -> None:
    with pytest.raises(click.UsageError):
        rt_main.commands["generate"].make_context("generate", ["bundle", "--promt", "x"])
