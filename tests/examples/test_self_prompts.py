"""Prompts that the target writes: where it begins, what it may choose, and which of them are kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from dflash_export.errors import RecipeError
from dflash_rt.errors import OutputError, PromptError
from dflash_rt.text.prompts import PromptEncoder
from dflash_rt.text.tokenizer import Tokenizer
from examples.train_drafter.__main__ import main
from examples.train_drafter.prompts import normalised
from examples.train_drafter.self_prompts import (
    BEGINNINGS,
    _sample,
    opening,
    read_beginnings,
    self_prompts,
    write_prompts,
)
from examples.train_drafter.target import Target
from tests.checkpoints import byte_tokenizer
from tests.examples.tiny_pair import TEMPLATE, as_target
from tests.pairs import TargetSpec, make_target

TURNS = "{% for message in messages %}U:{{ message.content }}!{% endfor %}A:"
STOPS = (*range(0, 30, 2), 200, 210, 220)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    model = make_target(folder, TargetSpec("qwen3", tied=False, vocab=250), spread=0.3)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    encoder = PromptEncoder(Tokenizer(folder / "tokenizer.json"), TURNS, None, None, {})
    return replace(as_target(model, folder), encoder=encoder, stop_token_ids=STOPS)


def write(target: Target, count: int, **changes: Any) -> list[str]:
    options: dict[str, Any] = {"batch": 64, "seed": 3, "held_out": (), "log": lambda line: None}
    options["beginnings"] = ()
    return self_prompts(target, count, **options | changes)


def test_a_chat_opens_with_what_all_chats_share(target: Target) -> None:
    assert target.decode(opening(target)) == "U:"
    assert opening(target) == target.encode(["Say"])[0][:2]


def test_a_template_that_opens_nothing_is_refused(target: Target) -> None:
    bare = replace(target, encoder=replace(target.encoder, chat_template=TEMPLATE))
    with pytest.raises(RecipeError, match="can't be asked for prompts"):
        opening(bare)


def test_tokens_are_samples_of_the_softmax_without_unlikely_ones() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.2, -5.0])
    draws, most = 60_000, 16.3  # of chi-square with 3 degrees of freedom, in 999 of 1,000 cases
    tokens = _sample(logits.expand(draws, -1), torch.Generator().manual_seed(1))
    kept = logits[:4].softmax(0)  # exp(-3.2) is below a twentieth
    counts = Counter(tokens.tolist())
    assert set(counts) == {0, 1, 2, 3}
    expected = (draws * kept).tolist()
    assert sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected)) < most


def test_prompts_are_distinct_whole_and_not_held_out(target: Target) -> None:
    prompts = write(target, 40)
    assert len({normalised(prompt) for prompt in prompts}) == 40
    assert all(len(normalised(prompt).split()) > 1 for prompt in prompts)
    assert write(target, 40) == prompts != write(target, 40, seed=4)
    held = [prompts[3].upper(), prompts[17]]
    others = write(target, 40, held_out=held)
    assert others[:38] == [prompt for prompt in prompts if prompt not in (prompts[3], prompts[17])]


@pytest.mark.parametrize("batch", [1, 64])
def test_every_second_prompt_is_given_its_first_words(target: Target, batch: int) -> None:
    """One beginning after the other."""
    prompts = write(target, 30, beginnings=["How do", "Tell me"], batch=batch)
    begun = Counter(prompt.split()[0] for prompt in prompts if prompt.startswith(("How do", "Tell me")))
    assert 5 <= begun["How"] <= 10
    assert 5 <= begun["Tell"] <= 10
    assert sum(begun.values()) < 20


def test_first_words_alone_are_no_prompt(target: Target) -> None:
    brief = replace(target, stop_token_ids=tuple(range(0, 250, 2)))
    prompts = write(brief, 12, beginnings=["How do", "Tell me"])
    assert any(prompt.startswith("How do") for prompt in prompts)
    assert not {"How do", "Tell me"} & set(prompts)


def test_beginnings_are_lines_of_a_file(tmp_path: Path) -> None:
    shipped = read_beginnings(BEGINNINGS)
    assert len(shipped) == len(set(shipped)) > 50
    path = tmp_path / "own.txt"
    path.write_text(" Wie \n\nWarum\n", encoding="utf-8")
    assert read_beginnings(path) == ["Wie", "Warum"]
    path.write_bytes(b"\xff")
    for wrong in (path, tmp_path / "none.txt"):
        with pytest.raises(PromptError, match="can't be read"):
            read_beginnings(wrong)


def test_a_target_with_nothing_to_say_is_refused(target: Target) -> None:
    with pytest.raises(RecipeError, match="too few prompts of its own"):
        write(replace(target, stop_token_ids=()), 5)


def test_the_command_asks_the_target(target: Target, folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TURNS}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    (tmp_path / "own.txt").write_text("Wo ist\n")

    def data(*options: str) -> Result:
        common = [
            "data",
            "--target",
            str(target.source.path),
            "-o",
            str(tmp_path / "run"),
            "--data-batch",
            "8",
        ]
        return CliRunner().invoke(main, [*common, "--max-new-tokens", "3", *options])

    begun = ["--self-prompts", "9", "--beginnings", str(tmp_path / "own.txt")]
    assert data(*begun).exit_code == 0
    prompts = json.loads((tmp_path / "run" / "data" / "prompts.json").read_text())
    assert 2 <= sum(prompt.startswith("Wo ist") for prompt in prompts) <= 7
    settings = json.loads((tmp_path / "run" / "data" / "data.json").read_text())
    assert (settings["prompts"], settings["prompt_source"]) == (9, "9 that the target wrote itself")
    refused = data("--self-prompts", "9")
    assert (refused.exit_code, "made with other settings" in refused.stderr) == (1, True)
    refused = data("--prompts", "9", *begun[2:])
    assert (refused.exit_code, "--beginnings has nothing to begin" in refused.stderr) == (1, True)


def fail() -> list[str]:
    raise RecipeError("too few", found=0, expected=9, remedy="ask for fewer")


def test_an_interrupted_run_finds_its_prompts_again(tmp_path: Path) -> None:
    path = tmp_path / "data" / "prompts.json"
    assert write_prompts(path, lambda: ["one two"], {"self_prompts": 1}) == ["one two"]
    assert write_prompts(path, lambda: ["three four"], {"self_prompts": 1}) == ["one two"]
    assert json.loads(path.read_text()) == ["one two"]
    with pytest.raises(OutputError, match="made with other settings"):
        write_prompts(path, lambda: ["three four"], {"self_prompts": 2})
    path.unlink()
    with pytest.raises(RecipeError, match="too few"):
        write_prompts(path, fail, {"self_prompts": 9})
    assert write_prompts(path, lambda: ["one two"], {"self_prompts": 1}) == ["one two"]
    path.write_text("[")
    with pytest.raises(OutputError, match="can't be used"):
        write_prompts(path, lambda: ["three four"], {"self_prompts": 1})
