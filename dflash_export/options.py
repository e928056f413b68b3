"""Every option of a build, once.

An option is a field of :class:`BuildOptions`: its annotation is its check, its :class:`Option` is its help.
The keyword arguments of :func:`dflash_export.build`, recipes, the command line and what a bundle records of
its build derive from the class.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, ParamSpec, TypeAlias, TypeVar, get_origin, get_type_hints

from dflash_export.errors import RecipeError
from dflash_export.progress import Progress
from dflash_rt.bundle.manifest import Precision
from dflash_rt.bundle.schema import Bounds, Pattern, Problems, read

__all__ = [
    "OPTIONS",
    "REQUIRED",
    "AtLeast",
    "BuildOptions",
    "HeadType",
    "Option",
    "QuantizeName",
    "option_types",
    "taking",
]


@dataclass(frozen=True)
class Option:
    """What the command line needs to know of an option beside its annotation.

    Args:
        help: one line for ``--help``.
        metavar: what stands for the value there; default: what its type is called.
        short: a second, short name.
        name: the name where it isn't the field's.
        bare: the value that the name alone stands for.
        flags: a flag for each value, with its help, in place of one option with a value.
        type: click's type of the value, where the annotation doesn't tell it.
    """

    help: str = ""
    metavar: str | None = None
    short: str | None = None
    name: str | None = None
    bare: str | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    type: Any = None


@dataclass(frozen=True)
class AtLeast:
    """A check: an integer in ``[low, 2**31)``."""

    low: int

    @property
    def expected(self) -> str:
        return f"a whole number of at least {self.low}"

    def accepts(self, value: int) -> bool:
        return self.low <= value < 2**31


class _Printable:
    expected = "text without control characters"

    def accepts(self, value: str) -> bool:
        return all(character.isprintable() or character in "\t\n" for character in value)


class _IsPath:
    expected = "a path"

    def accepts(self, value: object) -> bool:
        path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        return isinstance(path, str) and bool(path.strip())


class _IsSource(_IsPath):
    expected = "a hub id org/name, or a path"


_P = ParamSpec("_P")
_Options = TypeVar("_Options")
_Result = TypeVar("_Result")
QuantizeName: TypeAlias = Literal["int4", "int4-rtn", "int8", "int8-weight-only", "fp8"]
HeadType: TypeAlias = Literal["int8", "int4"]
_Source: TypeAlias = Annotated[str | os.PathLike[str], _IsSource()]
_Path: TypeAlias = Annotated[str | os.PathLike[str], _IsPath()]
_Text: TypeAlias = Annotated[str, Pattern(r"(?s).*\S.*", "text that isn't blank"), _Printable()]
_Count: TypeAlias = Annotated[int, AtLeast(1)]
_Json: TypeAlias = (
    Annotated[str, _Printable()] | Annotated[int, Bounds(-(2**63), 2**63 - 1)] | float | bool | None
)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of one build, checked. ``None`` leaves the choice to the build.

    Raises:
        RecipeError: options are wrong, whatever the models are; all of them are named.
    """

    target: Annotated[_Source, Option("Hub id, folder, .gguf file or package:NAME/FILE.", "SOURCE")]
    drafter: Annotated[_Source, Option("DFlash or DFlash 2 drafter: hub id or folder.", "SOURCE")]
    output: Annotated[
        _Path, Option("Folder to write. By default the recipe's path without its suffix.", "PATH", "-o")
    ]
    _: KW_ONLY
    name: Annotated[_Text | None, Option("Name of the bundle. By default the output folder's.")] = None
    precision: Annotated[Precision, Option("Of weights and caches [fp32; bf16 with --backend].")] = "fp32"
    max_seq_len: Annotated[
        _Count | None, Option("Prompt and output tokens together, at most [what both models were made for].")
    ] = None
    prefill_chunk: Annotated[
        _Count | None, Option("Prompt rows of one pass, at most [256; 16 for a mixture of experts].")
    ] = None
    num_draft_tokens: Annotated[
        Annotated[int, AtLeast(0)] | None,
        Option("Drafted tokens of a step by default, at most; 0 is plain decoding [a whole draft block]."),
    ] = None
    fused: Annotated[
        bool, Option("Hold the target in ONNX Runtime's own operators as well, where they fit it [on].")
    ] = True
    quantize: Annotated[
        QuantizeName | None,
        Option(
            flags={
                "fp8": "The target's linear layers in FP8, inputs too.",
                "int8": "The same in 8-bit integers (SmoothQuant).",
                "int4": "Their weights in 4 bits (AWQ).",
                "int8-weight-only": "Their weights in 8 bits, rounded.",
                "int4-rtn": "Their weights in 4 bits, rounded without any text.",
            }
        ),
    ] = None
    quantize_block: Annotated[
        Literal[16, 32, 64, 128, 256] | None,  # what ONNX Runtime's MatMulNBits takes
        Option("Inputs that share a scale [128 for --int4 where it fits, else 32]."),
    ] = None
    quantize_head: Annotated[
        bool | HeadType | None, Option("Store the LM head in 8 bits as well, or in 4.", bare="int8")
    ] = None
    quantize_drafter: Annotated[bool | None, Option("Store the drafter's layers but fc in 8 bits [off].")] = (
        None
    )
    calib: Annotated[
        _Path | None,
        Option("Prompts whose answers calibrate: a line each, or a .json list [built in].", "FILE"),
    ] = None
    calib_limit: Annotated[_Count | None, Option("The first N prompts only [32].")] = None
    calib_tokens: Annotated[_Count | None, Option("Tokens of an answer at most [48].")] = None
    measure_quantization: Annotated[
        bool | None, Option("Measure what quantisation changed, in PyTorch [on].")
    ] = None
    measure_tokens: Annotated[_Count | None, Option("Of each of the eight answers measured over [32].")] = (
        None
    )
    target_revision: Annotated[
        _Text | None, Option("Commit, tag or branch of the target's hub id.", "REV")
    ] = None
    drafter_revision: Annotated[
        _Text | None, Option("Commit, tag or branch of the drafter's hub id.", "REV")
    ] = None
    chat_template_kwargs: Annotated[
        Mapping[_Text, _Json] | None,
        Option(
            "Variable for the chat template, like enable_thinking=false. May be repeated.",
            name="--chat-template-kwarg",
        ),
    ] = None
    force: Annotated[bool, Option("Replace the output if it exists, with its engines and reports.")] = False
    # Where stages are reported; by default nowhere. No option: nothing of the bundle depends on it.
    progress: Progress | None = None

    def __post_init__(self) -> None:
        problems = Problems("the build", "correct the option, or leave it out", RecipeError)
        for name, annotation in OPTIONS.items():
            read(annotation, getattr(self, name), name, problems)
        problems.raise_if_any()
        # Without a name the bundle is called what its folder is called.
        folder = os.path.basename(os.path.abspath(os.fspath(self.output)))
        if folder and self.name is None:
            problems = Problems("the output", "pass a name, or choose another output", RecipeError)
            read(_Text, folder, "its name", problems)
            problems.raise_if_any()


def option_types(options: type) -> dict[str, Any]:
    """The annotation of each option of a class, by name."""
    hints = get_type_hints(options, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is Annotated}


def taking(
    options: Callable[_P, _Options],
) -> Callable[[Callable[[_Options], _Result]], Callable[_P, _Result]]:
    """Decorator: a function of a class of options takes the class's fields as its own arguments.

    Type checkers see each of them, with its type and default, and they are written once.
    """

    def decorate(function: Callable[[_Options], _Result]) -> Callable[_P, _Result]:
        @functools.wraps(function)
        def taking_fields(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
            return function(options(*args, **kwargs))

        # For help(): types without their checks.
        types, signature = get_type_hints(options), inspect.signature(options)
        parameters = [each.replace(annotation=types[name]) for name, each in signature.parameters.items()]
        result = get_type_hints(function)["return"]
        taking_fields.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
        return taking_fields

    return decorate


# The annotation of each option of a build; and those that must be given.
OPTIONS = option_types(BuildOptions)
REQUIRED = tuple(option.name for option in fields(BuildOptions) if option.default is MISSING)
