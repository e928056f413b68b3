"""Step costs: measured through the loop, kept in a bundle, read strictly."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dflash_rt.speculation.width_cost
from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Inject, StepOutput
from dflash_rt.backends.scripted import ScriptedBackend, follow
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import BackendError, RequestError
from dflash_rt.generator import Generator
from dflash_rt.request import ModelLimits
from dflash_rt.sampling.proposal import DraftSampling
from dflash_rt.speculation.width_cache import (
    STEP_COSTS_NAME,
    CostKey,
    cost_key,
    load_step_costs,
    save_step_costs,
)
from dflash_rt.speculation.width_correction import StepCosts
from dflash_rt.speculation.width_cost import _order, measure_step_costs
from tests.rt.bundle_maker import manifest_document, write_bundle

COSTS = StepCosts((0.010, 0.014, 0.015, 0.016))


def limits(**changes: Any) -> ModelLimits:
    known = {"vocab_size": 50, "max_seq_len": 64, "prefill_chunk": 8, "block_size": 4, "num_draft_tokens": 3}
    return ModelLimits(**{**known, "adaptive": True, **changes})


class Clock:
    """A clock that only the backend moves: a step of ``width`` rows takes ``10 + width`` units."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(ScriptedBackend):
    """Moves the clock, more in the first step of each width: a warm-up."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(follow(range(100)), block_size=4, prefill_chunk=8, max_rows=64, **options)
        self.clock, self.widths = clock, list[int]()
        self.cleared = 0

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        self.clock.now += 10 + verify_len + (50 if verify_len not in self.widths else 0)
        self.widths.append(verify_len)
        return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)

    def clear(self) -> None:
        self.cleared += 1
        super().clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dflash_rt.speculation.width_cost.time, "perf_counter", clock)
    return clock


# Measuring


@pytest.mark.parametrize("widest", [1, 2, 3, 4, 8, 16, 33])
def test_every_width_once_both_ends_first(widest: int) -> None:
    order = _order(widest)
    assert sorted(order) == list(range(1, widest + 1))
    assert order[:2] == [1, widest][: len(order)]


def test_each_width_is_taken_once_untimed_and_then_between_plain_steps(clock: Clock) -> None:
    backend = Timed(clock)
    costs = measure_step_costs(backend, limits(), budget_seconds=1e9, warm_up_seconds=1e9)
    assert costs.seconds == pytest.approx((11, 12, 13, 14))  # without the 50 units of each first step
    assert backend.widths[:11] == [1, 4, 2, 3, 1, 4, 1, 2, 1, 3, 1]
    assert len(backend.widths) == 4 + 1 + 8 * 6
    assert backend.cleared == 1


def test_the_budget_begins_after_the_first_steps(clock: Clock) -> None:
    backend = Timed(clock)
    costs = measure_step_costs(backend, limits(), budget_seconds=60, warm_up_seconds=1e9)
    assert backend.widths == [1, 4, 2, 3, 1, 4, 1, 2, 1, 3, 1]
    assert costs.seconds == pytest.approx((11, 12, 13, 14))


def test_a_slow_backend_is_measured_at_both_ends(clock: Clock) -> None:
    backend = Timed(clock)
    costs = measure_step_costs(backend, limits(), budget_seconds=1, warm_up_seconds=1)
    assert backend.widths == [1, 4, 1, 4, 1]
    assert costs.seconds == pytest.approx((11, 12, 13, 14))  # 2 and 3 lie between


def test_a_machine_that_changes_its_speed_changes_no_cost(clock: Clock) -> None:
    class TwoSpeeds(Timed):
        def step(
            self,
            anchors: IntArray,
            start: IntArray,
            *,
            verify_len: int,
            inject: Inject | None,
            sampling: DraftSampling | None = None,
        ) -> StepOutput:
            slow = len(self.widths) // 17 % 2
            self.clock.now += 3 * (10 + verify_len) * slow
            return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)

    relative = measure_step_costs(
        TwoSpeeds(clock), limits(), budget_seconds=1e9, warm_up_seconds=1e9
    ).relative
    assert relative == pytest.approx((1, 12 / 11, 13 / 11, 14 / 11))


def test_a_wider_step_never_counts_as_cheaper(clock: Clock) -> None:
    class Uneven(Timed):
        def step(
            self,
            anchors: IntArray,
            start: IntArray,
            *,
            verify_len: int,
            inject: Inject | None,
            sampling: DraftSampling | None = None,
        ) -> StepOutput:
            self.clock.now += 30 * (verify_len == 2)  # disturbed every time
            return super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)

    costs = measure_step_costs(Uneven(clock), limits(), budget_seconds=1e9, warm_up_seconds=1e9)
    assert costs.seconds == pytest.approx((11, 42, 42, 42))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 9, 64])
def test_short_sequences_are_measured_too(rows: int, clock: Clock) -> None:
    costs = measure_step_costs(Timed(clock), limits(max_seq_len=rows), budget_seconds=1e9)
    assert costs.seconds == pytest.approx((1, 1, 1, 1) if rows < 3 else (11, 12, 13, 14))


def test_requests_are_as_without_a_measurement() -> None:
    def backend() -> ScriptedBackend:
        return ScriptedBackend(follow(range(100)), block_size=4, prefill_chunk=8, max_rows=64)

    with Generator.from_parts(limits(adaptive=False), backend()) as fixed:
        expected = fixed.generate([0, 1], max_new_tokens=30).token_ids
    with Generator.from_parts(limits(), backend()) as measured:
        assert measured.step_costs is not None
        assert measured.step_costs.widest == 4
        assert measured.generate([0, 1], max_new_tokens=30).token_ids == expected


def test_a_failure_while_measuring_closes_the_backend(tmp_path: Path) -> None:
    broken = ScriptedBackend(follow(range(100)), block_size=4, raise_at={3: BackendError("broken")})
    with pytest.raises(BackendError, match="broken"):
        Generator(make_bundle(tmp_path / "bundle"), broken)
    assert broken.closed


# Keeping


def make_bundle(folder: Path, num_draft_tokens: int = 2) -> Bundle:
    document = manifest_document()
    document["tokenizer"] = None
    document["generation"]["num_draft_tokens"] = num_draft_tokens
    return Bundle.open(write_bundle(folder, document))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def key(bundle: Bundle) -> CostKey:
    return cost_key(bundle, "onnxruntime", 2)


def path_of(bundle: Bundle) -> Path:
    return bundle.root / "reports" / STEP_COSTS_NAME


def test_saved_and_loaded(bundle: Bundle, key: CostKey) -> None:
    assert load_step_costs(bundle, key, 4) is None
    save_step_costs(bundle, key, COSTS)
    assert load_step_costs(bundle, key, 4) == COSTS
    assert load_step_costs(bundle, key, 3) == StepCosts(COSTS.seconds[:3])
    assert load_step_costs(bundle, key, 5) is None
    assert [path.name for path in path_of(bundle).parent.iterdir()] == [STEP_COSTS_NAME]  # no partial file


def test_the_bundle_stays_whole(bundle: Bundle, key: CostKey) -> None:
    save_step_costs(bundle, key, COSTS)
    opened = Bundle.open(bundle.root, verify_files=True)
    assert opened.unlisted_files() == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu": "another"},
        {"cores": 99},
        {"backend": "other"},
        {"backend_version": "0"},
        {"threads": None},
        {"runtime": "0"},
        {"bundle": "0"},
    ],
)
def test_another_machine_backend_or_bundle_is_measured_again(
    bundle: Bundle, key: CostKey, changes: dict[str, Any]
) -> None:
    other = replace(key, **changes)
    save_step_costs(bundle, key, COSTS)
    assert load_step_costs(bundle, other, 4) is None
    save_step_costs(bundle, other, StepCosts((1.0, 2.0, 3.0, 4.0)))
    assert load_step_costs(bundle, key, 4) == COSTS  # side by side


def test_a_new_measurement_replaces_the_old_one_and_few_are_kept(bundle: Bundle, key: CostKey) -> None:
    for cores in range(1, 20):
        save_step_costs(bundle, replace(key, cores=cores), COSTS)
    save_step_costs(bundle, replace(key, cores=19), StepCosts((1.0, 2.0)))
    entries = json.loads(path_of(bundle).read_text())["entries"]
    assert [entry["key"]["cores"] for entry in entries] == list(range(4, 20))
    assert entries[-1]["seconds"] == [1.0, 2.0]


def damage(text: str) -> dict[str, Callable[[Path], object]]:
    document = json.loads(text)

    def put(*where: Any, value: Any) -> Callable[[Path], object]:
        changed = json.loads(text)
        place = changed
        for step in where[:-1]:
            place = place[step]
        place[where[-1]] = value
        return lambda path: path.write_text(json.dumps(changed))

    def link(path: Path) -> None:
        real = path.with_name("real.json")
        path.rename(real)
        path.symlink_to(real)

    assert document["entries"]
    return {
        "empty": lambda path: path.write_text(""),
        "cut": lambda path: path.write_text(text[:-20]),
        "not UTF-8": lambda path: path.write_bytes(b"\xff"),
        "too large": lambda path: path.write_text(text + " " * 2**20),
        "deep": lambda path: path.write_text("[" * 100_000),
        "a list": lambda path: path.write_text("[]"),
        "another format": put("format", value="dflash-bundle"),
        "another version": put("format_version", value=2),
        "unknown key": put("more", value=1),
        "no seconds": put("entries", 0, "seconds", value=[]),
        "zero seconds": put("entries", 0, "seconds", 0, value=0.0),
        "negative seconds": put("entries", 0, "seconds", 1, value=-1.0),
        "seconds as text": put("entries", 0, "seconds", 1, value="1"),
        "infinite seconds": put("entries", 0, "seconds", 1, value=float("inf")),
        "no key": put("entries", 0, "key", value=None),
        "a link": link,
    }


@pytest.mark.parametrize("name", damage('{"entries": [{"key": {}, "seconds": [1, 2]}]}'))
def test_a_broken_file_is_ignored_with_a_line_in_the_log(
    bundle: Bundle, key: CostKey, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_step_costs(bundle, key, COSTS)
    path = path_of(bundle)
    damage(path.read_text())[name](path)
    with caplog.at_level(logging.INFO, "dflash_rt"):
        assert load_step_costs(bundle, key, 4) is None
    if name != "no seconds":  # well formed, and of no use
        assert "are ignored" in caplog.text
    save_step_costs(bundle, key, COSTS)
    assert load_step_costs(bundle, key, 4) == COSTS  # replaced


def test_what_cannot_be_written_is_not_kept(
    bundle: Bundle, key: CostKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (bundle.root / "reports").symlink_to(elsewhere)  # never written through
    with caplog.at_level(logging.INFO, "dflash_rt"):
        save_step_costs(bundle, key, COSTS)
    assert "are not kept" in caplog.text
    assert list(elsewhere.iterdir()) == []
    (bundle.root / "reports").unlink()
    (bundle.root / "reports").write_text("a file where the folder would be")
    save_step_costs(bundle, key, COSTS)
    assert load_step_costs(bundle, key, 4) is None


# The generator


class Named(ScriptedBackend):
    made = 0


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> type[Named]:
    """The backend `onnxruntime` is a script."""

    def make(name: str, bundle: Bundle, *, threads: int | None = None, **_: Any) -> Named:
        return Named(follow(range(100)), block_size=4, prefill_chunk=8, max_rows=64)

    monkeypatch.setattr("dflash_rt.generator.create_backend", make)
    return Named


def test_measured_once_and_read_the_next_time(bundle: Bundle, by_name: type[Named]) -> None:
    with Generator(bundle) as first:
        pass
    with Generator(bundle) as second:
        assert second.step_costs == first.step_costs
        assert second.limits.num_draft_tokens == 2  # the bundle's
    with Generator(bundle, num_draft_tokens="auto") as wider:
        assert wider.step_costs is not None
        assert wider.step_costs.widest == 4  # the block size
    with Generator(bundle) as third:  # narrower than what is kept now
        assert third.step_costs == StepCosts(wider.step_costs.seconds[:3])


@pytest.mark.parametrize(("factor", "written"), [(1.02, False), (1.5, True)])
def test_costs_that_requests_corrected_are_kept(
    bundle: Bundle, by_name: type[Named], factor: float, written: bool
) -> None:
    with Generator(bundle) as generator:
        measured = generator.step_costs
    assert measured is not None
    with Generator(bundle) as generator:
        costs = generator._greedy_costs
        assert costs is not None
        for _ in range(200):
            for width in (1, 3, 1, 2):
                costs.add(width, measured.seconds[width - 1] * (factor if width > 1 else 1.0))
        assert generator.step_costs == measured
    with Generator(bundle) as again:
        assert again.step_costs is not None
        found = again.step_costs.relative
    expected = [1.0, *(cost * (factor if written else 1.0) for cost in measured.relative[1:])]
    assert found == pytest.approx(expected, rel=0.02)


def test_a_bundle_that_became_read_only_closes_without_an_error(bundle: Bundle, by_name: type[Named]) -> None:
    generator = Generator(bundle)
    costs = generator._greedy_costs
    assert costs is not None
    for _ in range(50):
        costs.add(1, 1.0)
        costs.add(3, 9.0)
    path_of(bundle).unlink()
    path_of(bundle).parent.rmdir()
    path_of(bundle).parent.write_text("a file where the folder would be")
    generator.close()
    assert generator.closed


def test_no_costs_without_a_choice(bundle: Bundle, by_name: type[Named]) -> None:
    for width in (1, 2, 4, np.int64(3)):
        with Generator(bundle, num_draft_tokens=width - 1) as generator:
            assert generator.step_costs is None
            assert not generator.limits.adaptive
    assert not path_of(bundle).exists()


def test_a_ready_backend_is_measured_and_not_kept(bundle: Bundle) -> None:
    backend = ScriptedBackend(follow(range(100)), block_size=4, prefill_chunk=8, max_rows=64)
    with Generator(bundle, backend) as generator:
        assert generator.step_costs is not None
    assert not path_of(bundle).exists()


def test_a_bundle_set_to_plain_decoding_stays_plain(tmp_path: Path, by_name: type[Named]) -> None:
    with Generator(make_bundle(tmp_path / "plain", num_draft_tokens=0)) as generator:
        assert not generator.limits.adaptive
        assert generator.generate([1], max_new_tokens=5, stop_token_ids=[]).stats.steps_by_draft_tokens == {
            0: 4
        }


@pytest.mark.parametrize("name", ["Auto", "", "4"])
def test_unknown_names_of_widths_are_refused(bundle: Bundle, name: str) -> None:
    with pytest.raises(RequestError, match='expected: "auto", or 0 to 3'):
        Generator(bundle, num_draft_tokens=name)  # type: ignore[arg-type]
