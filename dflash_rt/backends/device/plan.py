"""What a pass does, as data: buffers in one piece of memory, and operations on them in order.

A plan knows no device and allocates nothing, so that all of it can be checked without one. ``start``, the
anchor and everything else that a step depends on lies in buffers, which the step itself moves on: the
operations of a step depend on its numbers of rows alone, and can be captured once and launched again::

    inject(features, inject_start)      a block from the start of the last pass, if the sequence drafts
    embed, draft(start), lm_head        drafted
    block = [anchors, drafted]
    embed, target(start), lm_head       token_ids; features for the next step
    accept(block, token_ids, start)     accepted, next_anchors, next_start
    inject_start = start;  start = next_start;  anchors = next_anchors
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dflash_rt.bundle.dtypes import item_size

__all__ = ["Binding", "Buffer", "Copy", "Layout", "Operation", "Run"]

# What TensorRT asks of addresses; also what cudaMalloc gives.
ALIGNMENT = 256

BufferKind: TypeAlias = Literal["cache", "state", "constant", "activation", "readback"]


@dataclass(frozen=True)
class Buffer:
    """Memory of one tensor at its largest; a smaller shape uses its beginning.

    ``kind``: ``cache``; ``state`` moves from step to step; ``constant`` is written at load; ``readback`` is
    what the host reads after a pass; every other is an ``activation``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: BufferKind = "activation"

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return int(np.prod(self.shape, dtype=np.int64)) * item_size(self.dtype)


@dataclass(frozen=True)
class Binding:
    """A tensor of a graph that lies at the beginning of a buffer, with its shape in this run."""

    tensor: str
    buffer: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Run:
    """Run a graph. ``prefill`` says which of an engine's profiles it belongs to."""

    graph: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    prefill: bool = False


@dataclass(frozen=True)
class Copy:
    """Copy ``height`` pieces of ``width`` bytes, each a pitch behind the one before."""

    source: str
    source_at: int
    source_pitch: int
    target: str
    target_at: int
    target_pitch: int
    width: int
    height: int


Operation: TypeAlias = Run | Copy


@dataclass(frozen=True)
class Layout:
    """Where every buffer lies in one allocation. Those that the host reads back are next to each other."""

    buffers: dict[str, Buffer]
    offsets: dict[str, int]
    nbytes: int

    @classmethod
    def of(cls, buffers: Iterable[Buffer]) -> Layout:
        """Lay buffers out, aligned, those that the host reads back last."""
        ordered = sorted(buffers, key=lambda buffer: buffer.kind == "readback")
        offsets, at = {}, 0
        for buffer in ordered:
            offsets[buffer.name] = at
            at += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        return cls({buffer.name: buffer for buffer in ordered}, offsets, at)

    @property
    def readback(self) -> tuple[int, int]:
        """Offset and bytes of all that the host reads."""
        begin = min(self.offsets[name] for name, buffer in self.buffers.items() if buffer.kind == "readback")
        return begin, self.nbytes - begin

    def bytes_of(self, *kinds: BufferKind) -> int:
        """Bytes of the buffers of these kinds, without the gaps between them."""
        return sum(buffer.nbytes for buffer in self.buffers.values() if buffer.kind in kinds)
