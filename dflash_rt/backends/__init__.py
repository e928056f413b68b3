"""Backends by name. A vendor's library is imported when its backend is made, not before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from dflash_rt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from dflash_rt.backends.base import Backend
    from dflash_rt.bundle import Bundle

__all__ = ["BACKEND_NAMES", "create_backend"]


def _onnxruntime(bundle: Bundle, threads: int | None, *, fast_plain: bool = False) -> Backend:
    try:
        from dflash_rt.backends.onnxruntime import OnnxRuntimeBackend
    except ImportError as error:
        raise BackendUnavailableError(
            "the onnxruntime backend can't be imported",
            found=error,
            expected="the onnxruntime package, in a version that dflash_rt's setup asks for",
            todo="pip install onnxruntime",
        ) from error
    return OnnxRuntimeBackend(bundle, threads=threads, fast_plain=fast_plain)


_FACTORIES: dict[str, Callable[[Bundle, int | None], Backend]] = {
    "onnxruntime": _onnxruntime,
    # Of a quantised bundle; OnnxRuntimeBackend says what it gives and takes.
    "onnxruntime-fast-plain": functools.partial(_onnxruntime, fast_plain=True),
}

BACKEND_NAMES = tuple(sorted(_FACTORIES))
"""Every name that :func:`create_backend` knows; also the choices of the command line."""


def create_backend(name: str, bundle: Bundle, *, threads: int | None = None) -> Backend:
    """Make the backend called ``name`` for a bundle.

    ``threads`` is the number of CPU threads a backend may use; ``None`` leaves it to the backend.

    Raises:
        BackendUnavailableError: the name is unknown, or the vendor's library can't be imported.
        BackendError: the backend can't load the bundle.
    """
    try:
        factory = _FACTORIES[name]
    except (KeyError, TypeError):
        raise BackendUnavailableError(
            "unknown backend",
            found=repr(name),
            expected="one of " + ", ".join(BACKEND_NAMES),
            todo="check the spelling, or upgrade dflash_rt",
        ) from None
    return factory(bundle, threads)
