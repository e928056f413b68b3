"""Replays of recorded answers: counts by hand, and a recording of a random pair."""

from __future__ import annotations

from pathlib import Path

from benchmarks.width_replay import Answer, record, replay, replay_adaptive, steps, table
from dflash_export import build
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.decoding.policy import FixedWidth
from dflash_rt.speculation.width_correction import StepCosts
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target, run_loop

COSTS = StepCosts((2.0, 3.0, 4.0))
ANSWERS = [Answer("some", (1, 0, 2, 2, 0, 0, 1, 0)), Answer("none", (0,) * 8)]


def test_steps_by_hand() -> None:
    assert steps(ANSWERS[0], FixedWidth(1), COSTS) == 8
    assert steps(ANSWERS[0], FixedWidth(2), COSTS) == 5 * 1.5  # from tokens 0, 2, 4, 5 and 6
    assert steps(ANSWERS[0], FixedWidth(3), COSTS) == 4 * 2  # from tokens 0, 2, 5 and 6


def test_rates_by_hand() -> None:
    found = replay(ANSWERS, COSTS, lambda: FixedWidth(3))
    assert found.overall == 16 / (8 + 16)
    assert found.lowest == 8 / 16


def test_the_policy_that_adapts_depends_on_the_order_only() -> None:
    answers = [Answer("all", (2,) * 100), Answer("none", (0,) * 100)]
    found = {replay_adaptive(answers, COSTS, seed) for seed in range(8)}
    assert found == {replay_adaptive(answers, COSTS, seed) for seed in range(8)}
    assert len(found) == 2
    assert all(one.overall > 1.05 and one.lowest > 0.98 for one in found)


def test_table() -> None:
    lines = table(ANSWERS, COSTS).splitlines()
    assert lines[1:4] == [
        "width  1     1.000  1.000",
        f"width  2     {16 / (7.5 + 12):.3f}  {8 / 12:.3f}",
        f"width  3     {16 / (8 + 16):.3f}  {8 / 16:.3f}",
    ]
    assert lines[4] == f"best of each {16 / (7.5 + 8):.3f}"
    assert lines[5].startswith("adaptive")


def test_a_recording_is_what_a_fresh_start_at_each_position_gives(tmp_path: Path) -> None:
    spec = TargetSpec("qwen3", vocab=5, layers=2)
    make_target(tmp_path / "target", spec, spread=0.3)
    make_drafter(tmp_path / "drafter", drafter_config(spec), spread=0.3)
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle", prefill_chunk=8)
    prompt, backend = [3, 1, 4, 1, 0, 2, 2, 3, 1, 1], OnnxRuntimeBackend(bundle, threads=1)
    answer = record(backend, "random", prompt, block=4, chunk=8, stops=set())
    tokens = run_loop(backend, bundle, prompt, 128, 1).token_ids
    found = [run_loop(backend, bundle, prompt + tokens[:i], 9, 4).accepted[0] for i in range(60)]
    assert len(answer.confirmed) == 127
    assert found == list(answer.confirmed[:60])
    assert len(set(found)) > 2
