"""The commands: everything in one, in parts that go on, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from examples.train_drafter.__main__ import main
from tests.examples.tiny_pair import MASK, make_chain_target

DATA = ["--prompts", "112", "--max-new-tokens", "20", "--data-batch", "28"]
SIZES = ["--layers", "2", "--taps", "0,2", "--mask-token-id", str(MASK), "--block-size", "4"]
TRAIN = [*SIZES, "--batch", "8", "--anchors", "8", "--validation", "8", "--learning-rate", "5e-3"]
EVALUATE = ["--widths", "4", "--evaluation-tokens", "16", "--limit", "5"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    make_chain_target(folder)
    # Of one length, for few batches.
    texts = [f"Say {first}{second}" for first in "abcd" for second in "efghijklmnopqrstuvwxyzABCDEFG1"]
    (folder / "prompts.txt").write_text("\n".join(texts))
    (folder / "held.txt").write_text("\n".join(f"Say {last}{last}" for last in "ghijkl"))
    return folder


def own(target: Path) -> list[str]:
    return ["--prompt-file", str(target / "prompts.txt"), *DATA]


def call(command: str, target: Path, output: Path, *more: str) -> Result:
    common = [command, "--target", str(target), "--output", str(output), "--device", "cpu"]
    if "--held-out" not in more:
        common += ["--held-out", str(target / "held.txt")]
    return CliRunner().invoke(main, [*common, *more], catch_exceptions=False)


def repeat(most: int, *arguments: Any) -> int:
    """Repeat a call that has time for one piece of work until it is done; returns how often."""
    for calls in range(1, most + 1):
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        if "out of time" not in result.stderr and "stopped at step" not in result.stderr:
            return calls
    raise AssertionError(f"not done after {most} calls")


def record(output: Path, name: str) -> Any:
    return json.loads((output / name).read_text())


def test_one_command_makes_a_drafter_with_a_card(target: Path, tmp_path: Path) -> None:
    result = call("run", target, tmp_path, *own(target), *TRAIN, *EVALUATE, "--steps", "120")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["drafters"]
    before, after = (scores[name][0]["tokens_per_step"] for name in ("initial", "drafter"))
    assert after > before + 1
    training = record(tmp_path, "training.json")
    card = (tmp_path / "drafter" / "README.md").read_text()
    for fact in (
        f"Trained on {training['sequences']} sequences with {training['new_tokens']:,} answer tokens; 8 more",
        "at most 20 tokens each; prompts: prompts.txt",
        "120 steps",
        "2 layers, hidden 32, blocks of 4, features of target layers 0, 2, mask token 299",
        "cross entropy weighted by exp(-(k-1)/2)",
        f"| drafter | 4 | {after:.3f} |",
        f"| initial | 4 | {before:.3f} |",
        "5 held-out prompts",
    ):
        assert fact in card
    assert training["sequences"] == 112 - 8
    assert training["new_tokens"] == (112 - 8) * 20
    assert training["outcome"]["finished"]


@pytest.mark.slow
def test_parts_that_go_on_are_the_same_as_one_command(target: Path, tmp_path: Path) -> None:
    """Data and training in calls of their own, each repeated until it is done."""
    options = [*TRAIN, "--steps", "12"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call("run", target, whole, *own(target), *options, *EVALUATE).exit_code == 0
    assert repeat(4, "data", target, parts, *own(target), "--data-minutes", "1e-6") == 4
    assert sorted(path.name for path in (parts / "data").iterdir()) == sorted(
        path.name for path in (whole / "data").iterdir()
    )
    assert repeat(12, "train", target, parts, *options, "--stop-after", "1e-6") == 12
    for name in ("model.safetensors", "config.json"):
        assert (parts / "drafter" / name).read_bytes() == (whole / "drafter" / name).read_bytes()
    assert "Not evaluated yet." in (parts / "drafter" / "README.md").read_text()
    assert call("evaluate", target, parts, *EVALUATE).exit_code == 0
    assert record(parts, "evaluation.json") == record(whole, "evaluation.json")
    assert "held-out prompts, up to" in (parts / "drafter" / "README.md").read_text()


@pytest.mark.slow
def test_one_command_goes_on_where_time_ended_it(target: Path, tmp_path: Path) -> None:
    """First with the data until it is whole, then with training until its end, and then it measures."""
    options = [*TRAIN, "--steps", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call("run", target, whole, *own(target), *options, *EVALUATE).exit_code == 0
    limits = ["--data-minutes", "1e-6", "--stop-after", "1e-6"]
    said = []
    for _ in range(6):
        result = call("run", target, parts, *own(target), *options, *EVALUATE, *limits)
        assert result.exit_code == 0, result.output
        said.append("data" if "with the data" in result.stderr else "train" if not result.stdout else "end")
        assert (parts / "state.safetensors").exists() == (said[-1] != "data")
    # A call's first batch and its first step are always made, so that each call gets on.
    assert said == ["data"] * 3 + ["train"] * 2 + ["end"]
    for name in ("drafter/model.safetensors", "evaluation.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    card = (parts / "drafter" / "README.md").read_bytes()
    assert call("run", target, parts, *own(target), *options, *EVALUATE).exit_code == 0
    assert (parts / "drafter" / "README.md").read_bytes() == card, "a run that has ended stays as it is"


@pytest.mark.parametrize("command", ["data", "run"])
def test_no_data_is_added_once_training_has_begun(target: Path, tmp_path: Path, command: str) -> None:
    """Whoever trains on part of the data goes on with that part."""
    options = [*TRAIN, "--steps", "2"]
    assert call("data", target, tmp_path, *own(target), "--data-minutes", "1e-6").exit_code == 0
    assert call("train", target, tmp_path, *options, "--stop-after", "1e-6").exit_code == 0
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    result = call(command, target, tmp_path, *own(target), *(options if command == "run" else []))
    assert result.exit_code == 1
    assert "training has begun on part of the data" in result.stderr
    assert "1 of 4 batches" in result.stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
    assert call("train", target, tmp_path, *options).exit_code == 0
    assert record(tmp_path, "training.json")["outcome"]["finished"]


def test_a_drafter_to_train_on(target: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("data", target, first, *own(target)).exit_code == 0
    assert call("train", target, first, *TRAIN, "--steps", "2").exit_code == 0
    (second / "data").mkdir(parents=True)
    for path in (first / "data").iterdir():
        (second / "data" / path.name).write_bytes(path.read_bytes())
    more = ["--init-from", str(first / "drafter"), "--validation", "8", "--batch", "4", "--steps", "1"]
    assert call("train", target, second, *more).exit_code == 0
    assert record(second, "training.json")["start"] == "the weights of drafter"
    initial, trained = (
        (folder / "model.safetensors").read_bytes() for folder in (second / "initial", second / "drafter")
    )
    assert initial == (first / "drafter" / "model.safetensors").read_bytes() != trained


@pytest.mark.parametrize(
    ("command", "options", "fragment"),
    [
        ("train", ["--steps", "1"], "nothing to train on"),
        ("evaluate", [], "no initial and no drafter"),
    ],
)
def test_errors_are_messages(
    target: Path, tmp_path: Path, command: str, options: list[str], fragment: str
) -> None:
    result = call(command, target, tmp_path, *options)
    assert result.exit_code == 1
    assert fragment in result.stderr
    assert "what to do: " in result.stderr


def test_options_that_cannot_work_are_refused(target: Path, tmp_path: Path) -> None:
    assert call("data", target, tmp_path, "--prompts", "12", "--max-new-tokens", "4").exit_code == 0
    for options, fragment in (
        (["--steps", "1"], "no --mask-token-id"),
        (["--steps", "1", "--mask-token-id", "4", "--taps", "0;1"], "--taps is wrong"),
        (["--mask-token-id", "4"], "neither steps nor minutes"),
        (["--steps", "1", "--init-from", str(target), "--taps", "1"], "--taps with --init-from"),
        (["--steps", "1", "--mask-token-id", "4", "--taps", "0,9"], "9"),
        (["--steps", "1", *SIZES, "--compile"], "--compile needs CUDA"),
    ):
        result = call("train", target, tmp_path, "--validation", "4", *options)
        assert result.exit_code == 1
        assert fragment in result.stderr


def test_held_out_prompts_of_ones_own(target: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("What is jazz?\n")
    output = tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("what is JAZZ\nWhat is tea?\n")
    files = ["--prompt-file", str(tmp_path / "prompts.txt"), "--held-out", str(tmp_path / "held.txt")]
    result = call("data", target, output, *files)
    assert (result.exit_code, "held-out prompts in it" in result.stderr) == (1, True)


def test_a_target_without_a_chat_template_is_refused(target: Path, tmp_path: Path) -> None:
    for path in target.iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    result = call("data", tmp_path, tmp_path / "run")
    assert (result.exit_code, "no chat template" in result.stderr) == (1, True)


@pytest.mark.parametrize("command", ["data", "train", "evaluate", "run"])
def test_help(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "--target" in result.output


def test_prompts_that_cannot_be_had_are_told(target: Path, tmp_path: Path) -> None:
    result = call("data", target, tmp_path, "--self-prompts", "4")
    assert result.exit_code == 1
    assert "the target can't be asked for prompts" in result.stderr
    result = call("data", target, tmp_path, "--prompts", "0")
    assert result.exit_code == 1
    assert "there is nothing to ask the target" in result.stderr
