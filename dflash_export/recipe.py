"""Recipes: the options of one export in a small YAML file, so that a bundle can be built again.

The keys are the options of :func:`dflash_export.build`; engines/README.md lists them. Sources may be a hub id
(``org/name``), a path, or ``package:NAME/FILE``: a file that an installed Python package ships.
A path starts with ``/``, ``./``, ``../`` or ``~/``, or ends in ``.gguf``; relative ones
start at the recipe's folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

import yaml

from dflash_export.errors import RecipeError
from dflash_rt.errors import Problem

__all__ = ["PACKAGE_PREFIX", "JsonScalar", "Precision", "Recipe", "locate_package_file", "read_recipe"]

JsonScalar: TypeAlias = "str | int | float | bool | None"
Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]
Quantize: TypeAlias = Literal["int4", "int4-rtn", "int8", "int8-weight-only", "fp8"]

PACKAGE_PREFIX = "package:"
_PATH_STARTS = ("/", "./", "../", "~/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The options of one export. ``None`` leaves the choice to :func:`dflash_export.build`."""

    target: str
    drafter: str
    name: str | None = None
    precision: Precision | None = None
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    draft_width: int | None = None
    fused: bool | None = None
    quantize: Quantize | None = None
    quantize_block: int | None = None
    quantize_head: bool | Literal["int8", "int4"] | None = None
    quantize_drafter: bool | None = None
    calib: str | None = None
    calib_limit: int | None = None
    calib_tokens: int | None = None
    measure_quantization: bool | None = None
    measure_tokens: int | None = None
    target_revision: str | None = None
    drafter_revision: str | None = None
    chat_template_kwargs: Mapping[str, JsonScalar] | None = None

    def overridden(self, **options: Any) -> Recipe:
        """A copy with ``options`` in place of this recipe's values; one that is ``None`` changes nothing.

        ``chat_template_kwargs`` are merged key by key. A source that is replaced loses its recipe's revision,
        which names a commit of the other one.
        """
        changes = {key: value for key, value in options.items() if value is not None}
        if "chat_template_kwargs" in changes:
            changes["chat_template_kwargs"] = {
                **(self.chat_template_kwargs or {}),
                **changes["chat_template_kwargs"],
            }
        for source in ("target", "drafter"):
            if changes.get(source, getattr(self, source)) != getattr(self, source):
                changes.setdefault(f"{source}_revision", None)
        return replace(self, **changes)

    def build_options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`dflash_export.build`, without what it shall choose itself."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: the file can't be read, isn't YAML, has unknown, missing, repeated or wrong keys (all of
            them are named), or names a package file that isn't installed.
    """
    path = Path(path)
    document = _parse(path)
    problems = [*_key_problems(document), *_value_problems(document)]
    if problems:
        listed = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
        raise RecipeError(f"the recipe {path} can't be used:\n{listed}")
    for source in ("target", "drafter"):
        document[source] = _locate(document[source], path.parent)
    if "calib" in document:
        document["calib"] = str((path.parent / Path(document["calib"]).expanduser()).resolve())
    return Recipe(**document)


def locate_package_file(source: str) -> Path:
    """The path of ``package:NAME/FILE``. The package is looked up, not imported.

    Raises:
        RecipeError: the text is malformed, the package isn't installed, or it has no such file.
    """
    package, _, inner = source.removeprefix(PACKAGE_PREFIX).partition("/")
    file = PurePosixPath(inner)
    # A dotted name would make find_spec import the parent package.
    if not package.isidentifier() or not inner or file.is_absolute() or ".." in file.parts:
        raise RecipeError(
            "a package file is spelled wrongly",
            found=source,
            expected=f"{PACKAGE_PREFIX}NAME/FILE: a top-level package and a file inside its folder",
            remedy="correct the spelling",
        )
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    candidates = [Path(folder) / file for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise RecipeError(
        f"{source} can't be found",
        found=f"the package {package} without that file" if folders else f"no package {package}",
        expected=f"an installed Python package {package} that ships {inner}",
        remedy=f"install the package that provides {package}, or give a path or a hub id instead",
    )


def _locate(source: str, folder: Path) -> str:
    """A source as :func:`dflash_export.build` takes it: a hub id as it is, all else as an absolute path."""
    if source.startswith(PACKAGE_PREFIX):
        return str(locate_package_file(source))
    if source.startswith(_PATH_STARTS) or source.endswith(".gguf"):
        return str((folder / Path(source).expanduser()).resolve())
    return source


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without what a recipe never needs: repeated keys, merge keys and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is not plain text", key.start_mark)
            if key.value in seen:
                message = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> dict[str, Any]:
    """The file's top-level mapping."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} can't be read",
            found=error,
            expected="a YAML file",
            remedy="check the path; the recipes that ship are in engines/",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(
            f"the recipe {path} is not plain YAML",
            found=_in_one_line(error),
            expected="lines of `key: value` in UTF-8",
            remedy="compare it with the recipes in engines/",
        ) from error
    if not isinstance(document, dict):
        raise RecipeError(
            f"the recipe {path} is not a mapping",
            found=type(document).__name__ if document is not None else "an empty file",
            expected="lines of `key: value`",
            remedy="compare it with the recipes in engines/",
        )
    return document


