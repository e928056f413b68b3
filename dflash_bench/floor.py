"""The floor of a step: no step can be faster than reading the weights that it uses from memory.

A row more costs no further byte, only arithmetic, so this is a floor and not an estimate: one row comes
near it, and the more rows a pass has the more its arithmetic counts.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dflash_rt.bundle.onnx_scan import weight_bytes

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["StepFloor", "measure_read_bandwidth", "step_floor", "weight_bytes"]

_PROBE_BYTES = 512 * 2**20
_PROBE_ROUNDS = 8


@dataclass(frozen=True)
class StepFloor:
    """What one step reads and computes at least.

    Attributes:
        weight_bytes: bytes of the weights that are used; one used twice is read twice.
        operations: multiplications and additions of its matrix products.
        bytes_per_second: what memory delivers.
    """

    weight_bytes: int
    operations: int
    bytes_per_second: float

    @property
    def milliseconds(self) -> float:
        """Time in which memory delivers the weights: no step is faster."""
        return 1e3 * self.weight_bytes / self.bytes_per_second


def measure_read_bandwidth(threads: int, *, size: int = _PROBE_BYTES, rounds: int = _PROBE_ROUNDS) -> float:
    """Bytes per second that ``threads`` threads read from memory together; the best of ``rounds``.

    Each thread takes the maximum of its part of an int32 array of ``size`` bytes, which one core does faster
    than memory delivers. Nothing else of the machine is measured: caches are smaller than the array.
    """
    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return sum(part.nbytes for part in parts) / best


def step_floor(bundle: Bundle, width: int, bytes_per_second: float) -> StepFloor | None:
    """The floor of a step of ``width`` rows; ``None`` where it depends on the data or weights are quantised.

    A plain step (width 1) reads the target and the head, a drafted one also ``inject``, ``draft`` and the
    head once more. The embedding is a lookup of a few rows and isn't counted. In a mixture of experts the
    rows decide which experts are read.

    Raises:
        IntegrityError: a graph's file can't be read as ONNX.
    """
    manifest = bundle.manifest
    if "moe" in manifest.target.model_type:
        return None
    if manifest.quantization is not None:
        return None  # bytes don't say how many numbers they are
    passes = [("target", width), ("lm_head", width)]
    if width > 1:
        drafting = width - 1 if manifest.drafter.samples_from_anchor else width
        head = "draft_lm_head" if "draft_lm_head" in manifest.graphs else "lm_head"
        passes += [("inject", width), ("draft", drafting), (head, width - 1)]
    sizes = {graph: weight_bytes(bundle.graph_path(graph)) for graph, _ in passes}
    item_size = 4 if manifest.precision == "fp32" else 2
    return StepFloor(
        weight_bytes=sum(sizes[graph] for graph, _ in passes),
        operations=sum(2 * rows * sizes[graph] // item_size for graph, rows in passes),
        bytes_per_second=bytes_per_second,
    )
