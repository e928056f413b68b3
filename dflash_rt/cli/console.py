"""What all command lines share: errors without tracebacks, output, JSON.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from dflash_rt.errors import DFlashError

__all__ = ["CommandGroup", "JsonPair", "echo", "echo_json", "fail"]

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# Packages that only some commands need, and the extra of setup.cfg that installs them.
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


class _Command(click.Command):
    """A command whose ``--help`` and ``--version`` say so when stdout can't be written."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Read the command line; ``--help`` and ``--version`` print right here."""
        _print_utf8()
        with _report_stdout_failure():
            return super().make_context(*args, **options)


class CommandGroup(_Command, click.Group):
    """The one place that turns the project's errors into a short message and an exit code."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            with _device_log_on_stderr():
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
def _report_stdout_failure() -> Iterator[None]:
    """Turn an error of writing to stdout, as on a full disk, into a message.

    Click itself ends a command quietly when the pipe behind stdout was closed.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE or error.filename is not None:
            raise
        # Python flushes stdout again when the process ends, and would report the same error.
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        message = f"standard output can't be written: {error.strerror or error}"
        raise click.ClickException(message) from error


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


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the time of a record."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


@contextmanager
def _device_log_on_stderr() -> Iterator[None]:
    """Show the device backends' log, such as the use of memory; as a library the runtime is silent."""
    logger, handler = logging.getLogger("dflash_rt.backends.device"), _StderrHandler()
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


def echo(text: object = "", *, nl: bool = True) -> None:
    """Print a result on stdout; an error message and exit code 1 where that can't be done."""
    with _report_stdout_failure():
        click.echo(text, nl=nl)


def echo_json(value: Mapping[str, Any]) -> None:
    """One line of JSON on stdout."""
    echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
