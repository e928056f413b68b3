"""Prompts read from text and JSON files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_rt.errors import PromptError
from dflash_rt.text.prompt_files import read_prompts

ROOT = Path(__file__).parents[3]


def test_prompt_files(tmp_path: Path) -> None:
    text, listed = tmp_path / "prompts.txt", tmp_path / "prompts.json"
    text.write_text("one\n\n  two\nthree\n")
    listed.write_text('["one", {"prompt": "  two", "kind": "made up"}, {"prompt": "three"}]')
    assert read_prompts(text) == read_prompts(listed) == ["one", "  two", "three"]
    assert read_prompts(text, 2) == ["one", "  two"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff", "can't be read"),
        ("a.json", b"[", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b"[]", "holds no prompt"),
        ("a.json", b'{"prompt": "x"}', "not a list of prompts"),
        ("a.json", b'["x", 1]', "item 1"),
        ("a.json", b'[{"prompt": "x", "answer": "y"}]', "item 0"),
        ("a.json", b'[{"kind": "x"}]', "item 0"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=part):
        read_prompts(path)


def test_prompts_of_the_demo_drafter() -> None:
    folder = ROOT / "examples" / "smollm2-135m-instruct-dflash"
    assert len(read_prompts(folder / "heldout_prompts.json")) == 32
