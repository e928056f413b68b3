"""The device as PyTorch sees it: how fast its memory copies, and what of it is free."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

__all__ = ["copy_bandwidth", "free_bytes", "release_memory"]


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


def release_memory() -> None:
    """Give back what PyTorch keeps of a GPU's memory for itself: others need it next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
