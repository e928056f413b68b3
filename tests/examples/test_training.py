"""Training: what it learns, that an interruption changes nothing, and what it writes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import DFlashDraftModel

from dflash_export.drafters.read import load_drafter_config
from dflash_export.errors import CheckpointError, PairError, RecipeError, UnsupportedModelError
from dflash_export.sources.resolve import open_weights, resolve_drafter
from dflash_rt.errors import NumericalError
from examples.train_drafter.blocks import position_weights
from examples.train_drafter.budget import Budget
from examples.train_drafter.dataset import Sequences, read_sequences
from examples.train_drafter.drafter import (
    Drafter,
    check_written,
    continued_drafter,
    new_drafter,
    write_drafter,
)
from examples.train_drafter.evaluation import evaluate
from examples.train_drafter.generation import make_data
from examples.train_drafter.target import Target
from examples.train_drafter.training import Trainer, TrainOptions, default_gamma, schedule, steps_through
from tests.examples.tiny_pair import MASK, as_target, make_chain_target, prompts

OPTIONS = TrainOptions(steps=8, batch=4, anchors=6, validation=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("target")
    return as_target(make_chain_target(folder), folder)


@pytest.fixture(scope="module")
def sequences(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    folder = tmp_path_factory.mktemp("data")
    asked = prompts(96)
    options: dict[str, Any] = {"max_new_tokens": 32, "stop_token_ids": (), "batch": 32, "seed": 0}
    options |= {"prompt_source": "random ids"}
    make_data(target.model, asked, folder, budget=Budget(None), log=lambda _: None, **options)
    return read_sequences(folder)


def fresh(target: Target, **changes: Any) -> Drafter:
    options: dict[str, Any] = {"layers": 2, "block_size": 4, "feature_layers": None, "seed": 0}
    return new_drafter(target, mask_token_id=MASK, **options | changes)


def trainer(target: Target, data: Sequences, options: TrainOptions = OPTIONS, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {"dtype": torch.float32, "compiled": False, "log": lambda _: None} | changes
    drafter = settings.pop("drafter", None) or fresh(target)
    return Trainer(drafter, target.model, data, options, **settings)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.drafter.model.state_dict().items()}


# --- Learning ---


def test_acceptance_rises_on_prompts_that_training_never_saw(
    target: Target, sequences: Sequences, tmp_path: Path
) -> None:
    """By the reference's own loop, from the files that are written."""
    unseen = prompts(104)[96:]
    lines: list[str] = []
    options = TrainOptions(steps=150, batch=16, anchors=12, validation=8, learning_rate=5e-3)
    run = trainer(target, sequences, options, log=lines.append)
    write_drafter(tmp_path / "before", run.drafter)
    outcome = run.run(tmp_path / "state", call=Budget(None))
    write_drafter(tmp_path / "after", run.drafter)
    assert outcome.finished
    scores = {
        name: evaluate(tmp_path / name, target, unseen, widths=(2, 4), max_new_tokens=24, log=lines.append)
        for name in ("before", "after")
    }
    before, after = ([score.tokens_per_step for score in scores[name]] for name in ("before", "after"))
    assert before[1] < 1.6
    assert after[0] > before[0] + 0.3
    assert after[1] > before[1] + 1.0
    assert [point["step"] for point in outcome.curve] == [0, 150]
    assert outcome.curve[0]["tokens_per_step"] < 1.6
    assert outcome.curve[1]["tokens_per_step"] > 2
    assert any(line.startswith("train: step 20, loss ") and "tokens a step" in line for line in lines)


