"""Plans of one bundle: see plan.py for what a step does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from dflash_rt.backends.device.plan import Binding, Buffer, BufferKind, Copy, Layout, Operation, Run
from dflash_rt.bundle.contract import drafter_of, state_tensors
from dflash_rt.bundle.dtypes import item_size
from dflash_rt.bundle.graph_names import STEP_GRAPHS
from dflash_rt.bundle.manifest import Manifest, TensorSpec
from dflash_rt.drafters.base import CopyRows, GraphRun
from dflash_rt.errors import BackendError

__all__ = ["STATE", "Planner"]

STATE = ("start", "anchors", "inject_start")
"""What moves from step to step, besides the caches and ``features``: each int64 ``[batch]``."""

# Tensor -> the buffer that it lies in, where that isn't the one of its name.
_OWN_NAMES: Mapping[str, str] = {}
_NEXT = {"anchors": "next_anchors", "start.out": "next_start"}


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
        self.drafter = drafter_of(manifest)
        self._state = manifest.state
        self.layout = Layout.of(self._buffers())

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
        """The drafter's plan. Fills ``drafted`` with ``verify_len - 1`` tokens."""
        drafts = verify_len - 1
        ids = f"draft_ids.{self.drafter.rows(drafts)}"
        # The other columns are masks, always.
        yield self._copy_rows("anchors", 1, 0, ids, self.drafter.rows(drafts), 0, 1)
        for step in self.drafter.step(drafts):
            if isinstance(step, GraphRun):
                names = dict(step.buffers)
                yield self._run(
                    step.graph, step.rows, {k: ids if v == "draft_ids" else v for k, v in names.items()}
                )
            elif isinstance(step, CopyRows):
                rows = step.rows
                yield self._copy_rows(step.source, step.source_rows, step.begin, step.target, rows, 0, rows)
            else:
                yield self._run("draft_check", step.rows, {"logits": step.buffer, "finite": "draft_finite"})

    # --- Operations ---

    def _run(
        self, graph: str, rows: int, names: Mapping[str, str] = _OWN_NAMES, *, prefill: bool = False
    ) -> Run:
        """``names``: buffers of the tensors that don't lie in the buffer of their own name."""
        spec, owners = self._graphs[graph], state_tensors(graph, self._state)

        def bind(tensor: TensorSpec) -> Binding:
            name = spec.aliases.get(tensor.name, tensor.name)
            buffer = f"{owners[name]}.{name}" if name in owners else names.get(name, name)
            shape = tensor.sized(batch=self._batch, rows=rows, capacity=self.capacity)
            return Binding(tensor.name, buffer, shape, tensor.dtype)

        return Run(graph, tuple(map(bind, spec.inputs)), tuple(map(bind, spec.outputs)), prefill)

    def _copy_rows(
        self, source: str, of: int, begin: int, target: str, into: int, at: int, rows: int
    ) -> Copy:
        """``rows`` rows from ``begin`` on of a tensor of ``of`` rows, to row ``at`` of one of ``into``."""
        buffer = self.layout.buffers[source]
        row = item_size(buffer.dtype) * prod(buffer.shape[2:])
        return Copy(
            source, begin * row, of * row, target, at * row, into * row, rows * row, height=self._batch
        )

    # --- Buffers ---

    def _buffers(self) -> Iterator[Buffer]:
        block = self.block_size
        for name in ("embeddings", "hidden", "features"):
            yield self._buffer("target", name, self.most_rows)
        yield self._buffer("embed", "input_ids", self.most_rows)
        yield self._buffer("lm_head", "hidden", block, "head_hidden")
        yield self._buffer("lm_head", "logits", block)
        yield from self._draft_buffers({"embeddings", "head_hidden", *STATE})
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
        for state in self._state:
            for name in state.tensors:
                yield self._buffer(state.graphs[0], name, 1, f"{state.name}.{name}", "cache")

    def _draft_buffers(self, present: set[str]) -> Iterator[Buffer]:
        """Those that the drafter's plan names, at their largest; ``present`` are made already."""
        for run in self.drafter.step(self.block_size - 1):
            if not isinstance(run, GraphRun):
                continue
            spec, owners = self._graphs[run.graph], state_tensors(run.graph, self._state)
            for tensor in (*spec.inputs, *spec.outputs):
                name = run.buffer(tensor.name)
                if name == "draft_ids":
                    for drafts in range(1, self.block_size):
                        rows = self.drafter.rows(drafts)
                        yield self._buffer(run.graph, tensor.name, rows, f"draft_ids.{rows}", "constant")
                elif spec.aliases.get(name, name) not in owners and name not in (*present, "offset"):
                    present.add(name)
                    yield self._buffer(run.graph, tensor.name, run.rows, name)

    def _buffer(
        self, graph: str, tensor: str, rows: int, name: str = "", kind: BufferKind = "activation"
    ) -> Buffer:
        found = self._graphs[graph].tensor(tensor)
        shape = found.sized(batch=self._batch, rows=rows, capacity=self.capacity)
        return Buffer(name or tensor, found.dtype, shape, kind)


def _prefill_rows(chunk: int, block_size: int) -> tuple[int, ...]:
    """``chunk``, and powers of two below it. The first one fits wherever a block does."""
    sizes, size = [], 1 << block_size.bit_length() - 1
    while size < chunk:
        sizes.append(size)
        size *= 2
    return (*sizes, chunk)
