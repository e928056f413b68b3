"""Recipes: the options of one export in a small YAML file, so that a bundle can be built again.

The keys are the options of :func:`dflash_export.build`; engines/README.md lists them. Sources may be a hub id
(``org/name``), a path, or ``package:NAME/FILE``: a file that an installed Python package ships.
A path starts with ``/``, ``./``, ``../`` or ``~/``, or ends in ``.gguf``; relative ones
start at the recipe's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dflash_export.errors import RecipeError
from dflash_export.options import OPTIONS, REQUIRED
from dflash_rt.bundle.schema import Problems, read

__all__ = ["PACKAGE_PREFIX", "RECIPE_KEYS", "locate_package_file", "override", "read_recipe"]

# Where a bundle is written is said when a recipe is used.
RECIPE_KEYS = tuple(name for name in OPTIONS if name not in ("output", "force"))
PACKAGE_PREFIX = "package:"
_PATH_STARTS = ("/", "./", "../", "~/")
_REMEDY = (
    "mend these keys; text that YAML takes for a number, a date or a truth value: put it in quotes; "
    "a number, true or false: write it without quotes"
)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read and check a recipe file: the options that it gives, as :func:`dflash_export.build` takes them.

    Raises:
        RecipeError: the file can't be read, isn't YAML, has unknown, missing, repeated or wrong keys (all of
            them are named), or names a package file that isn't installed.
    """
    path = Path(path)
    document = _parse(path)
    problems = Problems(f"the recipe {path}", _REMEDY, RecipeError)
    for key in [key for key in document if key not in RECIPE_KEYS]:
        problems.add(key, "an unknown key", "only " + ", ".join(RECIPE_KEYS))
    for key in RECIPE_KEYS:
        if document.get(key) is not None:
            read(OPTIONS[key], document[key], key, problems)
        elif key in document:
            problems.add(key, "None", "a value, or no such key")
        elif key in REQUIRED:
            problems.add(key, "no such key", "it to be present")
    problems.raise_if_any()
    for source in ("target", "drafter"):
        document[source] = _locate(document[source], path.parent)
    if "calib" in document:
        document["calib"] = str((path.parent / Path(document["calib"]).expanduser()).resolve())
    return document


def override(options: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe with others in their place.

    ``chat_template_kwargs`` are merged key by key. A source that is replaced loses its recipe's revision,
    which names a commit of the other one.
    """
    chosen = {**options, **by}
    if "chat_template_kwargs" in by:
        chosen["chat_template_kwargs"] = {
            **options.get("chat_template_kwargs", {}),
            **by["chat_template_kwargs"],
        }
    for source in ("target", "drafter"):
        revision = f"{source}_revision"
        if chosen.get(source) != options.get(source) and revision not in by:
            chosen.pop(revision, None)
    return chosen


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
