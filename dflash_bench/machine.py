"""What a benchmark has to know about the machine that it runs on."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from dflash_rt.version import __version__

__all__ = ["load_average", "package_versions"]

_PACKAGES = ("dflash", "numpy", "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; ``None`` where the system doesn't tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def package_versions() -> dict[str, str]:
    """Versions of what may have taken part, as far as installed."""
    found = {"dflash-rt": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