def _in_one_line(error: Exception) -> str:
    """What a parser says, with the line where it happened and without its excerpt of the file."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'malformed'}"
    return " ".join(str(error).split())


def _key_problems(document: Mapping[str, Any]) -> list[Problem]:
    known = [field.name for field in fields(Recipe)]
    required = [field.name for field in fields(Recipe) if field.default is MISSING]
    unknown = [key for key in document if key not in known]
    missing = [key for key in required if key not in document]
    problems = []
    if unknown:
        found, expected = ", ".join(unknown), ", ".join(known)
        problems.append(Problem("unknown keys", found, expected, "check the spelling, or remove them"))
    if missing:
        problems.append(Problem("keys are missing", None, ", ".join(missing), "add them"))
    return problems


def _value_problems(document: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key, value in document.items():
        if key not in _RULES:
            continue  # reported as unknown
        accepts, expected, remedy = _RULES[key]
        if not accepts(value):
            problems.append(Problem(f"{key} is wrong", repr(value), expected, remedy))
    return problems


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_precision(value: object) -> bool:
    return value in ("fp32", "fp16", "bf16")


def _is_scheme(value: object) -> bool:
    return value in get_args(Quantize)


def _is_block_size(value: object) -> bool:
    return _is_count(value) and value in _BLOCK_SIZES


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_head(value: object) -> bool:
    return isinstance(value, bool) or value in ("int8", "int4")


def _is_json_object(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    finite = (not isinstance(item, float) or math.isfinite(item) for item in value.values())
    return all(finite) and all(isinstance(item, str | int | float | None) for item in value.values())


# What YAML takes for a number, a date or a truth value (12345, 1e5, 2026-01-02, on) is text only in quotes.
_TEXT = (_is_text, "text", "put it in quotes")
_COUNT = (_is_count, "a whole number of at least 1", "write the number, without quotes")
_PRECISION = (_is_precision, "fp32, fp16 or bf16", "choose one of them")
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_FLAG = (_is_flag, "true or false", "write one of them, without quotes")
_JSON_OBJECT = (
    _is_json_object,
    "lines of `name: value`; a value is text, a finite number, true, false or null",
    "correct the value",
)
_RULES: dict[str, tuple[Callable[[object], bool], str, str]] = {
    "target": _TEXT,
    "drafter": _TEXT,
    "name": _TEXT,
    "precision": _PRECISION,
    "max_seq_len": _COUNT,
    "prefill_chunk": _COUNT,
    "draft_width": _COUNT,
    "fused": _FLAG,
    "quantize": (_is_scheme, ", ".join(get_args(Quantize)), "choose one of them"),
    "quantize_block": (_is_block_size, "16, 32, 64, 128 or 256", "choose one of them"),
    "quantize_head": (_is_head, "int8, int4, true (int8) or false", "choose one of them"),
    "quantize_drafter": _FLAG,
    "calib": _TEXT,
    "calib_limit": _COUNT,
    "calib_tokens": _COUNT,
    "measure_quantization": _FLAG,
    "measure_tokens": _COUNT,
    "target_revision": _TEXT,
    "drafter_revision": _TEXT,
    "chat_template_kwargs": _JSON_OBJECT,
}
