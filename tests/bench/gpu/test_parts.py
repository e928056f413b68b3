"""Parts of the GPU suite that measure nothing: shapes, floors, rows, verdicts, budget, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_bench.budget import Budget, Parts, SkippedError
from dflash_bench.floor import StepFloor
from dflash_bench.gpu.backend_spec import BackendSpec
from dflash_bench.gpu.bundles import drafter_tensors, target_tensors
from dflash_bench.gpu.device_clock import drafting_ends
from dflash_bench.gpu.parity import classify_gaps
from dflash_bench.gpu.plan import make_plan
from dflash_bench.gpu.report import DRY_RUN_WARNING, default_name, to_markdown, write_report
from dflash_bench.gpu.rows import DRAFTED, GOALS, HF, PLAIN, REFERENCE, Sample, judge_goals, make_row
from dflash_bench.gpu.shapes import PAIRS, TINY
from dflash_bench.gpu.watch import mark_cut_off
from dflash_bench.interleave import measure
from dflash_bench.stats import quartiles
from dflash_rt.backends.device.plan import Run as GraphRun
from dflash_rt.errors import BackendError, BackendUnavailableError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# --- Backends ---


def test_a_backend_is_written_as_it_is_read() -> None:
    for text in (
        "tensorrt",
        "onnxruntime-cuda:no-graph",
        "onnxruntime-cuda:fused",
        "onnxruntime-cuda:fused:no-graph",
    ):
        spec = BackendSpec.parse(text)
        assert str(spec) == text
        assert (spec.fused, spec.graph) == (":fused" in text, ":no-graph" not in text)
    for text in ("cuda", "onnxruntime-cuda:graph", "onnxruntime-cuda:no-graph:fused"):
        with pytest.raises(BackendUnavailableError, match="unknown backend"):
            BackendSpec.parse(text)


# --- Shapes ---


@pytest.mark.parametrize(("name", "billions"), [("qwen3-8b", 8.19), ("qwen3-4b", 4.02)])
def test_targets_have_as_many_parameters_as_the_real_ones(name: str, billions: float) -> None:
    count = sum(torch.Size(shape).numel() for shape in target_tensors(PAIRS[name]).values())
    assert round(count / 1e9, 2) == billions


@pytest.mark.parametrize(("name", "layers"), [("qwen3-8b", 5), ("qwen3-4b", 5)])
def test_drafters_have_the_tensors_of_the_real_ones(name: str, layers: int) -> None:
    shape = PAIRS[name]
    tensors = drafter_tensors(shape)
    assert len(tensors) == 11 * layers + 3
    assert tensors["fc.weight"] == (shape.hidden, 5 * shape.hidden)
    assert shape.block_size == 16


# --- Numbers ---


def test_floor_is_bytes_over_bandwidth() -> None:
    assert StepFloor(weight_bytes=3_000, cache_bytes=1_000).milliseconds(2e6) == pytest.approx(2.0)


def test_ratios_are_of_pairs_and_not_of_medians() -> None:
    drafted, plain = (
        [Sample(seconds) for seconds in values] for values in ([2.0, 40.0, 6.0], [1.0, 10.0, 1.0])
    )
    found = row(**{DRAFTED: drafted, PLAIN: plain})
    assert (found["cycle_cost"]["median"], found["cycle_cost"]["pairs"]) == (4.0, 3)
    assert quartiles([]) is row(**{PLAIN: plain})["cycle_cost"] is None


def row(**samples: list[Sample]) -> dict[str, Any]:
    return make_row(
        pair="qwen3-8b",
        precision="bf16",
        backend="tensorrt",
        context=1024,
        width=16,
        samples=samples,
        floor=StepFloor(18, cache_bytes=2),
        plain_floor=StepFloor(15, cache_bytes=1),
        bytes_per_second=2000,
        published={"GSM8K": 6.0},
        missing={},
        draft_share=0.1,
    )


OURS = {
    DRAFTED: [Sample(0.012, 0.0119, 0.0001)],
    PLAIN: [Sample(0.010, 0.0099, 0.0001)],
}


def test_a_row() -> None:
    found = row(**OURS, **{HF: [Sample(0.030)], REFERENCE: [Sample(0.048)]})
    assert found["step_ms"] == pytest.approx(12)
    assert found["floor_ms"] == pytest.approx(10)
    assert found["step_over_floor"] == pytest.approx(1.2)
    assert found["plain_over_floor"] == pytest.approx(1.25)
    assert found["host_gap_us"] == pytest.approx(100)
    assert found["cycle_cost"]["median"] == pytest.approx(1.2)
    assert found["over_reference"] == pytest.approx(4)
    gain = found["expected"]["GSM8K"]
    assert gain["over_plain"] == pytest.approx(5)
    assert gain["over_hf"] == pytest.approx(15)


def test_a_row_without_pytorch_claims_nothing_about_it() -> None:
    found = row(**OURS)
    assert found["over_reference"] is found["hf_step_ms"] is found["plain_over_hf"] is None
    assert found["expected"]["GSM8K"]["over_hf"] is None


def test_goals_are_met_and_missed() -> None:
    good = row(**OURS, **{HF: [Sample(0.030)], REFERENCE: [Sample(0.060)]})
    assert [goal["verdict"] for goal in judge_goals([good], dry_run=False)] == ["met", "met", "missed", "met"]
    assert [goal["value"] for goal in judge_goals([good], dry_run=False)][1] == 0.1


def test_goals_need_their_own_pair_and_no_dry_run() -> None:
    good = row(**OURS)
    other = {**good, "context": 8192}
    for rows, dry in (([good], True), ([other], False), ([], False)):
        assert {goal["verdict"] for goal in judge_goals(rows, dry_run=dry)} == {"not measured"}


def test_what_is_not_a_number_misses() -> None:
    assert {goal.judge(float("nan")) for goal in GOALS} == {"missed"}


def test_tokens_are_sorted_by_the_bound() -> None:
    assert classify_gaps((0.0, 0.5, 1.0, 1.1), 1.0) == (1, 2, 1)
    assert classify_gaps((float("nan"),), 1.0) == (0, 0, 1)


def test_drafting_ends_where_the_target_embeds_its_block() -> None:
    graphs = ["inject", "embed", "draft", "lm_head", "embed", "target", "lm_head", "accept"]
    assert drafting_ends([GraphRun(graph, (), ()) for graph in graphs]) == 4


# --- Budget ---


def test_a_part_that_does_not_fit_is_skipped_with_its_reason() -> None:
    clock = Clock()
    parts = Parts(Budget(60, clock), lambda: None)
    clock.now += 50
    assert parts.run("long", 11, lambda: pytest.fail("it was run")) is None
    assert parts.run("short", 10, lambda: "result") == "result"
    assert [part.state for part in parts.parts] == ["skipped", "done"]
    assert parts.parts[0].reason == "no time: it may take 11 s, and 10 s of 60 s are left"


def test_a_part_that_fails_does_not_stop_the_next() -> None:
    def ours() -> None:
        raise BackendError("no kernel", remedy="use another GPU")

    def foreign() -> None:
        raise ZeroDivisionError("of a library")

    def skips() -> None:
        raise SkippedError("no disk")

    seen: list[list[str]] = []
    parts = Parts(Budget(60), lambda: seen.append([part.state for part in parts.parts]))
    for name, work in (("ours", ours), ("foreign", foreign), ("skips", skips)):
        assert parts.run(name, 0, work) is None
    assert [part.state for part in parts.parts] == ["failed", "failed", "skipped"]
    assert "use another GPU" in str(parts.parts[0].reason)
    assert "ZeroDivisionError: of a library (" in str(parts.parts[1].reason)
    assert parts.parts[2].reason == "no disk"
    # Told at every beginning and every end, so that a report is never behind.
    assert seen[0] == ["running"]
    assert seen[-1] == ["failed", "failed", "skipped"]


@dataclass(frozen=True)
class System:
    name: str
    take: Callable[[], Sample]

    def decode(self, prompt: Sequence[int], steps: int) -> Sample:
        return self.take()


def contest(
    systems: Sequence[System], repeats: int, budget: Budget, **options: Any
) -> dict[str, list[Sample]]:
    results = measure(
        systems, [[1]], max_new_tokens=4, repeats=repeats, budget=budget, pause_seconds=0, **options
    )
    return {name: list(done.values()) for name, done in results.items()}


def test_systems_take_turns_and_stop_after_a_whole_repeat() -> None:
    clock, order = Clock(), []

    def take(name: str) -> Sample:
        order.append(name)
        clock.now += 5
        return Sample(len(order))

    systems = [System("a", lambda: take("a")), System("b", lambda: take("b"))]
    samples = contest(systems, 9, Budget(35, clock))
    assert order == ["a", "b", "a", "b", "b", "a"]
    # The first round warms up. A fourth would need 10 s where 5 are left.
    assert {name: [s.step_seconds for s in found] for name, found in samples.items()} == {
        "a": [3, 6],
        "b": [4, 5],
    }
    with pytest.raises(SkippedError, match="no time"):
        contest(systems, 9, Budget(15, clock))


def test_optional_systems_may_fail_and_others_may_not() -> None:
    def fails() -> Sample:
        raise RuntimeError("CUDA out of memory")

    missing: dict[str, str] = {}
    systems = [System(DRAFTED, lambda: Sample(1.0)), System(HF, fails)]
    samples = contest(systems, 2, Budget(60), optional=(HF,), missing=missing)
    assert samples == {DRAFTED: [Sample(1.0)] * 2}
    assert missing == {HF: "RuntimeError: CUDA out of memory"}
    with pytest.raises(RuntimeError):
        contest([System(DRAFTED, fails)], 2, Budget(60), optional=(HF,), missing=missing)


# --- Report ---


def report(**changes: Any) -> dict[str, Any]:
    return {
        "state": "finished",
        "created": "2026-11-23T12:00:00Z",
        "dry_run": False,
        "environment": None,
        "bytes_per_second": None,
        "backends": [],
        "parity": [],
        "rows": [],
        "goals": [],
        "goals_of": "the goals' pair",
        "parts": [],
        **changes,
    }


def test_names_tell_dry_runs_from_others() -> None:
    assert default_name("2026-11-23T12:00", "NVIDIA H100 80GB HBM3", dry_run=False) == (
        "gpu-2026-11-23-nvidia-h100-80gb-hbm3"
    )
    assert default_name("2026-11-23", None, dry_run=True) == "dry-run-2026-11-23-cpu"


def test_the_page_has_every_number_beside_its_verdict() -> None:
    found = row(**OURS, **{HF: [Sample(0.030)], REFERENCE: [Sample(0.048)]})
    page = to_markdown(report(rows=[found], goals=judge_goals([found], dry_run=False)))
    assert (
        "| qwen3-8b | bf16 | tensorrt | 1024 | 12.00 | 10.00 | 1.20 | 10.00 | 8.00 | 1.25 | 100.0 |" in page
    )
    assert "Random weights accept no drafts" in page
    assert "| GSM8K | 6.00 | 5.00 | 15.00 |" in page
    assert "| the host's gap between two steps is below 20 microseconds | 100.000 | missed |" in page
    assert DRY_RUN_WARNING not in page


def test_a_page_says_what_is_missing() -> None:
    parts = [{"name": "x", "state": "skipped", "seconds": 0.0, "reason": "no | disk\nat all"}]
    found = {**row(**OURS), "missing": {"hf": "40 GB of GPU memory needed"}}
    page = to_markdown(report(dry_run=True, state="running", rows=[found], parts=parts))
    assert DRY_RUN_WARNING in page
    assert "not complete: running" in page
    assert "| x | skipped | 0.0 | no \\| disk at all |" in page
    assert "hf not measured: 40 GB of GPU memory needed" in page


def test_what_is_not_finite_does_not_stop_the_report(tmp_path: Path) -> None:
    found = {**row(**OURS), "host_gap_us": float("nan"), "step_ms": float("inf")}
    write_report(tmp_path / "r.json", report(rows=[found]))
    (read,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert read["host_gap_us"] is read["step_ms"] is None
    assert "| nan |" in (tmp_path / "r.md").read_text()


def test_a_run_that_was_killed_keeps_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "r.json"
    mark_cut_off(path)  # killed before it wrote anything
    assert not path.exists()
    parts = [
        {"name": "first", "state": "done", "seconds": 1.0, "reason": None},
        {"name": "engines", "state": "running", "seconds": 0.0, "reason": None},
    ]
    write_report(path, report(state="running", rows=[row(**OURS)], parts=parts))
    mark_cut_off(path)
    found = json.loads(path.read_text())
    assert found["state"] == "cut off, the time was over, in: engines"
    assert [part["state"] for part in found["parts"]] == ["done", "failed"]
    assert len(found["rows"]) == 1
    assert "cut off" in path.with_suffix(".md").read_text()
    assert sorted(item.name for item in path.parent.iterdir()) == ["r.json", "r.md"]


def test_a_dry_run_never_measures_a_real_pair(tmp_path: Path) -> None:
    plan = make_plan(dry_run=True, scratch=tmp_path, pairs=["qwen3-8b"])
    assert plan.pairs == (TINY,)
    assert plan.device == "cpu"
    assert plan.output.name.startswith("dry-run-")
