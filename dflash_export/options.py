"""Options of an export that are wrong whatever the models are: refused before anything is read or written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from dflash_export.errors import RecipeError
from dflash_export.quantize.formats import BLOCK_SIZES
from dflash_export.quantize.plan import HEAD_TYPES, SCHEMES
from dflash_rt.errors import Problem

__all__ = ["check_options"]

_MAX_TEXT = 4096  # characters; what a manifest takes


def check_options(**options: object) -> None:
    """Raise ``RecipeError`` with everything that is wrong with a build's arguments.

    ``None`` stands for an option that wasn't given. Without a ``name`` the output folder's is looked at.
    """
    problems = [
        Problem(f"{option} is wrong", _shown(value), *_RULES[option][1:])
        for option, value in options.items()
        if not (value is None and option not in _NEEDED) and not _RULES[option][0](value)
    ]
    output = options.get("output")
    if not problems and options.get("name") is None and isinstance(output, str | os.PathLike):
        folder = os.path.basename(os.path.abspath(os.fspath(output)))
        if folder and not _is_text(folder):
            problems = [Problem("the output's name can't be recorded", _shown(folder), _TEXT, "pass a name")]
    if len(problems) == 1:
        only = problems[0]
        raise RecipeError(only.what, found=only.found, expected=only.expected, remedy=only.remedy)
    if problems:
        listed = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
        raise RecipeError(f"options of the export are wrong\n{listed}")


def _shown(value: object) -> str:
    return repr(value)[:100]


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and isinstance(path := os.fspath(value), str) and path != ""


def _is_text(value: object) -> bool:
    # A manifest holds no control characters, which a terminal would obey, and no unpaired surrogates.
    return (
        isinstance(value, str)
        and 0 < len(value) <= _MAX_TEXT
        and all(character.isprintable() or character in "\t\n" for character in value)
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_precision(value: object) -> bool:
    return isinstance(value, str) and value in ("fp32", "fp16", "bf16")


def _is_scheme(value: object) -> bool:
    return isinstance(value, str) and value in SCHEMES


def _is_block_size(value: object) -> bool:
    return type(value) is int and value in BLOCK_SIZES


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_head(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value in HEAD_TYPES)


def _is_json_object(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_text(key) and _is_scalar(item) for key, item in value.items()
    )


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return value == "" or _is_text(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 2**63)


_TEXT = f"1 to {_MAX_TEXT} characters without control characters"
_Rule = tuple[Callable[[Any], bool], str, str]
_SOURCE: _Rule = (_is_path, "a hub id org/name, or a path", "name the model")
_NAME: _Rule = (_is_text, _TEXT, "choose another text, or leave the option out")
_COUNT: _Rule = (_is_count, "a whole number of at least 1", "correct the option, or leave it out")
_FLAG: _Rule = (_is_flag, "true or false", "correct the option, or leave it out")
_NEEDED = ("target", "drafter", "output", "precision", "fused")
_RULES: dict[str, _Rule] = {
    "target": _SOURCE,
    "drafter": _SOURCE,
    "output": (_is_path, "the path of a folder that isn't there yet", "name the folder to make"),
    "name": _NAME,
    "precision": (_is_precision, "fp32, fp16 or bf16", "choose one of these"),
    "max_seq_len": _COUNT,
    "prefill_chunk": _COUNT,
    "draft_width": _COUNT,
    "fused": _FLAG,
    "quantize": (_is_scheme, ", ".join(SCHEMES), "choose one of these, or leave the option out"),
    "quantize_block": (_is_block_size, ", ".join(map(str, BLOCK_SIZES)), "choose one of these"),
    "quantize_head": (_is_head, ", ".join(HEAD_TYPES) + ", true (int8) or false", "choose one of these"),
    "quantize_drafter": _FLAG,
    "calib": (_is_path, "the path of a file of prompts", "name the file"),
    "calib_limit": _COUNT,
    "calib_tokens": _COUNT,
    "measure_quantization": _FLAG,
    "measure_tokens": _COUNT,
    "target_revision": _NAME,
    "drafter_revision": _NAME,
    "chat_template_kwargs": (
        _is_json_object,
        "names and values; a value is text, a finite number, true, false or null",
        "correct the value",
    ),
}
