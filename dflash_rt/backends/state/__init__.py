"""What a slot keeps between calls, in host memory: one file for each kind of state in a manifest."""

from __future__ import annotations

from dflash_rt.backends.state.kv import Arrays, KvState
from dflash_rt.backends.state.window import WindowState
from dflash_rt.bundle.manifest import Manifest

__all__ = ["Arrays", "KvState", "make_states"]


def make_states(manifest: Manifest, batch: int, *, most_rows: int) -> dict[str, KvState]:
    """State by name for ``batch`` slots; ``most_rows`` is the rows of the longest call."""
    states: dict[str, KvState] = {}
    for spec in manifest.state:
        tensors = manifest.graphs[spec.graphs[0]].inputs
        if spec.kind == "window":
            block_size = manifest.drafter.block_size
            states[spec.name] = WindowState(spec, tensors, batch, most_rows=most_rows, block_size=block_size)
        else:
            states[spec.name] = KvState(spec, tensors, batch)
    return states
