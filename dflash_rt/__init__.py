"""Runs DFlash bundles: a target and its drafter as ONNX graphs, decoded speculatively, without PyTorch.

>>> from dflash_rt import Generator
>>> with Generator("engines/smollm2-135m") as generator:
...     for chunk in generator.stream("Why is the sky blue?", max_new_tokens=64):
...         print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dflash_rt.version import __version__

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle
    from dflash_rt.errors import (
        BackendError,
        BackendUnavailableError,
        BundleError,
        ChatTemplateError,
        ContextLengthError,
        DeviceError,
        DFlashError,
        EngineError,
        GeneratorStateError,
        IntegrityError,
        ManifestError,
        NumericalError,
        OutputError,
        PromptError,
        RequestError,
        SamplingError,
    )
    from dflash_rt.generator import Generator
    from dflash_rt.sampling.params import SamplingParams, TokenLogprob
    from dflash_rt.stats import GenerationStats
    from dflash_rt.stream import Chunk, GenerationResult, TokenStream

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "Bundle",
    "BundleError",
    "ChatTemplateError",
    "Chunk",
    "ContextLengthError",
    "DFlashError",
    "DeviceError",
    "EngineError",
    "GenerationResult",
    "GenerationStats",
    "Generator",
    "GeneratorStateError",
    "IntegrityError",
    "ManifestError",
    "NumericalError",
    "OutputError",
    "PromptError",
    "RequestError",
    "SamplingError",
    "SamplingParams",
    "TokenLogprob",
    "TokenStream",
    "__version__",
]

# Where each name lives, if not in errors.py. Imported when first asked for: `--help` doesn't wait for numpy.
_HOMES = {
    "Bundle": "bundle.folder",
    "Chunk": "stream",
    "GenerationResult": "stream",
    "GenerationStats": "stats",
    "Generator": "generator",
    "SamplingParams": "sampling.params",
    "TokenLogprob": "sampling.params",
    "TokenStream": "stream",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
