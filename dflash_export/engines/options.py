"""Every option of engines, once, as :mod:`dflash_export.options` has those of a build."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import click

from dflash_export.engines.devices import DEVICE_CLASSES
from dflash_export.engines.vendor import BACKENDS
from dflash_export.errors import EngineBuildError
from dflash_export.options import AtLeast, Option
from dflash_export.progress import Progress
from dflash_rt.bundle.folder import Bundle

__all__ = ["ByteSize", "EngineOptions", "out_of_range"]

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


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of one set of engines; ``bundle`` is a bundle or its folder, and must be writable.

    Raises:
        EngineBuildError: a number is out of range, whatever the bundle is.
    """

    bundle: Bundle | str | os.PathLike[str]
    _: KW_ONLY
    backend: Annotated[str, Option("Build engines with this library.", type=click.Choice(BACKENDS))]
    # Sizes the caches.
    max_seq_len: Annotated[
        Annotated[int, AtLeast(1)] | None, Option("Prompt and output tokens [the bundle's limit].")
    ] = None
    max_batch: Annotated[Annotated[int, AtLeast(1)], Option("Sequences at once, at most [1].")] = 1
    # Picks the GPU for TensorRT-RTX, and is compared with the GPU that is present for TensorRT.
    device: Annotated[
        str | None,
        Option("Class of the machine to build for.", type=click.Choice(list(DEVICE_CLASSES))),
    ] = None
    compute_capabilities: Annotated[
        Sequence[int],
        Option(
            "tensorrt-rtx: a GPU's compute capability, 89 for 8.9. May be repeated. [all from 80 on]",
            "NN",
            name="--sm",
        ),
    ] = ()
    workspace: Annotated[
        int | None, Option("Scratch memory of kernels in bytes at most, like 2G.", type=ByteSize())
    ] = None
    version_compatible: Annotated[
        bool, Option("tensorrt: newer versions of the same major version can load the engines.")
    ] = False
    hardware_compatible: Annotated[
        bool, Option("tensorrt: any GPU since Ampere can run the engines, with slower kernels.")
    ] = False
    # Where TensorRT's kernel timings are kept; by default in the user's cache folder.
    timing_folder: str | os.PathLike[str] | None = None
    # Where stages are reported; by default nowhere.
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name, unit in (("max_seq_len", "tokens"), ("max_batch", "sequences"), ("workspace", "bytes")):
            value = getattr(self, name)
            is_open = value is None and name != "max_batch"
            if not is_open and (type(value) is not int or value < 1):
                raise out_of_range(name, value, f"a number of {unit}, at least 1")


def out_of_range(option: str, found: object, expected: str) -> EngineBuildError:
    """What a number that can't be met raises."""
    return EngineBuildError(
        f"{option} is out of range", found=found, expected=expected, remedy="mend the option"
    )
