from __future__ import annotations

import contextlib
import re
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export.errors import RecipeError
from dflash_export.recipe import RECIPE_KEYS, locate_package_file, override, read_recipe

ENGINES = Path(__file__).parents[2] / "engines"
PAIR = "target: org/target\ndrafter: org/drafter\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- Recipes that ship ---


@pytest.mark.parametrize("path", sorted(ENGINES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe["name"] == path.stem


def test_issue_lists_these_recipes() -> None:
    names = {path.stem for path in ENGINES.glob("*.yaml")}
    assert names == {"smollm2-135m", "qwen3-4b", "qwen3-8b", "llama-3.1-8b"}


def test_demo_recipe_points_at_files_that_are_there() -> None:
    recipe = read_recipe(ENGINES / "smollm2-135m.yaml")
    assert Path(recipe["target"]).read_bytes()[:4] == b"GGUF"
    assert (Path(recipe["drafter"]) / "model.safetensors").is_file()
    assert "num_draft_tokens" not in recipe  # up to the drafter's block size


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-8b"])
def test_qwen3_is_not_thinking(name: str) -> None:
    assert read_recipe(ENGINES / f"{name}.yaml")["chat_template_kwargs"] == {"enable_thinking": False}


def test_readme_lists_every_key_once() -> None:
    table = (ENGINES / "README.md").read_text().split("## Keys")[1].split("\n\n")[2]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    keys = [key for cell in cells for key in re.findall("`([a-z_]+)`", cell)]
    assert sorted(keys) == sorted(RECIPE_KEYS)


def test_keys_are_options_of_build() -> None:
    from dflash_export.exporter import build

    options = set(signature(build).parameters)
    assert set(RECIPE_KEYS) == options - {"output", "force", "progress"}


# --- Reading ---


def test_every_key(tmp_path: Path) -> None:
    text = (
        "target: org/target\ntarget_revision: '1234567'\ndrafter: ./drafter\ndrafter_revision: main\n"
        "name: pair\nprecision: bf16\nmax_seq_len: 2048\nprefill_chunk: 64\nnum_draft_tokens: 0\n"
        "chat_template_kwargs: {a: true, b: 1, c: 0.5, d: text, e: null}\n"
    )
    assert read_recipe(write(tmp_path, text)) == {
        "target": "org/target",
        "target_revision": "1234567",
        "drafter": str(tmp_path.resolve() / "drafter"),
        "drafter_revision": "main",
        "name": "pair",
        "precision": "bf16",
        "max_seq_len": 2048,
        "prefill_chunk": 64,
        "num_draft_tokens": 0,
        "chat_template_kwargs": {"a": True, "b": 1, "c": 0.5, "d": "text", "e": None},
    }


def test_only_given_options_reach_build(tmp_path: Path) -> None:
    options = read_recipe(write(tmp_path, PAIR))
    assert options == {"target": "org/target", "drafter": "org/drafter"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("org/name", "org/name"),
        ("./a", "{folder}/a"),
        ("../a", "{parent}/a"),
        ("/a/b", "/a/b"),
        ("~/a", "{home}/a"),
        ("models/a.gguf", "{folder}/models/a.gguf"),
    ],
)
def test_paths_start_at_the_recipe(tmp_path: Path, source: str, found: str) -> None:
    folder = tmp_path.resolve() / "recipes"
    folder.mkdir()
    recipe = read_recipe(write(folder, f"target: {source}\ndrafter: org/drafter\n"))
    assert recipe["target"] == found.format(folder=folder, parent=folder.parent, home=Path.home())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "an empty file"),
        ("just text", "not a mapping"),
        ("- a\n- b\n", "not a mapping"),
        ("target: [", "not plain YAML"),
        ("target: a\x00b", "not plain YAML"),
        (b"target: \xff\xfe\xff", "not plain YAML"),
        ("[" * 5000, "not plain YAML"),
        (PAIR + "target: org/other\n", "the key 'target' is there twice"),
        (PAIR + "chat_template_kwargs: {a: 1, a: 2}\n", "the key 'a' is there twice"),
        (PAIR + "? [a]\n: 1\n", "a key is not plain text"),
        (PAIR + "1: 2\n", "a key is not plain text"),
        (PAIR + "<<: {name: a}\n", "a key is not plain text"),
        (PAIR + "name: &n a\nprecision: *n\n", "aliases"),
        (PAIR + "name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        (PAIR + "draft_widht: 4\n", "draft_widht"),
        ("drafter: org/drafter\n", "target is wrong\n  found: no such key"),
        ("target: org/target\n", "drafter is wrong\n  found: no such key"),
        ("target: 7\ndrafter: a/b\n", "target is wrong\n  found: 7"),
        ("target: ' '\ndrafter: a/b\n", "target is wrong"),
        ("target: null\ndrafter: a/b\n", "target is wrong\n  found: None"),
        (PAIR + "name: on\n", "put it in quotes"),
        (PAIR + "drafter_revision: 1234567\n", "put it in quotes"),
        (PAIR + "target_revision: 2026-01-02\n", "put it in quotes"),
        (PAIR + "precision: int8\n", "fp32, fp16, bf16"),
        (PAIR + "precision: [fp32]\n", "fp32, fp16, bf16"),
        (PAIR + "num_draft_tokens: -1\n", "at least 0"),
        (PAIR + "num_draft_tokens: true\n", "at least 0"),
        (PAIR + "max_seq_len: '2048'\n", "without quotes"),
        (PAIR + "max_seq_len: 1.5\n", "a whole number"),
        (PAIR + "prefill_chunk: -1\n", "at least 1"),
        (PAIR + "name: null\n", "name is wrong\n  found: None"),
        (PAIR + "output: bundle\n", "output is wrong\n  found: an unknown key"),
        (PAIR + "force: true\n", "force is wrong\n  found: an unknown key"),
        (PAIR + "chat_template_kwargs: thinking\n", "chat_template_kwargs is wrong"),
        (PAIR + "chat_template_kwargs: {a: [1]}\n", "chat_template_kwargs['a'] is wrong"),
        (PAIR + "chat_template_kwargs: {a: .nan}\n", "chat_template_kwargs['a'] is wrong"),
        (PAIR + "chat_template_kwargs: {a: 2026-01-02}\n", "chat_template_kwargs['a'] is wrong"),
    ],
)
def test_bad_recipe(tmp_path: Path, text: str | bytes, part: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert part in message
    assert str(path) in message
    assert "what to do:" in message


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, "precision: int8\nmax_seq_len: 0\nspeed: 9\n"))
    message = str(caught.value)
    assert all(
        part in message
        for part in (
            "has 5 problems",
            "speed: found an unknown key",
            "target: found no such key",
            "drafter: found no such key",
            "precision: found 'int8'",
            "max_seq_len: found 0",
        )
    )


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_unreadable_recipe(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="can't be read"):
        read_recipe(tmp_path / name)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab:{}[]&*!? -\n'\"#,|>%@`\t~<1.", max_size=40))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(PAIR + text)
    with contextlib.suppress(RecipeError):
        read_recipe(path)


