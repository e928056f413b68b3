"""Prompts from files and from stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dflash_rt.errors import PromptError

__all__ = ["as_chats", "read_prompts", "read_text"]


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, or of stdin for ``-``, without one newline at its end.

    Raises:
        PromptError: it can't be read, or isn't UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        name = "standard input" if str(path) == "-" else str(path)
        raise PromptError(
            f"{name} can't be read",
            found=error,
            expected="UTF-8 text",
            remedy="check the path and the encoding",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts from a file, the first ``limit`` of them (``None``: all).

    A ``.json`` file holds a list of strings, or of objects with ``prompt`` and optionally ``kind`` (a label).
    Any other file holds one prompt a line; blank lines don't count.

    Raises:
        PromptError: the file can't be read, is malformed, or holds no prompt.
    """
    text = read_text(path)
    if path.suffix == ".json":
        prompts = _prompts_from_json(path, text)
    else:
        prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise PromptError(f"{path} holds no prompt", expected="at least one", remedy="add one")
    return prompts[:limit]


def as_chats(prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    """Each prompt as the only user message of a chat."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _prompts_from_json(path: Path, text: str) -> list[str]:
    expected = 'a JSON list of strings, or of objects like {"prompt": "..."}'
    remedy = "correct the file, or use a text file with one prompt a line"
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON", found=error, expected=expected, remedy=remedy) from error
    if not isinstance(items, list):
        raise PromptError(
            f"{path} is not a list of prompts", found=type(items).__name__, expected=expected, remedy=remedy
        )
    prompts = []
    for index, item in enumerate(items):
        labelled = isinstance(item, dict) and item.keys() <= {"prompt", "kind"}
        prompt = item.get("prompt") if labelled else item
        if not isinstance(prompt, str):
            raise PromptError(
                f"item {index} of {path} is not a prompt",
                found=json.dumps(item, ensure_ascii=False)[:200],
                expected=expected,
                remedy=remedy,
            )
        prompts.append(prompt)
    return prompts