def test_embedding_and_head_are_neither_trained_nor_stored(
    target: Target, sequences: Sequences, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    run = trainer(target, sequences)
    start = weights(run)
    run.run(tmp_path / "state", call=Budget(None))
    assert all(torch.equal(before[name], value) for name, value in target.model.state_dict().items())
    after = weights(run)
    assert all(not torch.equal(start[name], after[name]) for name in start)
    assert not any("embed" in name or "head" in name for name in after)


# --- Interruption ---


def test_a_resumed_run_gives_the_same_weights(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    whole = trainer(target, sequences)
    whole.run(tmp_path / "whole", call=Budget(None))
    clock = itertools.count(step=10.0)
    steps = []
    for _ in range(8):
        part = trainer(target, sequences, drafter=fresh(target, seed=9))  # overwritten from the second on
        if not steps:
            part.drafter.model.load_state_dict(fresh(target).model.state_dict())
        outcome = part.run(tmp_path / "parts", call=Budget(2.0, lambda: next(clock)))
        steps.append(outcome.step)
        if outcome.finished:
            break
    assert steps[-1] == 8
    assert len(steps) > 2, "it was interrupted more than once"
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in weights(part).items())


def test_a_budget_ends_a_run(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    """Minutes of all calls together are the end of the schedule; the rate has fallen to nothing by then."""
    clock = itertools.count(step=3.0)
    options = TrainOptions(minutes=2.0, batch=4, anchors=6, validation=4)
    lines: list[str] = []
    outcome = trainer(target, sequences, options, log=lines.append).run(
        tmp_path / "state", call=Budget(1.0, lambda: next(clock)), log_every=1
    )
    assert not outcome.finished
    assert 30 < outcome.seconds < 90
    again = trainer(target, sequences, options, log=lines.append)
    ended = again.run(tmp_path / "state", call=Budget(None, lambda: next(clock)), log_every=1)
    assert ended.finished
    assert ended.step > outcome.step
    rates = [float(line.split("rate ")[1].split(",")[0]) for line in lines if line.startswith("train: step")]
    assert rates[-1] < 0.1 * max(rates)


def test_a_checkpoint_of_another_run_is_refused(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    path = tmp_path / "state"
    trainer(target, sequences).run(path, call=Budget(None))
    other = TrainOptions(steps=9, batch=4, anchors=6, validation=4, learning_rate=5e-3)
    with pytest.raises(RecipeError, match=r"found: steps 9\n.*expected: steps 8"):
        trainer(target, sequences, other).run(path, call=Budget(None))
    with pytest.raises(RecipeError, match=r"found: config .*'block_size': 5"):
        trainer(target, sequences, drafter=fresh(target, block_size=5)).run(path, call=Budget(None))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="can't be read"):
        trainer(target, sequences).run(path, call=Budget(None))


def test_a_loss_that_is_not_finite_ends_it(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    run = trainer(target, sequences)
    run.drafter.model.norm.weight.data[0] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        run.run(tmp_path / "state", call=Budget(None), log_every=1)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("validation", [0, 4])
@pytest.mark.parametrize("where", ["weights", "moments"])
def test_what_is_not_finite_never_replaces_a_checkpoint(
    target: Target, sequences: Sequences, tmp_path: Path, validation: int, where: str
) -> None:
    """Neither at the end nor at a checkpoint on the way, whether or not anything else looks."""
    path = tmp_path / "state"
    options = TrainOptions(steps=8, batch=4, anchors=6, validation=validation)
    clock = itertools.count(step=10.0)
    trainer(target, sequences, options).run(path, call=Budget(1.0, lambda: next(clock)))
    good = path.read_bytes()

    class Broken(Trainer):
        def _step(self, progress: float) -> tuple[torch.Tensor, torch.Tensor, float]:
            result = super()._step(progress)
            weight = self.drafter.model.norm.weight
            broken = weight if where == "weights" else self._optimizer.state[weight]["exp_avg_sq"]
            broken.data[0] = math.nan
            return result

    for minutes in (5.0, 0.0):
        run = Broken(
            fresh(target),
            target.model,
            sequences,
            options,
            dtype=torch.float32,
            compiled=False,
            log=lambda _: None,
        )
        with pytest.raises(NumericalError, match=r"not finite at step(.|\n)*lower --learning-rate"):
            run.run(path, call=Budget(None, lambda: next(clock)), checkpoint_minutes=minutes)
        assert path.read_bytes() == good
    assert trainer(target, sequences, options).run(path, call=Budget(None)).finished


def test_a_run_that_has_ended_is_left_alone(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    first = trainer(target, sequences)
    ended = first.run(tmp_path / "state", call=Budget(None))
    written = (tmp_path / "state").read_bytes()
    assert [point["step"] for point in ended.curve] == [0, 8]
    again = trainer(target, sequences, drafter=fresh(target, seed=9))
    assert again.run(tmp_path / "state", call=Budget(None)) == ended
    assert (tmp_path / "state").read_bytes() == written
    expected = weights(first)
    assert all(torch.equal(expected[name], value) for name, value in weights(again).items())


def test_a_step_is_validated_once(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    """Also where each step is a checkpoint, the last one of a call too."""
    clock = itertools.count(step=10.0)
    for _ in range(8):
        outcome = trainer(target, sequences).run(
            tmp_path / "state",
            call=Budget(2.0, lambda: next(clock)),
            checkpoint_minutes=0,
            validation_share=math.inf,
        )
    assert outcome.finished
    assert [point["step"] for point in outcome.curve] == list(range(9))


def test_validation_takes_no_more_than_its_share(
    target: Target, sequences: Sequences, tmp_path: Path
) -> None:
    """Each step is a checkpoint and takes 10 s, a validation 100: a fifth of the time is one in 50 steps."""
    seconds = [0.0]

    class Slow(Trainer):
        def validate(self) -> None:
            before = len(self.outcome.curve)
            super().validate()
            seconds[0] += 100.0 * (len(self.outcome.curve) - before)

        def _step(self, progress: float) -> tuple[torch.Tensor, torch.Tensor, float]:
            seconds[0] += 10.0
            return super()._step(progress)

    def steps_validated(share: float) -> list[float]:
        options = replace(OPTIONS, steps=120)
        settings: dict[str, Any] = {"dtype": torch.float32, "compiled": False, "log": lambda _: None}
        run = Slow(fresh(target), target.model, sequences, options, **settings)
        outcome = run.run(
            tmp_path / str(share),
            call=Budget(None, lambda: seconds[0]),
            checkpoint_minutes=0,
            validation_share=share,
        )
        return [point["step"] for point in outcome.curve]

    assert steps_validated(math.inf) == list(range(121))
    assert steps_validated(0.2) == [0, 50, 100, 120]


@pytest.mark.parametrize(("batch", "anchors"), [(1, 31), (3, 64), (5, 10), (16, 7), (2, 1)])
def test_validation_takes_every_sequence_once(
    target: Target, sequences: Sequences, batch: int, anchors: int
) -> None:
    """Every place is an anchor once and nothing is drawn: the batches can't show, but for rounding."""
    options = TrainOptions(steps=1, batch=batch, anchors=anchors, validation=7)
    run = trainer(target, sequences, options)
    run.validate()
    found = run.outcome.curve[-1]
    alone = [trainer(target, sequences, TrainOptions(steps=1, batch=7, anchors=64, validation=7))]
    alone[0].validate()
    assert found == pytest.approx(alone[0].outcome.curve[-1], abs=2e-4)
    fewer = trainer(target, sequences, TrainOptions(steps=1, batch=7, anchors=64, validation=6))
    fewer.validate()
    assert abs(fewer.outcome.curve[-1]["loss"] - found["loss"]) > 1e-3, "one sequence less shows"


def test_validation_counts_the_steps_that_decoding_takes(
    target: Target, sequences: Sequences, tmp_path: Path
) -> None:
    """Beside the reference's own loop on the same prompts, up to its narrower last blocks."""
    run = trainer(target, sequences, TrainOptions(steps=60, batch=16, learning_rate=5e-3, validation=12))
    run.run(tmp_path / "state", call=Budget(None))
    write_drafter(tmp_path / "drafter", run.drafter)
    found = run.outcome.curve[-1]["tokens_per_step"]
    sizes, prompt_sizes = sequences.lengths[:12].tolist(), sequences.prompt_lengths[:12].tolist()
    asked = [
        ids[:size].tolist()
        for ids, size in zip(torch.split(sequences.ids[: sum(sizes)], sizes), prompt_sizes, strict=True)
    ]
    options: dict[str, Any] = {"widths": [4], "max_new_tokens": 32, "log": lambda _: None}
    (score,) = evaluate(tmp_path / "drafter", target, asked, **options)
    assert (score.tokens, score.prompts) == (31 * 12, 12)
    assert 1.5 < found < 3.9
    assert abs(score.tokens / found - score.steps) < 2


def test_steps_through_an_answer() -> None:
    assert steps_through([1, 1, 1]) == 3
    assert steps_through([2, 9, 1, 3]) == 3
    assert steps_through([4, 1, 1]) == 1
    assert steps_through([]) == 0


def test_options_that_cannot_work_are_refused(target: Target, sequences: Sequences) -> None:
    with pytest.raises(RecipeError, match="no end"):
        TrainOptions()
    with pytest.raises(RecipeError, match="too little data"):
        trainer(target, sequences, TrainOptions(steps=1, validation=96))


def test_gamma_weighs_the_loss_by_position(target: Target, sequences: Sequences) -> None:
    assert position_weights(4, 2).tolist() == pytest.approx([1, math.exp(-0.5), math.exp(-1)])
    losses = []
    for gamma in (1e-3, 1e6):  # the first draft alone; all alike
        options = TrainOptions(steps=1, batch=4, anchors=6, validation=8, gamma=gamma)
        run = trainer(target, sequences, options)
        run.validate()
        losses.append(run.outcome.curve[-1]["loss"])
    assert abs(losses[0] - losses[1]) > 0.01


# --- Precision, and what a GPU runs ---


def test_autocast_trains_float32_weights(target: Target, sequences: Sequences, tmp_path: Path) -> None:
    outcomes = []
    for dtype in (torch.float32, torch.bfloat16):
        run = trainer(target, sequences, dtype=dtype)
        outcomes.append(run.run(tmp_path / str(dtype), call=Budget(None)))
        assert {value.dtype for value in run.drafter.model.parameters()} == {torch.float32}
    exact, rounded = (outcome.curve[-1]["loss"] for outcome in outcomes)
    assert exact != rounded
    assert abs(exact - rounded) < 0.05 * exact


# --- The drafter ---


def test_a_new_drafter_starts_from_the_targets_last_layers(target: Target) -> None:
    drafter = fresh(target)
    own, source = drafter.model.layers, target.model.model.layers
    for layer, other in zip(own, source[-2:], strict=True):
        given = other.state_dict()
        assert all(torch.equal(value, given[name]) for name, value in layer.state_dict().items())
    assert torch.equal(drafter.model.norm.weight, target.model.model.norm.weight)
    assert drafter.config.feature_layers == (1, 0)
    passed_through = drafter.model.fc.weight[:, 32:]
    assert (passed_through.diagonal() - 1).abs().max() < 0.1
    assert drafter.model.fc.weight.std() > 0.001
    assert "24 of 25 tensors" in drafter.start


def test_what_does_not_fit_stays_random(target: Target) -> None:
    """Biases and stacked experts, say: here a target whose middle layers are wider."""
    target.model.model.layers[-1].mlp.down_proj.weight.data = torch.zeros(32, 50)
    try:
        drafter = fresh(target)
    finally:
        target.model.model.layers[-1].mlp.down_proj.weight.data = torch.zeros(32, 48)
    assert drafter.model.layers[1].mlp.down_proj.weight.abs().sum() > 0
    assert "23 of 25 tensors" in drafter.start


def test_what_is_written_is_read_by_both(target: Target, tmp_path: Path) -> None:
    drafter = fresh(target, feature_layers=[0, 2])
    write_drafter(tmp_path, drafter)
    check_written(tmp_path, target.source, max_seq_len=128)
    source = resolve_drafter(tmp_path)
    assert load_drafter_config(source) == drafter.config
    reference = DFlashDraftModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    with open_weights(source) as stored:
        assert sorted(reference) == stored.names()
        for name, value in drafter.model.state_dict().items():
            assert stored.dtype(name) == torch.bfloat16
            assert torch.equal(stored.load(name, torch.float32), value.bfloat16().float())
            assert torch.equal(reference[name], value.bfloat16().float())


def test_taps_and_mask_are_checked_against_the_target(target: Target, tmp_path: Path) -> None:
    write_drafter(tmp_path, fresh(target, feature_layers=[0, 7]))
    with pytest.raises(PairError, match="7"):
        check_written(tmp_path, target.source, max_seq_len=128)
    with pytest.raises(RecipeError, match="more layers than the target"):
        fresh(target, layers=4)


def test_training_goes_on_from_a_drafter(target: Target, tmp_path: Path) -> None:
    write_drafter(tmp_path, fresh(target, seed=4))
    same, wider = (continued_drafter(str(tmp_path), block_size=size) for size in (None, 6))
    assert (same.config.block_size, wider.config.block_size) == (4, 6)
    stored = DFlashDraftModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in same.model.state_dict().items())
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"layer_types": ["sliding_attention", "full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        continued_drafter(str(tmp_path), block_size=None)


@pytest.mark.parametrize(("block_size", "gamma"), [(8, 4), (10, 5), (16, 7), (4, 2), (13, 6), (2, 1)])
def test_gamma_follows_the_paper(block_size: int, gamma: float) -> None:
    assert default_gamma(block_size) == gamma


def test_schedule() -> None:
    rates = [schedule(share / 100, 0.04) for share in range(101)]
    assert max(rates) == rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert rates[-1] == pytest.approx(0)
