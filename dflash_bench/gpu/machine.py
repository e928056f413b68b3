"""The machine: names and versions for the report, and how fast its memory copies."""

from __future__ import annotations

import gc
import platform
import shutil
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dflash_bench.machine import load_average
from dflash_export.engines.devices import present_gpu
from dflash_rt.machine import cpu_name, physical_cores

__all__ = ["copy_bandwidth", "environment", "free_bytes", "gpu_name", "release_memory", "synchronise"]

_PACKAGES = (
    "cuda-bindings",
    "cuda-python",
    "dflash",
    "dflash-export",
    "numpy",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "transformers",
)
_QUERY = "driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,persistence_mode"


def environment() -> dict[str, Any]:
    """Names and versions. What isn't there is ``None``; what isn't installed isn't listed."""
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
        "packages": _versions(),
    }


def gpu_name() -> str | None:
    """The first GPU's name; ``None`` without one."""
    gpu = present_gpu()
    return None if gpu is None else gpu.name


def copy_bandwidth(device: str, size: int, rounds: int) -> float:
    """Bytes per second, read and written, of copying ``size`` bytes within the device's memory.

    Nothing but the copy counts: the median of ``rounds``, by events on a GPU.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    seconds = []
    for _ in range(rounds + 2):
        if device == "cpu":
            began = time.perf_counter()
            goal.copy_(source)
            seconds.append(time.perf_counter() - began)
        else:
            cuda: Any = torch.cuda  # its types are incomplete
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            goal.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * size / statistics.median(seconds[2:])


def free_bytes(device: str) -> int | None:
    """Free memory of a GPU; ``None`` for the CPU."""
    return None if device == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def synchronise(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """Give back what PyTorch keeps of a GPU's memory for itself: others need it next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nvidia_smi() -> dict[str, str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    first = done.stdout.splitlines()[0] if done.stdout else ""
    return dict(zip(_QUERY.split(","), (value.strip() for value in first.split(",")), strict=False))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
