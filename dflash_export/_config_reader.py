"""Typed access to a z-lab config.json; errors name the key, the value and the type that was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dflash_rt.errors import CheckpointError

__all__ = ["ConfigReader"]

_MISSING: Any = object()


class ConfigReader:
    """Looks a name up in ``dflash_config`` first, then at the top level, as the reference's ``_draft_value``
    does.

    Unlike the reference it refuses two values that differ, since other readers take the other one. Only names
    of ``nested`` are looked up in ``dflash_config``; any other key in there is refused.
    """

    def __init__(self, raw: Mapping[str, Any], nested: frozenset[str]) -> None:
        self._raw = raw
        self._dflash = raw.get("dflash_config", {})
        if not isinstance(self._dflash, Mapping):
            raise _wrong("dflash_config", self._dflash, "an object")
        if unknown := sorted(set(self._dflash) - nested):
            raise CheckpointError(
                "dflash_config has keys that aren't known",
                found=", ".join(unknown),
                expected=f"only {', '.join(sorted(nested))}",
                todo="remove a key from config.json only if it has no effect on the model",
            )

    def raw(self, name: str, default: Any = _MISSING) -> Any:
        """The value as it stands. Without a default it has to be there."""
        here, top = self._dflash.get(name, _MISSING), self._raw.get(name, _MISSING)
        if here is not _MISSING and top is not _MISSING and here != top:
            raise CheckpointError(
                f"{name} is given twice, with different values",
                found=f"{here!r} in dflash_config, {top!r} at the top level",
                expected="one value",
                todo="keep in config.json the one that the drafter was trained with",
            )
        value = here if here is not _MISSING else top
        if value is not _MISSING:
            return value
        if default is _MISSING:
            raise CheckpointError(
                f"{name} is missing from the drafter's config.json",
                found="neither at the top level nor in dflash_config",
                expected=f"{name}",
                todo="use the config.json that was published with the drafter",
            )
        return default

    def count(self, name: str, default: Any = _MISSING) -> int:
        """An integer of 1 or more."""
        return self._integer(name, default, 1)

    def index(self, name: str, default: Any = _MISSING) -> int:
        """An integer of 0 or more."""
        return self._integer(name, default, 0)

    def indices(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers of 0 or more, not empty."""
        value = self.raw(name, list(default))
        good = isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value)
        if not good:
            raise _wrong(name, value, "a list of integers of 0 or more")
        return tuple(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """``true`` or ``false``."""
        value = self.raw(name, default)
        if type(value) is not bool:
            raise _wrong(name, value, "true or false")
        return value

    def optional_flag(self, name: str) -> bool | None:
        """``true``, ``false``, or ``None`` where it is null or absent."""
        return None if self.raw(name, None) is None else self.flag(name)

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.raw(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise _wrong(name, value, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or ``None`` where it is null or absent."""
        value = self.raw(name, None)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _wrong(name, value, "a number or null")
        return float(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.raw(name, default)
        if not isinstance(value, str):
            raise _wrong(name, value, "a string")
        return value

    def _integer(self, name: str, default: Any, least: int) -> int:
        value = self.raw(name, default)
        if type(value) is not int or value < least:
            raise _wrong(name, value, f"an integer of {least} or more")
        return value


def _wrong(name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{name} in the drafter's config.json is wrong",
        found=repr(value),
        expected=expected,
        todo="use the config.json that was published with the drafter",
    )
