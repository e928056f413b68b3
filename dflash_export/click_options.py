"""The options of ``dflash-export build``, each derived from its field of ``BuildOptions``."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from dflash_export.options import OPTIONS, BuildOptions, Option
from dflash_rt.cli.console import JsonPair

__all__ = ["build_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def build_options(command: _Command) -> _Command:
    """Decorator: a click option for each option of a build. One that isn't given is ``None``."""
    for field in reversed(fields(BuildOptions)):
        if field.name in OPTIONS:
            value_type, *_, option = typing.get_args(OPTIONS[field.name])
            for flags, settings in reversed(list(_declarations(field, value_type, option))):
                command = click.option(*flags, field.name, **settings)(command)
    return command


def _declarations(
    field: Field[Any], value_type: Any, option: Option
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Names and settings of what stands for one field: one option, or a flag for each of its values."""
    if option.flags:
        for value, text in option.flags.items():
            yield [f"--{value}"], {"flag_value": value, "help": text}
        return
    flag = option.name or f"--{field.name.replace('_', '-')}"
    settings = _settings(value_type, option)
    if settings.get("is_flag") and field.default is not False:  # else there is nothing to turn off
        flag = f"{flag}/{flag.replace('--', '--no-', 1)}"
    yield [flag, *([option.short] if option.short else [])], {"help": option.help, **settings}


def _settings(value_type: Any, option: Option) -> dict[str, Any]:
    """How click reads a value of this type."""
    is_union = typing.get_origin(value_type) in (typing.Union, types.UnionType)
    members = typing.get_args(value_type) if is_union else (value_type,)
    members = tuple(member for member in members if member is not type(None))
    literals = [member for member in members if typing.get_origin(member) is typing.Literal]
    if literals:
        by_text = {str(value): value for value in typing.get_args(literals[0])}
        bare = {} if option.bare is None else {"is_flag": False, "flag_value": option.bare}
        return {"type": click.Choice(list(by_text)), "callback": lambda *call: by_text.get(call[2]), **bare}
    if members == (bool,):
        return {"is_flag": True, "default": None}
    if typing.get_origin(members[0]) is Mapping:
        return {"type": JsonPair(), "multiple": True, "callback": lambda *call: dict(call[2]) or None}
    base, *checks = typing.get_args(members[0]) or members
    if base is int:
        return {"type": click.IntRange(min=checks[0].low), "metavar": "N"}
    return {"metavar": option.metavar}
