"""The options of ``dflash-export build`` and ``compile``, each derived from its field."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from dflash_export.engines.options import EngineOptions
from dflash_export.options import OPTIONS, BuildOptions, Option, option_types
from dflash_rt.cli.console import JsonPair

__all__ = ["build_options", "engine_options", "take_engine_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def build_options(command: _Command) -> _Command:
    """Decorator: a click option for each option of a build and of its engines; what both have is the build's.

    One that isn't given is ``None``.
    """
    return _add(_add(command, EngineOptions, without=OPTIONS), BuildOptions)


def engine_options(command: _Command) -> _Command:
    """Decorator: a click option for each option of engines. One that isn't given is ``None``."""
    return _add(command, EngineOptions, required="backend")


def take_engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of engines out of those of a build, and give the ones that were chosen.

    Raises:
        click.UsageError: some were chosen, but no backend.
    """
    types = option_types(EngineOptions)
    taken = {name: options.pop(name) for name in types if name not in OPTIONS}
    chosen = {name: value for name, value in taken.items() if value is not None}
    if chosen and "backend" not in chosen:
        listed = ", ".join(_flag(name, typing.get_args(types[name])[-1]) for name in chosen)
        raise click.UsageError(f"{listed} is about engines: give --backend as well")
    return chosen


def _add(command: _Command, kind: type, without: Container[str] = (), required: str = "") -> _Command:
    types = option_types(kind)
    for field in reversed(fields(kind)):
        if field.name in types and field.name not in without:
            value_type, *checks, option = typing.get_args(types[field.name])
            if checks:  # an Annotated type in another becomes one with it
                value_type = typing.Annotated[(value_type, *checks)]
            for flags, settings in reversed(list(_declarations(field, value_type, option))):
                settings["required"] = field.name == required
                command = click.option(*flags, field.name, **settings)(command)
    return command


def _flag(name: str, option: Option) -> str:
    return option.name or f"--{name.replace('_', '-')}"


def _declarations(
    field: Field[Any], value_type: Any, option: Option
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Names and settings of what stands for one field: one option, or a flag for each of its values."""
    if option.flags:
        for value, text in option.flags.items():
            yield [f"--{value}"], {"flag_value": value, "help": text}
        return
    flag = _flag(field.name, option)
    settings = {"type": option.type} if option.type else _settings(value_type, option)
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
    if typing.get_origin(members[0]) is Sequence:
        settings = {"type": int, "multiple": True, "callback": lambda *call: call[2] or None}
        return {"metavar": option.metavar, **settings}
    base, *checks = typing.get_args(members[0]) or members
    if base is int:
        return {"type": click.IntRange(min=checks[0].low), "metavar": "N"}
    return {"metavar": option.metavar}
