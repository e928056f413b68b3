"""What README.md, guide and reference show works: Python runs on the demo pair, command lines are right."""

from __future__ import annotations

import importlib
import os
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
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/guide/*.md")), *sorted(ROOT.glob("docs/reference/*.md"))]
GROUPS = {"dflash-bench": bench_main, "dflash-export": export_main, "dflash-rt": rt_main}


def blocks(language: str, path: Path) -> list[str]:
    """Fenced blocks of a language, ``""`` for those that name none."""
    text = path.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in fences if name == language]


def command_lines(path: Path) -> list[str]:
    lines = "\n".join(blocks("", path)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(tuple(GROUPS))]


PYTHON = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, code in enumerate(blocks("python", path))
]
LINES = [pytest.param(line, id=f"{path.stem}: {line[:60]}") for path in PAGES for line in command_lines(path)]


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_runs(smollm2_bundle: Bundle, tmp_path: Path, code: str) -> None:
    engines = tmp_path / "engines"
    engines.mkdir()
    (engines / "smollm2-135m").symlink_to(smollm2_bundle.root)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.split()) >= 3, result.stdout


def test_the_readme_shows_a_whole_answer_and_a_stream() -> None:
    (code,) = blocks("python", ROOT / "README.md")
    assert "generator.generate(" in code
    assert "generator.stream(" in code


def test_every_command_is_shown() -> None:
    shown = {tuple(line.split()[:2]) for path in PAGES for line in command_lines(path)}
    wanted = {(program, name) for program, group in GROUPS.items() for name in group.commands}
    assert wanted - shown == set()


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line: str) -> None:
    """Every option exists and takes what it is given; nothing is run."""
    program, name, *arguments = shlex.split(line, comments=True)
    GROUPS[program].commands[name].make_context(name, arguments)


def test_the_check_of_command_lines_sees_mistakes() -> None:
    with pytest.raises(click.UsageError):
        rt_main.commands["generate"].make_context("generate", ["bundle", "--promt", "x"])


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    pages += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("examples/*/README.md")]
    lost = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert lost == []


def test_names_in_the_docs_are_there() -> None:
    """Paths of files, and dotted names of the packages."""
    lost = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]:
        text = page.read_text(encoding="utf-8")
        paths = set(re.findall(r"`((?:dflash_\w+|tests|benchmarks|examples|docs)/[\w./]+)`", text))
        names = set(re.findall(r"`(dflash_(?:rt|export|bench)(?:\.\w+)+)`", text))
        lost += [f"{page.name}: {path}" for path in paths if not (ROOT / path).exists()]
        lost += [f"{page.name}: {name}" for name in names if not is_there(name)]
    assert lost == []


def test_pages_that_the_code_names_are_there() -> None:
    lost = [
        f"{path.relative_to(ROOT)}: {page}"
        for package in ("dflash_rt", "dflash_export", "dflash_bench")
        for path in (ROOT / package).rglob("*.py")
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    ]
    assert lost == []


def is_there(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False