# --- Package files ---


def test_package_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_something"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate_package_file("package:weights_of_something/model.gguf") == package / "model.gguf"


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("package:", "spelled wrongly"),
        ("package:click", "spelled wrongly"),
        ("package:click/", "spelled wrongly"),
        ("package:/etc/passwd", "spelled wrongly"),
        ("package:click//etc/passwd", "spelled wrongly"),
        ("package:click/../torch/version.py", "spelled wrongly"),
        ("package:os.path/a", "spelled wrongly"),
        ("package:click/model.gguf", "without that file"),
        ("package:numpy/testing", "without that file"),
        ("package:no_such_package_/a.gguf", "no package no_such_package_"),
        ("package:bisect/a.gguf", "no package bisect"),
    ],
)
def test_bad_package_file(source: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        locate_package_file(source)


# --- Command-line options over a recipe ---


def test_given_options_win() -> None:
    recipe = {"target": "a", "drafter": "b", "precision": "bf16", "num_draft_tokens": 3}
    assert override(recipe, {"precision": "fp16"}) == {**recipe, "precision": "fp16"}


def test_template_variables_are_merged() -> None:
    recipe = {"target": "a", "drafter": "b", "chat_template_kwargs": {"x": 1, "y": 2}}
    assert override(recipe, {"chat_template_kwargs": {"y": 3}})["chat_template_kwargs"] == {"x": 1, "y": 3}
    assert override(recipe, {})["chat_template_kwargs"] == {"x": 1, "y": 2}


def test_another_source_drops_the_revision_of_the_old_one() -> None:
    recipe = {"target": "a", "drafter": "b", "target_revision": "r", "drafter_revision": "s"}
    assert override(recipe, {"target": "c"}) == {"target": "c", "drafter": "b", "drafter_revision": "s"}
    assert override(recipe, {"target": "a"}) == recipe
    assert override(recipe, {"drafter": "c", "drafter_revision": "t"}) == {
        **recipe,
        "drafter": "c",
        "drafter_revision": "t",
    }
