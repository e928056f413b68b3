"""What a benchmark has to know about the machine that it runs on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dflash_rt.version import __version__

__all__ = ["cpu_name", "load_average", "package_versions", "physical_cores"]

_PACKAGES = ("dflash", "numpy", "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def physical_cores() -> int:
    """Cores that this process may run on; two hardware threads of one core count once (on Linux)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; ``None`` where the system doesn't tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of what may have taken part, as far as installed."""
    found = {"dflash-rt": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
