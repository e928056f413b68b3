"""Optimization profiles: which sizes of ``batch`` and ``rows`` an engine takes, and which it is tuned for."""

from __future__ import annotations

from dflash_rt.bundle.engine_sets import AxisRange, EngineLimits, ProfileSpec
from dflash_rt.bundle.manifest import Manifest

__all__ = ["graph_profiles"]

# Which passes each graph takes part in. The head sees a prefill's last rows only, and looking up embeddings
# depends on no size, so one profile serves it for everything. Graphs of some drafters only see blocks.
_PASSES = {
    "embed": ("prefill",),
    "target": ("prefill", "block"),
    "lm_head": ("block",),
    "inject": ("prefill", "block"),
    "draft": ("block",),
    "accept": ("block",),
    "draft_check": ("block",),
}


def graph_profiles(graph: str, manifest: Manifest, limits: EngineLimits) -> tuple[ProfileSpec, ...]:
    """The profiles of one graph, in the order of their indices in the engine.

    ``prefill`` takes 1 to prefill_chunk rows (fewer where max_seq_len is less), ``block`` 1 to block_size,
    both tuned for their maximum and for one sequence, which is what the backends decode. Plain decoding, one
    row at a time, uses ``block`` as well: a profile for exactly one row would get a second copy of every
    weight, in the layout of its own kernels. TensorRT-RTX 1.7 made the target of SmolLM2-135M in bf16 445 MB
    with it and 227 MB without.
    """
    block = manifest.drafter.block_size
    # TensorRT refuses a pass with more rows than the caches have.
    chunk = min(manifest.limits.prefill_chunk, limits.max_seq_len)
    if graph == "embed":
        chunk = max(chunk, block)  # its only profile serves blocks too
    rows = {"prefill": AxisRange(1, chunk, chunk), "block": AxisRange(1, block, block)}
    batch = AxisRange(1, 1, limits.max_batch)
    return tuple(
        ProfileSpec(name=name, batch=batch, rows=rows[name])  # type: ignore[arg-type]  # names of the table
        for name in _PASSES.get(graph, ("block",))
    )
