"""What a step has to read at least: weights and caches.

Activations and the few rows of the embedding are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from dflash_bench.floor import weight_bytes
from dflash_rt import Bundle
from dflash_rt.errors import BackendError

__all__ = ["StepBytes", "cache_bytes", "step_bytes"]

_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one step reads."""

    weights: int
    caches: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.caches

    def floor_ms(self, bytes_per_second: float) -> float:
        """Milliseconds in which memory delivers them: no step is faster."""
        return 1e3 * self.total / bytes_per_second


def step_bytes(bundle: Bundle, width: int, context: int) -> StepBytes:
    """Bytes of a step of ``width`` rows behind ``context`` committed rows.

    A plain step (width 1) reads the target and the head, a drafted one also ``inject``, ``draft`` and the
    head a second time; all as they are stored, quantised ones too. A GPU's cache keeps some of the head
    between its two uses at most: it is larger than the cache.

    Raises BackendError for a mixture of experts: its rows decide which weights are read.
    """
    manifest = bundle.manifest
    if "moe" in manifest.target.model_type:
        raise BackendError(
            "a mixture of experts has no floor",
            found=manifest.target.model_type,
            expected="a target whose steps all read the same weights",
            remedy="measure another pair",
        )
    graphs = ["target", "lm_head"]
    if width > 1:
        graphs += ["inject", "draft", "draft_lm_head" if "draft_lm_head" in manifest.graphs else "lm_head"]
    weights = sum(weight_bytes(bundle.graph_path(graph)) for graph in graphs)
    return StepBytes(weights, cache_bytes(bundle, width, context))


def cache_bytes(bundle: Bundle, width: int, context: int) -> int:
    """Bytes of the valid rows of all caches that attention reads in such a step, its own rows included.

    A drafter with a window reads no more than that of its sliding layers.
    """
    target, drafter = bundle.manifest.target, bundle.manifest.drafter
    item = _ITEM_BYTES[bundle.manifest.precision]
    row = 2 * target.num_key_value_heads * target.head_dim * item
    total = target.num_layers * row * (context + width)
    if width > 1:
        draft_row = 2 * drafter.num_key_value_heads * drafter.head_dim * item
        for kind in drafter.layer_types:
            window = drafter.sliding_window if kind == "sliding_attention" else None
            seen = context if window is None else min(context, window)
            total += draft_row * (seen + width)
    return total
