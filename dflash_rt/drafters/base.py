"""What a draft step does, as data: graphs in order, and the buffers that they read and write.

A backend on the CPU carries the operations out at once, one on a device records them. It provides the buffers
that they name: it makes those of a graph's own tensors (a tensor lies in the buffer of its own name unless
``GraphRun.buffers`` says otherwise), caches where the graph's state is, and these before a step:

=================  ====================================================================================
``draft_ids``      int64 ``[batch, rows]``: the anchors, then mask tokens
``anchors``        int64 ``[batch]``
``start``          int64 ``[batch]``: where the block begins
``temperature``    float32 ``[batch]``, for a drafter that samples: of each slot; 0 takes the best
``uniforms``       float32 ``[batch, num_draft_tokens]``, for a drafter that samples: one number a draft
=================  ====================================================================================

After it ``drafted`` holds the tokens, int64 ``[batch, num_draft_tokens]``, always ids of the target; after
one that samples, ``candidates`` and ``probabilities`` say what they were sampled from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

__all__ = [
    "FLOAT_DTYPES",
    "PROPOSAL",
    "CheckFinite",
    "CopyRows",
    "Drafter",
    "GraphRun",
    "Link",
    "Operation",
    "Shape",
    "Sizes",
    "Tensors",
]

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
PROPOSAL = ("candidates", "probabilities")
"""Buffers that say what the tokens of a drafter that samples were sampled from."""

Shape: TypeAlias = "tuple[str | int, ...]"
# Name -> (allowed dtypes, shape)
Tensors: TypeAlias = dict[str, tuple[tuple[str, ...], Shape]]
# (from graph, output, to graph, input): the buffer is handed over as it is, so the dtypes must agree.
Link: TypeAlias = tuple[str, str, str, str]


@dataclass(frozen=True)
class Sizes:
    """Sizes that a drafter's own graphs depend on. ``candidates``: of its selector, 1 without one."""

    hidden: int
    vocab: int
    own_vocab: int
    candidates: int


@dataclass(frozen=True)
class GraphRun:
    """Run ``graph`` on ``rows`` rows.

    ``buffers`` are pairs of a tensor and the buffer that it lies in, where that isn't the one of its own
    name. ``stage`` is what its time counts as.
    """

    graph: str
    rows: int
    stage: Literal["embed", "draft", "draft_head", "target", "target_head", "inject"]
    buffers: tuple[tuple[str, str], ...] = ()

    def buffer(self, tensor: str) -> str:
        """The buffer that a tensor lies in."""
        return next((buffer for name, buffer in self.buffers if name == tensor), tensor)


@dataclass(frozen=True)
class CopyRows:
    """Copy ``rows`` rows from row ``begin`` of a tensor of ``source_rows`` to the beginning of another."""

    source: str
    source_rows: int
    begin: int
    target: str
    rows: int


@dataclass(frozen=True)
class CheckFinite:
    """The drafter's logits ``[batch, rows, vocab]`` in ``buffer`` must be finite."""

    buffer: str
    rows: int


Operation: TypeAlias = GraphRun | CopyRows | CheckFinite


class Drafter(ABC):
    """One kind of drafter: which graphs its bundles have, and how it drafts.

    Args:
        graphs: names of the graphs that a bundle has.
        samples_from_anchor: whether the anchor's own row drafts too.

    Attributes:
        kind: what the manifest calls it.
        required_graphs: graphs that its bundles have besides those of every bundle.
        optional_graphs: graphs that its bundles may have besides.
        embed: the graph that embeds the block's token ids.
        head: the graph that gives the logits of hidden rows, and the best token of each.
        links: see :data:`Link`.
        has_own_vocabulary: whether its head may know fewer tokens than the target's, and whether
            ``samples_from_anchor`` is possible.
        samples: whether it chooses among candidates, and can sample what it proposes.
    """

    kind: ClassVar[str]
    required_graphs: ClassVar[tuple[str, ...]] = ()
    optional_graphs: ClassVar[tuple[str, ...]] = ()
    embed: ClassVar[str] = "embed"
    head: ClassVar[str] = "lm_head"
    links: ClassVar[tuple[Link, ...]] = ()
    has_own_vocabulary: ClassVar[bool] = False
    samples: ClassVar[bool] = False

    def __init__(self, graphs: Collection[str], *, samples_from_anchor: bool) -> None:
        self._graphs = frozenset(graphs)
        # Rows of a draft pass that draft nothing: the anchor's, unless it drafts too.
        self._silent_rows = 0 if samples_from_anchor else 1

    @classmethod
    @abstractmethod
    def tensors(cls, sizes: Sizes) -> dict[str, tuple[Tensors, Tensors]]:
        """Inputs and outputs of its own graphs, by graph; axes as in dflash_rt/bundle/contract.py."""

    def rows(self, num_draft_tokens: int) -> int:
        """Rows of a draft pass that proposes that many tokens."""
        return num_draft_tokens + self._silent_rows

    def step(self, num_draft_tokens: int) -> tuple[Operation, ...]:
        """Operations that draft so many tokens, at least one, after earlier passes' features are injected."""
        _, _, operations = self._best(num_draft_tokens)
        return operations

    def graphs(self, num_draft_tokens: int) -> tuple[tuple[str, int], ...]:
        """The graphs that :meth:`step` runs, and the rows of each: what it reads and computes at least."""
        step = self.step(num_draft_tokens)
        return tuple((run.graph, run.rows) for run in step if isinstance(run, GraphRun))

    def _best(self, num_draft_tokens: int) -> tuple[str, str, tuple[Operation, ...]]:
        """Buffers of the hidden rows and of their logits, and the operations up to the best tokens."""
        rows, hidden, logits = self.rows(num_draft_tokens), "draft_hidden", "draft_logits"
        operations: tuple[Operation, ...] = (
            GraphRun(self.embed, rows, "embed", (("input_ids", "draft_ids"),)),
            GraphRun("draft", rows, "draft", (("hidden", hidden),)),
        )
        if self._silent_rows:
            operations += (CopyRows(hidden, rows, self._silent_rows, "head_hidden", num_draft_tokens),)
            hidden = "head_hidden"
        drafted = ("token_ids", "drafted")
        names = (("hidden", hidden), ("logits", logits), drafted)
        operations += (GraphRun(self.head, num_draft_tokens, "draft_head", names),)
        if "draft_logits" in self._graphs:
            names = (("logits", logits), ("logits.out", "draft_logits.out"), drafted)
            operations += (GraphRun("draft_logits", num_draft_tokens, "draft_head", names),)
            logits = "draft_logits.out"
        return hidden, logits, (*operations, CheckFinite(logits, num_draft_tokens))
