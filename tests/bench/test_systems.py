"""Finding the systems that a bundle is compared with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dflash_bench.systems.base import (
    ENTRY_POINT_GROUP,
    BenchSetup,
    find_factories,
    make_contenders,
)
from dflash_export.errors import VerifyError
from dflash_rt import Bundle
from dflash_rt.errors import (
    BackendUnavailableError,
    RequestError,
)
from tests.rt.bundle_maker import write_bundle

# --- Finding contenders ---

MODULE = """
from dflash_export.errors import VerifyError
class Other:
    width = None
    closed = []
    def __init__(self, name): self.name = name
    def close(self): self.closed.append(self.name)
def make_one(setup): return [Other("one")]
def make_each(setup): return [Other(f"each-{width}") for width in setup.draft_widths]
def make_none(setup): raise VerifyError("there is no checkpoint", found="a\\nb", remedy="name one")
"""
ENTRIES = f"""[{ENTRY_POINT_GROUP}]
one = bench_plugin:make_one
each = bench_plugin:make_each
none = bench_plugin:make_none
gone = bench_plugin_that_is_gone:make
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """An installed package with four contenders, the only ones there are; returns the names closed so far."""
    info = tmp_path / "site" / "bench_plugin-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    (tmp_path / "site" / "bench_plugin.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    yield lambda: sys.modules["bench_plugin"].Other.closed
    sys.modules.pop("bench_plugin", None)


@pytest.fixture
def setup(tmp_path: Path) -> BenchSetup:
    return BenchSetup(Bundle.open(write_bundle(tmp_path / "bundle")), threads=1, draft_widths=(2, 3))


def test_contenders_come_from_entry_points(plugin: Any, setup: BenchSetup) -> None:
    made, skipped = make_contenders(["each", "one"], setup)
    assert [contender.name for contender in made] == ["each-2", "each-3", "one"]
    assert skipped == {}
    assert list(find_factories(["all"])) == ["each", "gone", "none", "one"]
    assert list(find_factories(["one", "all", "one"])) == ["one", "each", "gone", "none"]
    assert setup.stop_token_ids == (2,)


def test_unknown_contenders_are_all_named(plugin: Any) -> None:
    with pytest.raises(RequestError, match="nothing of that name") as caught:
        find_factories(["vllm", "one", "sglang"])
    assert "found: 'vllm', 'sglang'" in str(caught.value)
    assert "expected: each, gone, none, one, all" in str(caught.value)


def test_without_any_package_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RequestError, match=f"a package with entry points {ENTRY_POINT_GROUP}"):
        find_factories(["hf"])


def test_all_skips_with_a_reason(plugin: Any, setup: BenchSetup) -> None:
    made, skipped = make_contenders(["all"], setup)
    assert [contender.name for contender in made] == ["each-2", "each-3", "one"]
    assert skipped["none"] == "there is no checkpoint (a b)"
    assert skipped["gone"].startswith("gone can't be imported (No module named")


def test_a_contender_asked_for_by_name_has_to_work(
    plugin: Callable[[], list[str]], setup: BenchSetup
) -> None:
    with pytest.raises(VerifyError, match="there is no checkpoint"):
        make_contenders(["one", "none", "each"], setup)
    assert plugin() == ["one"]
    with pytest.raises(BackendUnavailableError, match="gone can't be imported"):
        make_contenders(["all", "gone"], setup)
