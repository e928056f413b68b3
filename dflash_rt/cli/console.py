"""What the two command lines share: errors without tracebacks, prompt files, JSON output.

Exit codes: 0 success, 1 an error of the project, 2 wrong usage, 130 interrupted. Results are on stdout, the
rest on stderr.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from dflash_rt.errors import DFlashError, PromptError

__all__ = ["CommandGroup", "JsonPair", "as_chats", "echo_json", "fail", "read_prompts", "read_text"]

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# Packages that only some commands need, and the extra of setup.cfg that brings them.
_EXTRAS = {
    "accelerate": "export",
    "filelock": "export",
    "gguf": "export",
    "huggingface_hub": "export",
    "matplotlib": "bench",
    "ml_dtypes": "export",
    "onnx": "export",
    "onnxscript": "export",
    "rich": "export",
    "safetensors": "export",
    "torch": "export",
    "transformers": "export",
    "yaml": "export",
}


class CommandGroup(click.Group):
    """The one place that turns the project's errors into a short message and an exit code."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Read the command line; ``--help`` and ``--version`` print right here."""
        _print_utf8()
        with _stdout_failures_told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            with _stdout_failures_told(), _notes():
                return super().invoke(ctx)
        except DFlashError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            if extra == "export" and ctx.invoked_subcommand == "compile":
                extra = "compile"  # no PyTorch on a machine that only compiles
            message = (
                f"the package {error.name} is not installed\n"
                f"  what to do: pip install 'dflash-export[{extra}]'"
            )
            raise click.ClickException(message) from error
        except KeyboardInterrupt:
            click.echo(err=True)  # leave the line that the terminal's ^C is on
            ctx.exit(_INTERRUPTED)


def _print_utf8() -> None:
    """Results are UTF-8 on every system. Windows would write a code page with few characters into a pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(encoding="utf-8", errors=stream.errors)


@contextmanager
def _stdout_failures_told() -> Iterator[None]:
    """Turn what a full disk behind stdout raises into a message. A closed pipe is click's: it is quiet."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE or not _comes_from_stdout(error):
            raise
        # What stdout still holds can't be written when the process ends either, and Python would say so.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        message = f"standard output can't be written: {error.strerror or error}"
        raise click.ClickException(message) from error


def _comes_from_stdout(error: OSError) -> bool:
    """Whether it was raised by the one function that both commands print with, and not for stderr.

    The error itself doesn't name the file, and an unbuffered stdout forgets that it failed.
    """
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return frame.f_code is click.echo.__code__ and not frame.f_locals["err"]


class JsonPair(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """An option ``KEY=VALUE`` whose value is a JSON scalar."""

    name = "KEY=JSON"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str | int | float | bool | None]:
        """The pair, or a usage error."""
        if isinstance(value, tuple):  # click may convert a value that is converted already
            return value
        key, equals, text = value.partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not KEY=JSON, like enable_thinking=false", param, ctx)
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            self.fail(f"{text!r} is not JSON; text needs its own quotes, like 'style=\"short\"'", param, ctx)
        if isinstance(parsed, dict | list) or (isinstance(parsed, float) and not math.isfinite(parsed)):
            self.fail(f"{text!r} is not text, a finite number, true, false or null", param, ctx)
        return key, parsed


class _Notes(logging.Handler):
    """Writes to stderr as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


@contextmanager
def _notes() -> Iterator[None]:
    """Show what a device's memory is wanted for while a command runs; as a library the runtime is silent."""
    logger, handler = logging.getLogger("dflash_rt.backends.device"), _Notes()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def fail(message: str) -> NoReturn:
    """End the command with exit code 1 after its results were printed."""
    raise click.ClickException(message)


def echo_json(value: Mapping[str, Any]) -> None:
    """One line of JSON on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, or of stdin for ``-``, without one newline at its end.

    Raises:
        PromptError: it can't be read, or isn't UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        name = "standard input" if str(path) == "-" else str(path)
        raise PromptError(
            f"{name} can't be read",
            found=error,
            expected="UTF-8 text",
            remedy="check the path and the encoding",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts from a file, the first ``limit`` of them (``None``: all).

    A ``.json`` file holds a list of strings, or of objects with ``prompt`` and optionally ``kind`` (a label).
    Any other file holds one prompt a line; blank lines don't count.

    Raises:
        PromptError: the file can't be read, is malformed, or holds no prompt.
    """
    text = read_text(path)
    if path.suffix == ".json":
        prompts = _prompts_from_json(path, text)
    else:
        prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise PromptError(f"{path} holds no prompt", expected="at least one", remedy="add one")
    return prompts[:limit]


def as_chats(prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    """Each prompt as the only user message of a chat."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _prompts_from_json(path: Path, text: str) -> list[str]:
    expected = 'a JSON list of strings, or of objects like {"prompt": "..."}'
    remedy = "correct the file, or use a text file with one prompt a line"
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON", found=error, expected=expected, remedy=remedy) from error
    if not isinstance(items, list):
        raise PromptError(
            f"{path} is not a list of prompts", found=type(items).__name__, expected=expected, remedy=remedy
        )
    prompts = []
    for index, item in enumerate(items):
        labelled = isinstance(item, dict) and item.keys() <= {"prompt", "kind"}
        prompt = item.get("prompt") if labelled else item
        if not isinstance(prompt, str):
            raise PromptError(
                f"item {index} of {path} is not a prompt",
                found=json.dumps(item, ensure_ascii=False)[:200],
                expected=expected,
                remedy=remedy,
            )
        prompts.append(prompt)
    return prompts
