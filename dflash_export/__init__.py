"""Exports a Hugging Face target and its DFlash drafter to a bundle for :mod:`dflash_rt`.

::

    from dflash_export import build, render, verify

    bundle = build("Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16", "engines/qwen3-4b", precision="bf16")
    print(render(verify(bundle)))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dflash_rt.version import __version__

if TYPE_CHECKING:
    from dflash_export.engines.compiler import compile_engines
    from dflash_export.exporter import build
    from dflash_export.parity.run import verify
    from dflash_export.parity.table import render

__all__ = ["__version__", "build", "compile_engines", "render", "verify"]

# Imported when first asked for: they bring torch, which takes seconds and which `--help` doesn't need.
_HOMES = {
    "build": "exporter",
    "compile_engines": "engines.compiler",
    "render": "parity.table",
    "verify": "parity.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
