"""Timings of kernels that TensorRT measured, kept from build to build.

They belong to a GPU and a TensorRT version and to no bundle, so they are kept in the user's cache folder: a
second bundle for the same GPU builds faster too, and a bundle that is copied doesn't carry them along.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from dflash_export.engines.devices import Gpu
from dflash_export.engines.vendor import Vendor
from dflash_rt.files import write_atomically

__all__ = ["default_timing_folder", "use_timings"]


def default_timing_folder() -> Path:
    """``$XDG_CACHE_HOME/dflash-export/timings``, by default below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "dflash-export" / "timings"


def timing_path(folder: Path, vendor: Vendor, gpu: Gpu) -> Path:
    """Where the timings of one library version and GPU are."""
    name = f"{vendor.backend}-{vendor.version}-{gpu.name}-sm{gpu.compute_capability}"
    return folder / (re.sub(r"[^A-Za-z0-9.-]+", "-", name) + ".timings")


@contextlib.contextmanager
def use_timings(config: Any, vendor: Vendor, gpu: Gpu | None, folder: Path | None) -> Iterator[None]:
    """While open, ``config`` builds with the kept timings; new ones are added to them at the end.

    A cache that can't be read or written is only slower, so it never fails a build.
    """
    if gpu is None or not vendor.keeps_timings:
        yield
        return
    path = timing_path(folder or default_timing_folder(), vendor, gpu)
    cache = config.create_timing_cache(_read(path))
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            # Another build may have added its own meanwhile.
            others = config.create_timing_cache(_read(path))
            if others is not None:
                cache.combine(others, True)
            write_atomically(path, bytes(cache.serialize()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
