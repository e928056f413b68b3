"""Making data and reading it back: greedy answers as Hugging Face gives them, resumed, batched, anchored."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_export.errors import CheckpointError, SourceError
from dflash_export.reference import generate_greedy
from dflash_rt.errors import OutputError
from examples.train_drafter.budget import Budget
from examples.train_drafter.dataset import Sequences, generator, read_sequences
from examples.train_drafter.generation import answer_greedily, make_data, plan_batches
from tests.examples.tiny_pair import prompts
from tests.pairs import TargetSpec, make_target

NEW = 40
STOP = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Few tokens and large weights: what comes next depends on everything before it."""
    spec = TargetSpec("qwen3", tied=False, vocab=250)
    return make_target(tmp_path_factory.mktemp("target"), spec, spread=0.6)


def make(target: Any, asked: list[list[int]], folder: Path, **changes: Any) -> tuple[bool, list[str]]:
    lines: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": NEW, "stop_token_ids": (STOP,), "batch": 4, "seed": 0}
    options |= {"prompt_source": "random ids"}
    options |= {"budget": Budget(None), "log": lines.append} | changes
    return make_data(target, asked, folder, **options), lines


# --- Answers ---


@pytest.mark.parametrize("stops", [(), tuple(range(0, 250, 20)), tuple(range(0, 250, 60))])
def test_answers_are_those_of_hugging_face(target: Any, stops: tuple[int, ...]) -> None:
    """In a batch whose rows end at different times, so that it shrinks on the way."""
    asked = prompts(16)
    answers = answer_greedily(target, asked, max_new_tokens=NEW, stop_token_ids=stops)
    expected = [
        list(generate_greedy(target, prompt, max_new_tokens=NEW, stop_token_ids=stops).token_ids)
        for prompt in asked
    ]
    assert answers == expected
    ends = {len(answer) for answer in answers}
    assert ends == {NEW} if not stops else len(ends) > 4


@pytest.mark.parametrize("stops", [(), tuple(range(0, 250, 20))])
def test_prompts_of_different_lengths_are_answered_together(target: Any, stops: tuple[int, ...]) -> None:
    """Also when a prompt contains a stop token, and when the shorter ones have ended."""
    asked = [prompt[:size] for prompt, size in zip(prompts(12, 30), range(4, 28, 2), strict=True)]
    answers = answer_greedily(target, asked, max_new_tokens=NEW, stop_token_ids=stops)
    assert not stops or set(asked[-1]) & set(stops)
    assert answers == [
        list(generate_greedy(target, prompt, max_new_tokens=NEW, stop_token_ids=stops).token_ids)
        for prompt in asked
    ]


def test_batches_have_prompts_of_similar_length() -> None:
    lengths = [3, 5, 3, 3, 5, 3, 3, 9]
    plan = plan_batches(lengths, 2, seed=1)
    assert sorted(itertools.chain(*plan)) == list(range(8))
    assert sorted(sorted(lengths[index] for index in batch) for batch in plan) == [
        [3, 3],
        [3, 3],
        [3, 5],
        [5, 9],
    ]
    assert plan_batches(lengths, 2, seed=1) == plan != plan_batches(lengths, 2, seed=2)


# --- Files ---


def test_an_interrupted_run_goes_on(target: Any, tmp_path: Path) -> None:
    asked = prompts(8, 5) + prompts(8, 7)
    done, _ = make(target, asked, tmp_path / "whole")
    assert done
    clock = itertools.count(step=10.0)  # every look at the clock takes ten seconds
    done, lines = make(target, asked, tmp_path / "parts", budget=Budget(1.0, lambda: next(clock)))
    assert not done
    assert "the same command goes on" in lines[-1]
    assert 0 < len(list((tmp_path / "parts").glob("batch-*"))) < 4
    done, lines = make(target, asked, tmp_path / "parts")
    assert done
    assert len(lines) < 4, "batches that were there are not made again"
    for whole in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "parts" / whole.name).read_bytes() == whole.read_bytes()
    again = read_sequences(tmp_path / "parts")
    assert len(again) == 16
    assert set(again.prompt_lengths[:4].tolist()) == {5, 7}, "the first ones are for validation"
    start, length = int(again.lengths[0]), int(again.lengths[1])
    second, prompt = again.ids[start : start + length].tolist(), int(again.prompt_lengths[1])
    assert second[:prompt] in asked
    assert second[prompt:] == list(
        generate_greedy(target, second[:prompt], max_new_tokens=NEW, stop_token_ids=(STOP,)).token_ids
    )


