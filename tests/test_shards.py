"""``--shard I/N`` gives every test to one part, and ``slow_but`` marks what it doesn't name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow_but

ROOT = Path(__file__).parents[1]
FILE = "tests/rt/text/test_stop_strings.py"


def collected(*options: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        FILE,
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_test_is_in_one_shard() -> None:
    parts = [collected("--shard", f"{index}/3") for index in (1, 2, 3)]
    assert all(parts)
    assert sorted(test for part in parts for test in part) == sorted(collected())


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_that_is_none(shard: str) -> None:
    with pytest.raises(AssertionError, match=f"--shard {shard}: expected I/N"):
        collected("--shard", shard)


def test_slow_but() -> None:
    first, second = slow_but(["a", "b"], "b")
    assert (first.values, [mark.name for mark in first.marks], second) == (("a",), ["slow"], "b")
    pairs = slow_but([("a", 1), ("b", 2)], ("a", 1))
    assert pairs[0] == ("a", 1)
    assert pairs[1].values == ("b", 2)
    with pytest.raises(AssertionError, match="a fast case that is none"):
        slow_but(["a"], "c")
