"""Prompts: the shipped lists, and that training never sees what the evaluation asks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dflash_export.errors import RecipeError
from dflash_rt.text.prompt_files import read_prompts
from examples.train_drafter.prompts import HELD_OUT, normalised, own_prompts, read_words, training_prompts

FOLDER = HELD_OUT.parents[1] / "train_drafter"
# What the held-out prompts are about: a training prompt with one of these words would be too close to them.
TOPICS = (
    "addition bears canoe camouflage cats coastline collatz drums engineering erosion fisherman flamingos "
    "garlic gaul germanic glacier goat hibernation highway iceberg interleaves joss marathon martini "
    "nostalgia origami porcelain purr rabbit snout submarine sundial violin"
)


def test_training_prompts_are_not_the_held_out_ones() -> None:
    held_out = read_prompts(HELD_OUT)
    prompts = training_prompts(20_000, seed=0, held_out=held_out)
    assert len({normalised(prompt) for prompt in prompts}) == len(prompts) == 20_000
    assert not {normalised(prompt) for prompt in prompts} & {normalised(prompt) for prompt in held_out}
    assert len(held_out) == 32


def test_a_held_out_prompt_is_left_out() -> None:
    """As the templates might give one: without the list it is among the first prompts, with it nowhere."""
    first = training_prompts(50, seed=3, held_out=())
    held_out = [prompt.upper() + "!" for prompt in first[::2]]
    rest = training_prompts(5_000, seed=3, held_out=held_out)
    assert not set(first[::2]) & set(rest)


def test_no_word_list_has_a_topic_of_the_held_out_prompts() -> None:
    asked = normalised(" ".join(read_prompts(HELD_OUT))).split()
    assert set(TOPICS.split()) <= set(asked)
    text = (FOLDER / "templates.txt").read_text() + " ".join(
        word for slot, words in read_words(FOLDER / "words.txt").items() for word in words
    )
    assert set(TOPICS.split()) & set(normalised(text).split()) == set()


def test_more_prompts_begin_with_fewer() -> None:
    few = training_prompts(300, seed=1, held_out=())
    assert training_prompts(600, seed=1, held_out=())[:300] == few
    assert training_prompts(300, seed=2, held_out=()) != few


def test_every_slot_is_filled_and_numbered_ones_agree() -> None:
    prompts = training_prompts(5_000, seed=0, held_out=())
    assert [prompt for prompt in prompts if re.search(r"[{}|\\]", prompt)] == []
    reads = [re.match(r"(\w+) reads .* pages does (\w+) read", prompt) for prompt in prompts]
    pairs = [match.groups() for match in reads if match]
    assert pairs
    assert all(first == second for first, second in pairs)
    sorts = [re.match(r"Sort these alphabetically: (.*)\.", prompt) for prompt in prompts]
    assert all(len(set(match[1].split(", "))) == 4 for match in sorts if match)


def write_lists(folder: Path, templates: str, words: str) -> Path:
    (folder / "templates.txt").write_text(templates)
    (folder / "words.txt").write_text(words)
    return folder


def test_more_than_the_lists_give_is_refused(tmp_path: Path) -> None:
    folder = write_lists(tmp_path, "Say {word}.\nHi!", "word: a | b | c")
    assert sorted(training_prompts(4, seed=0, held_out=(), folder=folder)) == [
        "Hi!",
        "Say a.",
        "Say b.",
        "Say c.",
    ]
    with pytest.raises(RecipeError, match="at most about 4"):
        training_prompts(5, seed=0, held_out=(), folder=folder)


@pytest.mark.parametrize(
    ("templates", "words", "fragment"),
    [
        ("{other}", "word: a", "slot that can't be filled"),
        ("{word} {word}", "word: a", "slot that can't be filled"),
        ("{Word}", "word: a", "slot that can't be filled"),
        ("{word}", "word: a | a", "line 1 of words.txt"),
        ("{word}", "word: a\nword: b", "line 2 of words.txt"),
        ("{word}", "word: a |", "line 1 of words.txt"),
        ("{word}", "word", "line 1 of words.txt"),
    ],
)
def test_malformed_lists_are_refused(tmp_path: Path, templates: str, words: str, fragment: str) -> None:
    with pytest.raises(RecipeError, match=fragment):
        training_prompts(1, seed=0, held_out=(), folder=write_lists(tmp_path, templates, words))


def test_own_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["One?", {"prompt": "Two?"}]))
    assert own_prompts(path, ["Three?"]) == ["One?", "Two?"]
    with pytest.raises(RecipeError, match="such as 'Two"):
        own_prompts(path, ["two"])
