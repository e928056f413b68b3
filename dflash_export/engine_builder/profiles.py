"""Optimization profiles: which sizes of ``batch`` and ``rows`` an engine takes, and which it is tuned for."""

from __future__ import annotations

from dflash_rt.engines import AxisRange, ProfileSpec
from dflash_rt.manifest import Manifest

__all__ = ["graph_profiles"]

# Which passes each graph takes part in. The head sees a prefill's last rows only, and looking up embeddings
# depends on no size, so one profile serves it for everything.
_PASSES = {
    "embed": ("prefill",),
    "target": ("prefill", "block"),
    "lm_head": ("block",),
    "inject": ("prefill", "block"),
    "draft": ("block",),
    "draft_logits": ("block",),
}


def graph_profiles(graph: str, manifest: Manifest, max_batch: int) -> tuple[ProfileSpec, ...]:
    """The profiles of one graph, in the order of their indices in the engine.

    ``prefill`` takes 1 to prefill_chunk rows, ``block`` 1 to block_size, both tuned for their maximum.
    Plain decoding, one row at a time, uses ``block`` as well. A profile for exactly one row would get a second
    copy of every weight, in the layout of its own kernels: TensorRT-RTX 1.7 made the target of SmolLM2-135M in
    bf16 445 MB with it and 227 MB without.
    """
    block = manifest.drafter.block_size
    # Blocks are embedded with the one profile that `embed` has.
    chunk = max(manifest.limits.prefill_chunk, block) if graph == "embed" else manifest.limits.prefill_chunk
    rows = {
        "prefill": AxisRange(1, chunk, chunk),
        "block": AxisRange(1, block, block),
    }
    batch = AxisRange(1, max_batch, max_batch)
    return tuple(
        ProfileSpec(name=name, batch=batch, rows=rows[name])  # type: ignore[arg-type]  # names of the table
        for name in _PASSES[graph]
    )
