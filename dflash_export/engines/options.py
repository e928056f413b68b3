"""The options of ``dflash-export`` that are about engines: all of ``compile``, most of ``build``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from dflash_export.engines.devices import DEVICE_CLASSES
from dflash_export.engines.vendor import BACKENDS

__all__ = ["ByteSize", "choose_precision", "chosen_options", "echo_notes", "engine_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A number of bytes: ``1073741824``, ``1024M`` or ``1G``. Units are powers of 1024."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes, or a usage error."""
        if isinstance(value, int):  # click may convert a value that is converted already
            return value
        match = re.fullmatch(r"([0-9]{1,18})([KMG]?)", value)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size like 1073741824, 1024M or 1G", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


_OPTIONS = (
    click.option(
        "--max-batch", type=click.IntRange(min=1), metavar="N", help="Sequences at once, at most [1]."
    ),
    click.option(
        "--device", type=click.Choice(list(DEVICE_CLASSES)), help="Class of the machine to build for."
    ),
    click.option(
        "--sm",
        "compute_capabilities",
        type=int,
        multiple=True,
        metavar="NN",
        help="tensorrt-rtx: a GPU's compute capability, 89 for 8.9. May be repeated. [all from 80 on]",
    ),
    click.option("--workspace", type=ByteSize(), help="Scratch memory of kernels at most, like 2G."),
    click.option(
        "--version-compatible",
        is_flag=True,
        help="tensorrt: newer versions of the same major version can load the engines.",
    ),
    click.option(
        "--hardware-compatible",
        is_flag=True,
        help="tensorrt: any GPU since Ampere can run the engines, with slower kernels.",
    ),
)


def engine_options(*, required: bool) -> Callable[[_Command], _Command]:
    """``--backend`` and the options that go with it."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(_OPTIONS):
            command = option(command)
        text = "Library to build engines with." if required else "Build engines as well, as `compile` does."
        return click.option("--backend", type=click.Choice(BACKENDS), required=required, help=text)(command)

    return decorate


def chosen_options(options: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """Take the engine options out of ``options`` and give those that were chosen.

    Raises:
        click.UsageError: some were chosen, but no backend.
    """
    flags = {option: options.pop(option) for option in ("version_compatible", "hardware_compatible")}
    values = {key: options.pop(key) for key in ("max_batch", "device", "compute_capabilities", "workspace")}
    chosen = {key: value for key, value in {**values, **flags}.items() if value not in (None, (), False)}
    if chosen and backend is None:
        names = {"compute_capabilities": "sm"}
        listed = ", ".join(f"--{names.get(key, key).replace('_', '-')}" for key in chosen)
        raise click.UsageError(f"{listed} is about engines: give --backend as well")
    return chosen


def choose_precision(options: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """A build's options with bf16 if they leave the precision open, and says so.

    A GPU's attention is fused, and its caches are half as large, in 16 bits only; bf16 has fp32's range.
    """
    if "precision" not in options:
        click.echo(f"precision: bf16, for engines of {backend} (--precision chooses another)", err=True)
    return {"precision": "bf16", **options}


def echo_notes(notes: Sequence[str]) -> None:
    """What a user should know of engines, on stderr."""
    for note in notes:
        click.echo(f"note: {note}", err=True)
