"""Kernels that TensorRT-RTX compiled for an engine, kept beside it: the next start takes them from there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dflash_rt.files import write_atomically

__all__ = ["KernelCache"]

_LOG = logging.getLogger("dflash_rt")


class KernelCache:
    """One engine's cache, shared by its contexts. The library refuses by itself what another GPU made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._stored = b""

    def use(self, config: Any) -> None:
        """Give the cache to the ``IRuntimeConfig`` of a context, if this version has such caches."""
        if self._cache is None and hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            if self._cache is not None:
                self._load()
        if self._cache is not None and not config.set_runtime_cache(self._cache):
            _LOG.debug("no kernels are kept for %s", self._path)

    def save(self) -> None:
        """Write what was compiled, if there is anything new. That it can't be written is no error."""
        cache, self._cache = self._cache, None
        blob = None if cache is None else cache.serialize()
        if blob is None or bytes(blob) == self._stored:
            return
        try:
            write_atomically(self._path, bytes(blob))
        except OSError as error:
            _LOG.debug("kernels are not kept in %s: %s", self._path, error)

    def _load(self) -> None:
        if self._path.is_symlink() or not self._path.is_file():
            return
        try:
            stored = self._path.read_bytes()
        except OSError as error:
            _LOG.debug("kernels in %s are not used: %s", self._path, error)
            return
        if self._cache.deserialize(stored):
            self._stored = stored
