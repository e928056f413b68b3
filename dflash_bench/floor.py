"""The floor of a step: no step can be faster than reading the weights and caches that it uses from memory.

A row more costs hardly a further byte, only arithmetic, so this is a floor and not an estimate: one row comes
near it, and the more rows a pass has the more its arithmetic counts. Activations and the few rows of the
embedding are left out.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dflash_rt.bundle.contract import drafter_of
from dflash_rt.bundle.onnx_scan import weight_bytes

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["StepFloor", "cache_bytes", "measure_read_bandwidth", "step_floor", "weight_bytes"]

_PROBE_BYTES = 512 * 2**20
_PROBE_ROUNDS = 8
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class StepFloor:
    """What one step reads and computes at least.

    Attributes:
        weight_bytes: bytes of the weights that are used; one used twice is read twice.
        operations: multiplications and additions of its matrix products; ``None`` for quantised weights,
            whose bytes don't say how many numbers they are.
        cache_bytes: bytes of the rows of all caches that attention reads, where a context is given.
    """

    weight_bytes: int
    operations: int | None = None
    cache_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Weights and caches."""
        return self.weight_bytes + self.cache_bytes

    def milliseconds(self, bytes_per_second: float) -> float:
        """Time in which memory delivers them: no step is faster."""
        return 1e3 * self.total_bytes / bytes_per_second


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


def step_floor(bundle: Bundle, width: int, context: int | None = None) -> StepFloor | None:
    """The floor of a step of ``width`` rows, behind ``context`` committed rows (``None``: weights alone).

    A plain step (width 1) reads the target and the head, a drafted one also ``inject`` and what drafts: for
    most kinds of drafter ``draft`` and the head once more. All count as they are stored, quantised ones too.
    A GPU's cache keeps some of the head between its two uses at most: it is larger than the cache.

    ``None`` for a mixture of experts: its rows decide which experts are read.

    Raises:
        IntegrityError: a graph's file can't be read as ONNX.
    """
    manifest = bundle.manifest
    if "moe" in manifest.target.model_type:
        return None
    passes = [("target", width), ("lm_head", width)]
    if width > 1:
        # The embedding is a lookup of a few rows, and isn't counted.
        draft = drafter_of(manifest).graphs(width - 1)
        passes += [("inject", width), *(each for each in draft if not manifest.graphs[each[0]].is_lookup)]
    sizes = {graph: weight_bytes(bundle.graph_path(graph)) for graph, _ in passes}
    products = sum(2 * rows * sizes[graph] for graph, rows in passes) // _ITEM_BYTES[manifest.precision]
    return StepFloor(
        weight_bytes=sum(sizes[graph] for graph, _ in passes),
        operations=products if manifest.quantization is None else None,
        cache_bytes=0 if context is None else cache_bytes(bundle, width, context),
    )


def cache_bytes(bundle: Bundle, width: int, context: int) -> int:
    """Bytes of the valid rows of all caches that attention reads in such a step, its own rows included.

    A drafter with a window reads no more than that of its sliding layers.
    """
    target, drafter = bundle.manifest.target, bundle.manifest.drafter
    item = _ITEM_BYTES[bundle.manifest.precision]
    total = target.num_layers * 2 * target.num_key_value_heads * target.head_dim * item * (context + width)
    if width > 1:
        draft_row = 2 * drafter.num_key_value_heads * drafter.head_dim * item
        for kind in drafter.layer_types:
            window = drafter.sliding_window if kind == "sliding_attention" else None
            seen = context if window is None else min(context, window)
            total += draft_row * (seen + width)
    return total