def test_other_settings_are_refused(target: Any, tmp_path: Path) -> None:
    make(target, prompts(2), tmp_path)
    with pytest.raises(OutputError, match=r"found: max_new_tokens 41\n.*expected: max_new_tokens 40"):
        make(target, prompts(2), tmp_path, max_new_tokens=41)
    with pytest.raises(OutputError, match="prompts_sha256"):
        make(target, prompts(2, 7), tmp_path)
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(OutputError, match="can't be used"):
        make(target, prompts(2), tmp_path)


def test_missing_and_damaged_data_is_refused(target: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nothing to train on"):
        read_sequences(tmp_path)
    make(target, prompts(2), tmp_path)
    path = next(tmp_path.glob("batch-*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="batch-000000"):
        read_sequences(tmp_path)


def test_settings_say_what_the_data_is(target: Any, tmp_path: Path) -> None:
    make(target, prompts(3), tmp_path)
    found = json.loads((tmp_path / "data.json").read_text())
    assert (found["prompts"], found["max_new_tokens"], found["stop_token_ids"]) == (3, NEW, [STOP])


def test_a_budget_leaves_room_for_the_longest_piece() -> None:
    now = iter([0.0, 1.0, 21.0, 30.0, 45.0])
    budget = Budget(1.0, lambda: next(now))
    assert budget.allows_another(None)
    assert budget.allows_another(budget.seconds)  # from 1 to 21: another 20 end at 41
    assert not budget.allows_another(budget.seconds)  # from 30 to 45: another 20 would end at 65
    assert Budget(None).allows_another(0.0)


# --- Batches ---


def sequences() -> Sequences:
    lengths, prompt_lengths = torch.tensor([10, 4, 20, 7]), torch.tensor([3, 2, 5, 4])
    return Sequences(torch.arange(41, dtype=torch.int32), lengths, prompt_lengths)


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_anchors_lie_in_the_answers(fixed_shape: bool) -> None:
    """From the first token of the answer to the last but one, each at most once; all of them when asked."""
    data, chosen = sequences(), torch.tensor([2, 1, 0])
    seen: list[set[int]] = [set(), set(), set()]
    for step in range(30):
        batch = data.batch(chosen, 6, generator(0, step), fixed_shape=fixed_shape)
        assert batch.ids.shape[1] == (128 if fixed_shape else 20)
        assert batch.anchors.shape[1] == 6
        for row, (anchors, real) in enumerate(zip(batch.anchors, batch.real, strict=True)):
            drawn = anchors[real].tolist()
            assert drawn == sorted(set(drawn))
            seen[row] |= set(drawn)
        assert batch.real.sum(1).tolist() == [6, 1, 6]
    assert seen == [set(range(5, 19)), {2}, set(range(3, 9))]
    assert batch.ids[1, :5].tolist() == [10, 11, 12, 13, 0]


def test_every_sequence_once_in_each_pass() -> None:
    data = sequences()
    drawn = torch.cat([data.shuffled(step, 2, seed=0, skip=1) for step in range(6)]).tolist()
    assert [sorted(drawn[start : start + 3]) for start in range(0, 12, 3)] == [[1, 2, 3]] * 4
    assert len({tuple(drawn[start : start + 3]) for start in range(0, 12, 3)}) > 1
