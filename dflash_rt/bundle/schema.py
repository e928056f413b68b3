"""Strict reading of JSON into frozen dataclasses, driven by their annotations.

Nothing is coerced and nothing is ignored: unknown, missing and repeated keys, wrong types (a bool is
not an integer, ``1.0`` isn't either), NaN, infinities, control characters and values outside their limits are
problems. All of them are collected with their JSON path before anything is raised.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from dflash_rt.errors import DFlashError, ManifestError

__all__ = [
    "Bounds",
    "Broken",
    "Check",
    "OneOf",
    "Pattern",
    "Problems",
    "Range",
    "child",
    "dump_json",
    "load",
    "parse_json",
    "plain",
    "read",
    "shown",
]

Broken: TypeAlias = tuple[str, str, str]
"""A broken rule: JSON path, what was found there, what was expected."""

T = TypeVar("T")

MAX_STRING = 4096
_MAX_REPORTED = 20
# Control characters would reach a terminal through `inspect`; unpaired surrogates can't be written as UTF-8.
_BAD_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_REMEDY = "build the bundle again with `dflash-export build`; manifest.json isn't meant to be edited"
_INVALID = object()


@runtime_checkable
class Check(Protocol):
    """A limit in an ``Annotated`` type. Metadata of other classes is ignored here."""

    @property
    def expected(self) -> str:
        """A good value in words, for messages and for docs/reference/bundle.md."""

    def accepts(self, value: Any) -> bool:
        """True if the value, already of the right type, is within the limit."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An integer in ``[low, high]``."""

    low: int
    high: int

    @property
    def expected(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def accepts(self, value: int) -> bool:
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Range:
    """A float in ``[low, high]``."""

    low: float
    high: float

    @property
    def expected(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def accepts(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A string that a regular expression matches as a whole."""

    regex: str
    expected: str

    def accepts(self, value: str) -> bool:
        return re.fullmatch(self.regex, value) is not None


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a few strings or integers."""

    values: tuple[str | int, ...]

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(map(str, self.values))

    def accepts(self, value: str | int) -> bool:
        return value in self.values


class Problems:
    """Collects the problems of a document, so that one error can report all of them."""

    def __init__(
        self, document: str = "manifest.json", remedy: str = _REMEDY, error: type[DFlashError] = ManifestError
    ) -> None:
        self._items: list[Broken] = []
        self._document, self._remedy, self._error = document, remedy, error

    def __len__(self) -> int:
        return len(self._items)

    def add(self, path: str, found: str, expected: str) -> None:
        self._items.append((path, found, expected))

    def raise_if_any(self) -> None:
        """Raises the document's error (default: ManifestError) with every problem (the first 20 of many)."""
        if not self._items:
            return
        if len(self._items) == 1:
            path, found, expected = self._items[0]
            what = f"{self._document}: {path} is wrong"
            raise self._error(what, found=found, expected=expected, remedy=self._remedy)
        lines = [f"  {path}: found {found}, expected {wanted}" for path, found, wanted in self._items]
        if len(lines) > _MAX_REPORTED:
            lines[_MAX_REPORTED:] = [f"  and {len(lines) - _MAX_REPORTED} more"]
        what = "\n".join([f"{self._document} has {len(self)} problems", *lines])
        raise self._error(what, remedy=self._remedy)


def shown(value: object) -> str:
    """Any value in at most 100 printable characters, for an error message."""
    if isinstance(value, Mapping):
        return f"an object with {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    # repr escapes control characters, which a terminal would obey.
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def child(path: str, key: object) -> str:
    """JSON path of a member: ``drafter.feature_layers[2]``, ``files["target.data"]``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    if isinstance(key, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", key):
        return f"{path}.{key}" if path else key
    return f"{path}[{shown(key)}]"


def parse_json(
    text: str,
    document: str = "manifest.json",
    remedy: str = _REMEDY,
    error: type[DFlashError] = ManifestError,
    *,
    max_bytes: int = 2**63,
) -> Any:
    """Parse JSON text without the leniencies of :func:`json.loads`.

    Raises the document's error (default: ManifestError) for malformed or too long text, repeated keys, NaN,
    infinities, and nesting or numbers that are too large to read.
    """
    if len(text) > max_bytes:
        found, expected = f"{len(text)} characters", f"at most {max_bytes} bytes"
        raise error(f"{document} is too large", found=found, expected=expected, remedy=remedy)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short_integer,
        )
    except RecursionError:
        found = "lists or objects nested too deeply"
    except ValueError as reason:  # includes JSONDecodeError
        found = str(reason)
    raise error(f"{document} is not valid JSON", found=found, expected="one JSON object", remedy=remedy)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(repeated)} appears twice in one object")
    return members


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which is not JSON")


def _short_integer(text: str) -> int:
    # Reading an integer takes time quadratic in its digits.
    if len(text) > 20:
        raise ValueError(f"the number {text[:40]}, which is out of range")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]}, which is out of range")
    return number


def read(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    """Read a parsed JSON value as ``annotation``; wrong parts are added to ``problems``.

    Known annotations: dataclasses, ``str``, ``int``, ``float``, ``bool``, ``None``, ``Literal`` of strings or
    integers, unions of scalars or with ``None``, ``tuple[T, ...]``, ``Mapping[K, T]`` and
    ``Annotated[T, Check, ...]``. The result is of no use once ``problems`` isn't empty.
    """
    readers = {
        typing.Annotated: _read_annotated,
        typing.Union: _read_union,
        types.UnionType: _read_union,
        typing.Literal: _read_literal,
        tuple: _read_list,
        Mapping: _read_mapping,
    }
    default = _read_object if dataclasses.is_dataclass(annotation) else _read_scalar
    return readers.get(typing.get_origin(annotation), default)(annotation, value, path, problems)


def load(cls: type[T], document: Any, problems: Problems, rules: Callable[[T], Iterable[Broken]]) -> T:
    """Read a parsed document as ``cls``, then check ``rules`` between its fields.

    Raises the error of ``problems`` with every wrong field, or else with every broken rule.
    """
    loaded: T = read(cls, document, "", problems)
    problems.raise_if_any()
    for broken in rules(loaded):
        problems.add(*broken)
    problems.raise_if_any()
    return loaded


def _refuse(problems: Problems, path: str, value: object, expected: str) -> object:
    problems.add(path or "the manifest", shown(value), expected)
    return _INVALID


def _read_annotated(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    base, *metadata = typing.get_args(annotation)
    checks = [each for each in metadata if isinstance(each, Check)]
    is_scalar = isinstance(base, type)
    if checks and is_scalar and type(value) is not base:
        return _refuse(problems, path, value, checks[0].expected)
    for check in checks:
        if not check.accepts(value):
            return _refuse(problems, path, value, check.expected)
    # A check of several types has looked at the type, too.
    return value if checks and not is_scalar else read(base, value, path, problems)


def _read_literal(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    choices = typing.get_args(annotation)
    if _is_one_of(choices, value):
        return value
    return _refuse(problems, path, value, OneOf(choices).expected)


def _read_list(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, list):
        return _refuse(problems, path, value, "a list")
    item = typing.get_args(annotation)[0]
    return tuple(read(item, each, child(path, i), problems) for i, each in enumerate(value))


def _read_union(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    members = typing.get_args(annotation)
    if value is None and type(None) in members:
        return None
    others = [member for member in members if member is not type(None)]
    if len(others) == 1:
        return read(others[0], value, path, problems)
    for member in others:
        if _takes(member, value):
            return read(member, value, path, problems)
    return _refuse(problems, path, value, " or ".join(_described(member) for member in members))


def _takes(member: Any, value: Any) -> bool:
    """Whether a member of a union is the one to read a scalar with."""
    if typing.get_origin(member) is typing.Literal:
        return _is_one_of(typing.get_args(member), value)
    return type(value) is (typing.get_args(member)[0] if typing.get_args(member) else member)


def _is_one_of(choices: tuple[Any, ...], value: Any) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _read_mapping(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    key_type, item_type = typing.get_args(annotation)
    if not isinstance(value, Mapping):
        return _refuse(problems, path, value, "an object")
    for key in value:
        read(key_type, key, f"the key {child(path, key)}", problems)
    return {key: read(item_type, each, f"{path}[{shown(key)}]", problems) for key, each in value.items()}


def _read_object(cls: Any, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        return _refuse(problems, path, value, "an object")
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in value:
        if key not in names:
            problems.add(child(path, key), "an unknown key", "only " + ", ".join(names))
    before = len(problems)
    members = {}
    for name in names:
        if name in value:
            members[name] = read(hints[name], value[name], child(path, name), problems)
        else:
            problems.add(child(path, name), "no such key", "it to be present")
    return cls(**members) if len(problems) == before else _INVALID


def _read_scalar(base: Any, value: Any, path: str, problems: Problems) -> Any:
    if type(value) is not base:
        return _refuse(problems, path, value, _described(base))
    if base is float and not math.isfinite(value):
        return _refuse(problems, path, value, "a finite number")
    if base is str and len(value) > MAX_STRING:
        return _refuse(problems, path, value, f"at most {MAX_STRING} characters")
    if base is str and _BAD_CHARACTER.search(value):
        return _refuse(problems, path, value, "text without control characters")
    return value


def _described(member: Any) -> str:
    if typing.get_origin(member) is typing.Annotated:
        return str(typing.get_args(member)[1].expected)
    if typing.get_origin(member) is typing.Literal:
        return ", ".join(map(str, typing.get_args(member)))
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return names[member]


def plain(value: Any) -> Any:
    """Dataclasses as dicts in field order, mappings sorted by key, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def dump_json(value: Any, indent: str = "") -> str:
    """JSON in which a value that fits into a line stays on one: a tensor is a line, not seven."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= 110:
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        names = {key: json.dumps(key, ensure_ascii=False) for key in value}
        parts = [f"{names[key]}: {dump_json(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + dump_json(item, deeper) for item in value) + f"\n{indent}]"
