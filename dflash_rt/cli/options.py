"""Options that commands share: a bundle, and what runs it."""

from __future__ import annotations

from pathlib import Path

import click

from dflash_rt.backends import BACKEND_NAMES
from dflash_rt.cli.console import JsonPair

__all__ = ["BACKEND", "BACKEND_OPTION", "BUNDLE", "COUNT", "THREADS", "VERIFY_FILES"]

COUNT = click.IntRange(min=1)
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
VERIFY_FILES = click.option(
    "--verify-files", is_flag=True, help="First compare the SHA-256 of every file of the bundle."
)
THREADS = click.option("--threads", type=COUNT, metavar="N", help="CPU threads of the backend.")
BACKEND = click.option(
    "--backend", type=click.Choice(BACKEND_NAMES), default="onnxruntime", show_default=True
)
BACKEND_OPTION = click.option(
    "--backend-option",
    "backend_options",
    type=JsonPair(),
    multiple=True,
    help="Option of the backend, like cuda_graph=false. May be repeated; docs/guide/gpu.md has them.",
)
