"""Finding the systems that a bundle is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_bench.systems import registry
from dflash_bench.systems.base import BenchSetup, System
from dflash_bench.systems.registry import find_factories, make_systems
from dflash_export.errors import VerifyError
from dflash_rt import Bundle
from dflash_rt.errors import BackendUnavailableError, RequestError
from tests.bench.parts import Other
from tests.rt.bundle_maker import write_bundle


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four systems, the only ones there are; the names of those closed so far."""
    names: list[str] = []

    class Listed(Other):
        def close(self) -> None:
            names.append(self.name)

    def make_each(setup: BenchSetup) -> list[System]:
        return [Listed(f"each-{count}", []) for count in setup.num_draft_tokens]

    def make_none(setup: BenchSetup) -> list[System]:
        raise VerifyError("there is no checkpoint", found="a\nb", remedy="name one")

    def make_gone(setup: BenchSetup) -> list[System]:
        raise BackendUnavailableError("gone can't be compared with", found="x isn't installed")

    factories = {
        "each": make_each,
        "gone": make_gone,
        "none": make_none,
        "one": lambda setup: [Listed("one", [])],
    }
    monkeypatch.setattr(registry, "FACTORIES", factories)
    return names


@pytest.fixture
def setup(tmp_path: Path) -> BenchSetup:
    return BenchSetup(Bundle.open(write_bundle(tmp_path / "bundle")), threads=1, num_draft_tokens=(1, 2))


def test_systems_come_from_the_registry(closed: list[str], setup: BenchSetup) -> None:
    made, skipped = make_systems(["each", "one"], setup)
    assert [system.name for system in made] == ["each-1", "each-2", "one"]
    assert skipped == {}
    assert list(find_factories(["all"])) == ["each", "gone", "none", "one"]
    assert list(find_factories(["one", "all", "one"])) == ["one", "each", "gone", "none"]
    assert setup.stop_token_ids == (2,)


def test_unknown_systems_are_all_named(closed: list[str]) -> None:
    with pytest.raises(RequestError, match="nothing of that name") as caught:
        find_factories(["vllm", "one", "sglang"])
    assert "found: 'vllm', 'sglang'" in str(caught.value)
    assert "expected: each, gone, none, one, all" in str(caught.value)


def test_all_skips_with_a_reason(closed: list[str], setup: BenchSetup) -> None:
    made, skipped = make_systems(["all"], setup)
    assert [system.name for system in made] == ["each-1", "each-2", "one"]
    assert skipped["none"] == "there is no checkpoint (a b)"
    assert skipped["gone"] == "gone can't be compared with (x isn't installed)"


def test_a_system_asked_for_by_name_has_to_work(closed: list[str], setup: BenchSetup) -> None:
    with pytest.raises(VerifyError, match="there is no checkpoint"):
        make_systems(["one", "none", "each"], setup)
    assert closed == ["one"]
    with pytest.raises(BackendUnavailableError, match="gone can't be compared with"):
        make_systems(["all", "gone"], setup)
