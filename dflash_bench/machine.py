"""The machine: names, versions and load, as far as a report needs them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dflash_export.engines.devices import present_gpu
from dflash_rt.machine import cpu_name, physical_cores
from dflash_rt.version import __version__

__all__ = ["environment", "load_average", "package_versions"]

_PACKAGES = (
    "cuda-bindings",
    "cuda-python",
    "dflash",
    "numpy",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "transformers",
)
_NVIDIA_SMI = "driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,persistence_mode"


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; ``None`` where the system doesn't tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def package_versions() -> dict[str, str]:
    """Versions of what may have taken part, as far as installed."""
    found = {"dflash-export": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """A machine with a GPU. What isn't there is ``None``; packages that aren't installed aren't listed."""
    import torch

    gpu = present_gpu()
    return {
        "gpu": None if gpu is None else gpu.name,
        "compute_capability": None if gpu is None else gpu.compute_capability,
        "nvidia_smi": _nvidia_smi(),
        "torch_cuda": torch.version.cuda,
        "torch_sees_gpu": torch.cuda.is_available(),
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "load_before": load_average(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def _nvidia_smi() -> dict[str, str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    first = done.stdout.splitlines()[0] if done.stdout else ""
    return dict(zip(_NVIDIA_SMI.split(","), (value.strip() for value in first.split(",")), strict=False))
