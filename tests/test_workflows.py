"""The workflow files: YAML that calls the Makefile's own targets, on the versions that setup.cfg names."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


def commands(path: Path) -> list[str]:
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


def test_lint_test_and_release() -> None:
    assert [path.name for path in WORKFLOWS] == ["lint.yml", "release.yml", "test.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_is_made_is_in_the_makefile(path: Path) -> None:
    made = {match for command in commands(path) for match in re.findall(r"\bmake ([a-z-]+)", command)}
    assert made
    assert made <= TARGETS
    for job in jobs(path).values():
        assert set(job.get("needs", [])) <= jobs(path).keys()
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_versions_and_systems() -> None:
    found = jobs(ROOT / ".github" / "workflows" / "test.yml")
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    named = re.findall(r"Python :: (3\.\d+)", parser["metadata"]["classifiers"])
    assert found["test"]["strategy"]["matrix"]["python"] == named
    assert found["runtime"]["strategy"]["matrix"]["system"] == ["windows-latest", "macos-latest"]
