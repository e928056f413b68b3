"""Typed access to a z-lab config.json. Errors are collected; each names key, value and expected type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dflash_export.errors import CheckpointError, ExportError, UnsupportedModelError, numbered

__all__ = ["ConfigReader", "Findings", "wrong_value"]

_MISSING: Any = object()
_T = TypeVar("_T")


@dataclass
class Findings:
    """What is wrong with a config.json: the errors in the order of their finding, and the names of the values
    that can't be used. Reading goes on with defaults in their place.
    """

    errors: list[ExportError] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)

    def add(self, error: ExportError, *names: str) -> None:
        self.errors.append(error)
        self.wrong.update(names)

    def raise_any(self) -> None:
        """Raise the one error, or one that lists all of them."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            unsupported = all(isinstance(error, UnsupportedModelError) for error in self.errors)
            kind = UnsupportedModelError if unsupported else CheckpointError
            what = f"the drafter's config.json has {len(self.errors)} problems"
            raise kind(numbered(what, [error.problem for error in self.errors]))


class ConfigReader:
    """Looks a name up in ``dflash_config`` first, then at the top level, as the reference's ``_draft_value``
    does.

    Unlike the reference it refuses two values that differ, since other readers take the other one. Only names
    of ``nested`` are looked up in ``dflash_config``; any other key in there is refused.

    A value that is missing or wrong is added to ``findings``, and another stands in for it. Only a
    ``dflash_config`` that is no object is raised at once.
    """

    def __init__(self, raw: Mapping[str, Any], nested: frozenset[str], findings: Findings) -> None:
        self.findings = findings
        self._raw = raw
        self._dflash = raw.get("dflash_config", {})
        if not isinstance(self._dflash, Mapping):
            raise wrong_value("dflash_config", self._dflash, "an object")
        if unknown := sorted(set(self._dflash) - nested):
            findings.add(
                CheckpointError(
                    "dflash_config has keys that aren't known",
                    found=", ".join(unknown),
                    expected=f"only {', '.join(sorted(nested))}",
                    remedy="remove a key from config.json only if it has no effect on the model",
                )
            )

    def raw(self, name: str, default: Any = _MISSING) -> Any:
        """The value as it stands. Without a default it has to be there. None stands in for one that isn't."""
        if name in self.findings.wrong:
            return None
        here, top = self._dflash.get(name, _MISSING), self._raw.get(name, _MISSING)
        if here is not _MISSING and top is not _MISSING and here != top:
            error = CheckpointError(
                f"{name} is given twice, with different values",
                found=f"{here!r} in dflash_config, {top!r} at the top level",
                expected="one value",
                remedy="keep in config.json the one that the drafter was trained with",
            )
            self.findings.add(error, name)
            return None
        value = here if here is not _MISSING else top
        if value is not _MISSING:
            return value
        if default is _MISSING:
            error = CheckpointError(
                f"{name} is missing from the drafter's config.json",
                found="neither at the top level nor in dflash_config",
                expected=f"{name}",
                remedy="use the config.json that was published with the drafter",
            )
            self.findings.add(error, name)
            return None
        return default

    def count(self, name: str, default: Any = _MISSING) -> int:
        """An integer of 1 or more."""
        return self._integer(name, default, 1)

    def index(self, name: str, default: Any = _MISSING) -> int:
        """An integer of 0 or more."""
        return self._integer(name, default, 0)

    def indices(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers of 0 or more, not empty."""

        def accepts(value: Any) -> bool:
            is_list = isinstance(value, list) and bool(value)
            return is_list and all(type(item) is int and item >= 0 for item in value)

        expected = "a list of integers of 0 or more"
        return tuple(self._checked(name, list(default), accepts, expected, list(default)))

    def flag(self, name: str, default: bool = False) -> bool:
        """``true`` or ``false``."""
        return self._checked(name, default, lambda value: type(value) is bool, "true or false", default)

    def optional_flag(self, name: str) -> bool | None:
        """``true``, ``false``, or ``None`` where it is null or absent."""
        return None if self.raw(name, None) is None else self.flag(name)

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        return float(
            self._checked(name, default, lambda n: _is_number(n) and n > 0, "a number above 0", default)
        )

    def optional_number(self, name: str) -> float | None:
        """A finite number, or ``None`` where it is null or absent."""
        value: Any = self._checked(
            name, None, lambda value: value is None or _is_number(value), "a number or null", None
        )
        return None if value is None else float(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        return self._checked(name, default, lambda value: isinstance(value, str), "a string", default)

    def _integer(self, name: str, default: Any, least: int) -> int:
        def accepts(value: Any) -> bool:
            return type(value) is int and value >= least

        instead: int = default if accepts(default) else least
        return self._checked(name, default, accepts, f"an integer of {least} or more", instead)

    def _checked(
        self, name: str, default: Any, accepts: Callable[[Any], bool], expected: str, instead: _T
    ) -> _T:
        value = self.raw(name, default)
        if name in self.findings.wrong:
            return instead
        if not accepts(value):
            self.findings.add(wrong_value(name, value, expected), name)
            return instead
        checked: _T = value
        return checked


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def wrong_value(name: str, value: object, expected: str) -> CheckpointError:
    """What a value of a drafter's config.json that can't be used raises."""
    return CheckpointError(
        f"{name} in the drafter's config.json is wrong",
        found=repr(value),
        expected=expected,
        remedy="use the config.json that was published with the drafter",
    )
