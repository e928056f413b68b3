"""Plans of one bundle: see plan.py for what a step does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dflash_rt.backends.device.plan import (
    Binding,
    Buffer,
    BufferKind,
    Copy,
    Layout,
    Operation,
    Run,
    item_size,
    sized,
)
from dflash_rt.bundle.graph_names import STEP_GRAPHS
from dflash_rt.bundle.manifest import Manifest, TensorSpec
from dflash_rt.errors import BackendError

__all__ = ["STATE", "Planner"]

STATE = ("start", "anchors", "inject_start")
"""What moves from step to step, besides the caches and ``features``: each int64 ``[batch]``."""

# Tensor -> the buffer that it lies in, where that isn't the one of its name.
_OWN_NAMES: Mapping[str, str] = {}
_NEXT = {"anchors": "next_anchors", "start.out": "next_start"}

_CACHED = {"target": "target", "inject": "draft", "draft": "draft"}  # graph -> whose caches


class Planner:
    """Makes plans for one slot whose caches have ``capacity`` rows.

    ``prefill_chunk`` is the most rows of a prefill pass.

    A run is made for each number of rows, so there are few of them. A prefill pass has one of
    ``prefill_rows``: what is behind the prompt's own rows is masked, and overwritten before it is
    committed, like a rejected draft. In the same way each step injects ``block_size`` rows, however many
    the last pass had. What is behind those lies behind that pass, at most ``block_size`` rows from its start.

    Raises:
        BackendError: the bundle lacks the graphs that end a step.
    """

    def __init__(self, manifest: Manifest, *, capacity: int, prefill_chunk: int) -> None:
        missing = [name for name in STEP_GRAPHS if name not in manifest.graphs]
        if missing:
            raise BackendError(
                "the bundle can't run on a device",
                found=f"no graph {', '.join(missing)}",
                expected="the graphs that end a step there",
                remedy="build the bundle again with `dflash-export build --force`",
            )
        self._graphs = manifest.graphs
        # More would need a place for each slot's features: those of few rows lie closer than a block's.
        self._batch, self.capacity = 1, capacity
        self.block_size = manifest.drafter.block_size
        self.most_rows = max(prefill_chunk, self.block_size)
        self.prefill_rows = _prefill_rows(prefill_chunk, self.block_size)
        # Rows of a draft pass that draft nothing: the anchor's, unless it drafts too.
        self._silent = 0 if manifest.drafter.samples_from_anchor else 1
        self._draft_embed = "draft_embed" if "draft_embed" in manifest.graphs else "embed"
        self._draft_head = "draft_lm_head" if "draft_lm_head" in manifest.graphs else "lm_head"
        self.layout = Layout.of(self._buffers())

    def draft_rows(self, verify_len: int) -> int:
        """Rows of the draft pass of a step of ``verify_len`` rows."""
        return verify_len - 1 + self._silent

    # --- Plans ---

    def pieces(self, rows: int, room: int) -> Iterator[tuple[int, int]]:
        """The passes that feed ``rows`` prompt rows: rows of each, and how many of them are the prompt's.

        ``room`` is how many rows the caches have from the first one on: a block more than ``rows`` at least.
        """
        while rows:
            size = next((each for each in self.prefill_rows if rows <= each <= room), 0)
            used = rows if size else max(each for each in self.prefill_rows if each <= rows)
            yield size or used, used
            rows, room = rows - used, room - used

    def prefill(self, rows: int, used: int, *, inject: bool) -> tuple[Operation, ...]:
        """Feed ``rows`` of ``input_ids``; the choice after the first ``used`` is left in ``token_ids``."""
        plan: list[Operation] = [
            self._run("embed", rows, prefill=True),
            self._run("target", rows, prefill=True),
        ]
        if inject:
            plan.append(self._run("inject", rows, prefill=True))
        plan += [
            self._copy_rows("hidden", rows, used - 1, "head_hidden", 1, 0, 1),
            self._run("lm_head", 1, {"hidden": "head_hidden"}),
            self._run("accept", 1, _NEXT),  # only to see whether the logits are finite
        ]
        return tuple(plan)

    def step(self, verify_len: int, *, inject: bool) -> tuple[Operation, ...]:
        """Inject the features of the last pass, draft, verify, accept, and move on."""
        plan: list[Operation] = []
        if inject:
            plan.append(self._run("inject", self.block_size, {"start": "inject_start"}))
        if verify_len > 1:
            plan += self._draft(verify_len)
            plan.append(self._copy_rows("drafted", verify_len - 1, 0, "block", verify_len, 1, verify_len - 1))
        plan += [
            self._copy_rows("anchors", 1, 0, "block", verify_len, 0, 1),
            self._run("embed", verify_len, {"input_ids": "block"}),
            self._run("target", verify_len),
            self._run("lm_head", verify_len),
            self._run("accept", verify_len, _NEXT),
            self._copy_rows("start", 1, 0, "inject_start", 1, 0, 1),
            self._copy_rows("next_start", 1, 0, "start", 1, 0, 1),
            self._copy_rows("next_anchors", 1, 0, "anchors", 1, 0, 1),
        ]
        return tuple(plan)

    def _draft(self, verify_len: int) -> Iterator[Operation]:
        """Fill ``drafted`` with ``verify_len - 1`` tokens."""
        rows, drafts = self.draft_rows(verify_len), verify_len - 1
        ids, hidden, logits = f"draft_ids.{rows}", "draft_hidden", "draft_logits"
        yield self._copy_rows("anchors", 1, 0, ids, rows, 0, 1)  # the other columns are masks, always
        yield self._run(self._draft_embed, rows, {"input_ids": ids})
        yield self._run("draft", rows, {"hidden": hidden})
        if self._silent:
            yield self._copy_rows(hidden, rows, 1, "head_hidden", drafts, 0, drafts)
            hidden = "head_hidden"
        names = {"hidden": hidden, "logits": logits, "token_ids": "drafted"}
        yield self._run(self._draft_head, drafts, names)
        if "draft_logits" in self._graphs:
            names = {"logits": logits, "logits.out": "draft_logits.out", "token_ids": "drafted"}
            yield self._run("draft_logits", drafts, names)
            logits = "draft_logits.out"
        yield self._run("draft_check", drafts, {"logits": logits, "finite": "draft_finite"})
        if "select" in self._graphs:
            names = {"hidden": hidden, "logits": logits, "token_ids": "drafted"}
            yield self._run("select", drafts, names)

    # --- Operations ---

    def _run(
        self, graph: str, rows: int, names: Mapping[str, str] = _OWN_NAMES, *, prefill: bool = False
    ) -> Run:
        """``names``: buffers of the tensors that don't lie in the buffer of their own name."""
        spec, owner = self._graphs[graph], _CACHED.get(graph)

        def bind(tensor: TensorSpec) -> Binding:
            name = spec.aliases.get(tensor.name, tensor.name)
            buffer = f"{owner}.{name}" if "capacity" in tensor.shape else names.get(name, name)
            return Binding(tensor.name, buffer, sized(tensor, self._batch, rows, self.capacity), tensor.dtype)

        return Run(graph, tuple(map(bind, spec.inputs)), tuple(map(bind, spec.outputs)), prefill)

    def _copy_rows(
        self, source: str, of: int, begin: int, target: str, into: int, at: int, rows: int
    ) -> Copy:
        """``rows`` rows from ``begin`` on of a tensor of ``of`` rows, to row ``at`` of one of ``into``."""
        buffer = self.layout.buffers[source]
        row = item_size(buffer.dtype) * _product(buffer.shape[2:])
        return Copy(
            source, begin * row, of * row, target, at * row, into * row, rows * row, height=self._batch
        )

    # --- Buffers ---

    def _buffers(self) -> Iterator[Buffer]:
        block, drafts = self.block_size, self.block_size - 1
        for name in ("embeddings", "hidden", "features"):
            yield self._buffer("target", name, self.most_rows)
        yield self._buffer("embed", "input_ids", self.most_rows)
        yield self._buffer("lm_head", "hidden", block, "head_hidden")
        yield self._buffer("lm_head", "logits", block)
        yield self._buffer("draft", "hidden", block, "draft_hidden")
        yield self._buffer(self._draft_head, "logits", drafts, "draft_logits")
        if "draft_logits" in self._graphs:
            yield self._buffer("draft_logits", "logits.out", drafts, "draft_logits.out")
        if "select" in self._graphs:
            for name in ("temperature", "uniforms", "candidates", "probabilities"):
                yield self._buffer("select", name, drafts)
        yield self._buffer(self._draft_head, "token_ids", drafts, "drafted")
        for verify_len in range(2, block + 1):
            rows = self.draft_rows(verify_len)
            yield self._buffer(self._draft_embed, "input_ids", rows, f"draft_ids.{rows}", "constant")
        yield Buffer("offset", "int64", (self._batch,), "constant")
        for name in ("next_start", "next_anchors"):
            yield Buffer(name, "int64", (self._batch,))
        # Where a step began, to run it a second time: see runner.py.
        yield self._buffer("target", "features", block, "saved.features")
        for name in STATE:
            yield Buffer(f"saved.{name}", "int64", (self._batch,))
        yield from self._caches()
        yield self._buffer("accept", "block", block, "block", "readback")
        yield self._buffer("accept", "token_ids", block, "token_ids", "readback")
        for name in (*STATE, "accepted", "finite", "draft_finite"):
            yield Buffer(name, "int64", (self._batch,), "readback")

    def _caches(self) -> Iterator[Buffer]:
        for graph in ("target", "draft"):
            for tensor in self._graphs[graph].inputs:
                if "capacity" in tensor.shape:
                    yield self._buffer(graph, tensor.name, 1, f"{graph}.{tensor.name}", "cache")

    def _buffer(
        self, graph: str, tensor: str, rows: int, name: str = "", kind: BufferKind = "activation"
    ) -> Buffer:
        spec = self._graphs[graph]
        (found,) = (each for each in (*spec.inputs, *spec.outputs) if each.name == tensor)
        shape = sized(found, self._batch, rows, self.capacity)
        return Buffer(name or tensor, found.dtype, shape, kind)


def _prefill_rows(chunk: int, block_size: int) -> tuple[int, ...]:
    """``chunk``, and powers of two below it. The first one fits wherever a block does."""
    sizes, size = [], 1 << block_size.bit_length() - 1
    while size < chunk:
        sizes.append(size)
        size *= 2
    return (*sizes, chunk)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
