"""ONNX Runtime on the CPU: the backend that works everywhere.

Every buffer is a numpy array that is allocated once and bound in place; a step runs the graphs over
these bindings and copies nothing but a few rows of hidden states. Facts that shaped this file, each
tried on ONNX Runtime 1.32:

- ``TensorScatter`` writes in place only if one buffer is bound as input and as output.
- ``Attention`` costs time for every row of the cache buffer, valid or not (``GroupQueryAttention`` of a
  fused target doesn't), so the caches start small and grow by an eighth or a bucket when a sequence
  outgrows them. That is the only time a cache is allocated or copied; rows of a windowed drafter's caches
  also move to the front now and then.
- ``MatMul(x, DequantizeLinear(codes, scales))`` becomes one operator, ``MatMulNBits``, which rounds each
  block of ``x`` to 8 bits first. Without that it is slower than fp32 as soon as there are two rows.
- It gives a row the same bits however many rows there are. Attention does so from two rows on, but
  multiplies one row by other kernels. 1e-7 is enough to round something behind it another way, which moves
  logits by a quarter of their spread. So a quantised target never gets one row alone.
- Each session has its own thread pool, whose idle threads would spin while another session works.
- A draft is a plan of the drafter's kind (dflash_rt/drafters), carried out operation by operation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.backends.base import Backend, Inject, StepOutput
from dflash_rt.backends.host_arrays import HostBuffer, check_finite
from dflash_rt.backends.onnxruntime_session import open_graph, require_fused, run_bound
from dflash_rt.backends.state import make_states
from dflash_rt.bundle.contract import drafter_of, state_tensors
from dflash_rt.bundle.dtypes import NUMPY_TYPES, ONNX_TYPES
from dflash_rt.bundle.graph_names import STEP_GRAPHS
from dflash_rt.bundle.manifest import GraphSpec, TensorSpec
from dflash_rt.drafters.base import PROPOSAL, CopyRows, GraphRun
from dflash_rt.errors import BackendError
from dflash_rt.sampling.proposal import DraftSampling, Proposal

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["OnnxRuntimeBackend"]

_BUCKET = 128  # rows that a cache grows by, at least
# A step drafts first and verifies then: buffers of the draft that lie in those of the verify pass, where they
# fit. What changes logits does so in place.
_SHARED = {
    "draft_ids": "input_ids",
    "draft_logits": "logits",
    "draft_logits.out": "logits",
    "drafted": "token_ids",
}


class OnnxRuntimeBackend(Backend):
    """Backend ``onnxruntime``: see :class:`dflash_rt.backends.base.Backend` for the protocol.

    Args:
        bundle: an open bundle of any precision that ONNX Runtime's CPU kernels cover.
        threads: intra-op threads; ``None`` is ONNX Runtime's default, one per physical core.
        integer_activations: of a quantised bundle: round what enters a quantised layer to 8 bits, which is
            fast. ``False`` computes with the dequantised weights, which is exact and takes the time and
            memory of a bundle that isn't quantised.
        fused: run the target in fused operators of ONNX Runtime, if the bundle has it in that form; that is
            faster. ``None``: if it has. ``True`` may only be asked for if it has.
        fast_plain: of a quantised bundle with integer activations: feed the one row of a plain step alone.
            Such a step is up to 15 % faster, and its tokens are no longer those of drafted decoding. It may
            only be asked for where it changes something.

    Raises:
        BackendError: ONNX Runtime can't load a graph of the bundle, ``fast_plain`` would change nothing, or
            the bundle has no fused target.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        integer_activations: bool = True,
        fast_plain: bool = False,
        fused: bool | None = None,
    ) -> None:
        manifest = bundle.manifest
        rounds = manifest.quantization is not None and integer_activations
        if fast_plain and not rounds:
            raise BackendError(
                "fast_plain changes nothing here",
                found="float activations" if manifest.quantization else "a bundle that isn't quantised",
                expected="a quantised bundle whose activations are rounded",
                remedy="leave it out: plain steps are as fast as they can be, and equal to drafted ones",
            )
        if fused:
            require_fused(bundle, on_gpu=False)
        # What kept step costs are told apart by.
        self.name = "onnxruntime" + ("-fast-plain" if fast_plain else "")
        if manifest.quantization is not None and not integer_activations:
            self.name += "-float-activations"
        if fused is False:
            self.name += "-unfused"
        self._pads_plain_steps = rounds and not fast_plain
        self._manifest = manifest
        self._block_size = manifest.drafter.block_size
        self._mask_token_id = manifest.drafter.mask_token_id
        # Rejected rows of the last block may lie behind the last row that a request can commit.
        self._limit = manifest.limits.max_seq_len + self._block_size
        self._drafter = drafter_of(manifest)
        self._draft_step = cache(self._drafter.step)
        self._graphs: dict[str, GraphSpec] = {
            name: graph for name, graph in manifest.graphs.items() if name not in STEP_GRAPHS
        }
        self._owners = {name: state_tensors(name, manifest.state) for name in self._graphs}
        self._states_of = {name: dict.fromkeys(owners.values()) for name, owners in self._owners.items()}
        if integer_activations:
            config = {"session.qdq_matmulnbits_accuracy_level": "4"}  # int8
        else:
            config = {"session.disable_quant_qdq": "1"}  # constants are folded
        self._sessions = {
            name: open_graph(bundle, name, fused=fused is not False, threads=threads, config=config)
            for name in self._graphs
        }
        self._batch = 1
        # A prompt isn't longer than max_seq_len, whatever a chunk may be, nor is what waits to be injected.
        chunk = min(manifest.limits.prefill_chunk, manifest.limits.max_seq_len)
        self._kept_rows = max(chunk, self._block_size)
        self._allocate()

    def share_weights(self) -> OnnxRuntimeBackend:
        other = copy.copy(self)
        other._sessions = dict(self._sessions)
        other._allocate()
        return other

    def _allocate(self) -> None:
        """Everything that changes while requests run."""
        self._stage_seconds: dict[str, float] = {}
        self._head_shape = (self._batch, 0)  # batch and rows of what lies in the buffer `logits`
        self._buffers = self._make_buffers(self._kept_rows)
        self._states = make_states(self._manifest, self._batch, most_rows=self._kept_rows)
        # Inputs and outputs that have one value for each slot.
        self._slots = {
            (name, tensor.name): np.zeros(self._batch, NUMPY_TYPES[tensor.dtype])
            for name, graph in self._graphs.items()
            for tensor in graph.inputs
            if tensor.shape == ("batch",)
        }
        self._capacity = 0
        self._bindings: dict[tuple[GraphRun, int], ort.IOBinding] = {}
        self.reserve(0)

    @property
    def run_seconds(self) -> dict[str, float]:
        """Seconds inside ``run`` by stage, since the backend was made."""
        return dict(self._stage_seconds)

    @property
    def capacity(self) -> int:
        """Rows that each cache buffer of the target holds now; the drafter's may hold a window only."""
        return self._capacity

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches now."""
        return sum(array.nbytes for state in self._states.values() for array in state.arrays.values())

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` committed rows and one block; grows the caches when they are full."""
        needed = rows + self._block_size
        if needed <= self._capacity:
            return
        if needed > self._limit:
            raise BackendError(
                "a sequence outgrew the bundle",
                found=f"{rows} rows",
                expected=f"at most {self._limit - self._block_size}",
                remedy="shorten the prompt or max_new_tokens, or build with a larger --max-seq-len",
            )
        # An eighth more than before keeps the copies of a long run below nine times its last cache.
        wanted = max(needed, self._capacity + self._capacity // 8)
        self._grow(min(-(-wanted // _BUCKET) * _BUCKET, self._limit))

    def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
        batch, rows = token_ids.shape
        for state in self._states.values():
            state.restart(start == 0)
        self._target(token_ids, start)
        if inject:
            self._run_at(GraphRun("inject", rows, "inject"), start)
        hidden = self._buffers["hidden"].view(batch, rows)
        return self._head(hidden[:, -1:])[:, 0]

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        batch = anchors.shape[0]
        block = np.full((batch, verify_len), self._mask_token_id, np.int64)
        block[:, 0] = anchors
        if inject is not None:
            places = self._places(inject.start, inject.rows)
            self._buffers["features"].view(batch, inject.rows)[:] = self._kept[places]
            self._run_at(GraphRun("inject", inject.rows, "inject"), inject.start)
        proposal = None
        if verify_len > 1:
            block[:, 1:] = self._draft(block, start, sampling)
            if sampling is not None and self._drafter.samples:
                arrays = (self._buffers[name].view(batch, verify_len - 1) for name in PROPOSAL)
                proposal = Proposal(*(array.copy() for array in arrays))
        self._target(block, start)
        self._kept[self._places(start, verify_len)] = self._buffers["features"].view(batch, verify_len)
        verified = self._head(self._buffers["hidden"].view(batch, verify_len))
        return StepOutput(drafted=block[:, 1:], verified=verified, proposal=proposal)

    def logits(self) -> FloatArray:
        """A view; see the protocol. The target's head always runs last."""
        return self._buffers["logits"].view(*self._head_shape)

    def clear(self) -> None:
        for state in self._states.values():
            state.clear()
        # Features of a failed step must not be injected by the next sequence either.
        for buffer in self._buffers.values():
            buffer.clear()

    def close(self) -> None:
        self._bindings.clear()
        self._sessions.clear()
        self._states.clear()
        self._buffers = {}
        self._capacity = 0

    @property
    def _kept(self) -> npt.NDArray[Any]:
        """Features of the rows that steps fed in, ``[batch, rows, …]``: position p lies at p modulo rows."""
        return self._buffers["kept_features"].view(self._batch, self._kept_rows)

    def _places(self, start: IntArray, rows: int) -> tuple[IntArray, IntArray]:
        """Where ``rows`` positions from ``start`` on lie in ``_kept``."""
        positions = start[:, None] + np.arange(rows)
        return np.arange(start.shape[0])[:, None], positions % self._kept_rows

    # The passes. Each fills its inputs, runs, and leaves its outputs in the buffers.

    def _target(self, token_ids: IntArray, start: IntArray) -> None:
        if token_ids.shape[1] == 1 and self._pads_plain_steps:
            # The second row is for nothing. It lies behind the first in every buffer, since the batch is 1,
            # and in the caches where the next pass writes.
            token_ids = np.repeat(token_ids, 2, axis=1)
        batch, rows = token_ids.shape
        self._buffers["input_ids"].view(batch, rows)[:] = token_ids
        self._run(GraphRun("embed", rows, "embed"), batch)
        self._run_at(GraphRun("target", rows, "target"), start)

    def _head(self, hidden: npt.NDArray[Any]) -> IntArray:
        batch, rows = self._head_shape = hidden.shape[:2]
        self._buffers["head_hidden"].view(batch, rows)[:] = hidden
        self._run(GraphRun("lm_head", rows, "target_head", (("hidden", "head_hidden"),)), batch)
        check_finite(self._buffers["logits"].view(batch, rows), "target_head")
        token_ids: IntArray = self._buffers["token_ids"].view(batch, rows).copy()
        return token_ids

    def _draft(self, block: IntArray, start: IntArray, sampling: DraftSampling | None) -> IntArray:
        """Carry out the drafter's plan; a view of the drafted tokens."""
        batch, drafts = block.shape[0], block.shape[1] - 1
        rows = self._drafter.rows(drafts)
        self._buffers["draft_ids"].view(batch, rows)[:] = block[:, :rows]
        if self._drafter.samples:
            self._buffers["uniforms"].view(batch, drafts)[:] = 0 if sampling is None else sampling.uniforms
        given = {"anchors": block[:, 0], "temperature": 0 if sampling is None else sampling.temperature}
        for operation in self._draft_step(drafts):
            if isinstance(operation, GraphRun):
                for name, values in given.items():
                    if (operation.graph, name) in self._slots:
                        self._slots[operation.graph, name][:] = values
                self._run_at(operation, start)
            elif isinstance(operation, CopyRows):
                source = self._buffers[operation.source].view(batch, operation.source_rows)
                taken = source[:, operation.begin : operation.begin + operation.rows]
                self._buffers[operation.target].view(batch, operation.rows)[:] = taken
            else:
                check_finite(self._buffers[operation.buffer].view(batch, operation.rows), "draft_head")
        drafted: IntArray = self._buffers["drafted"].view(batch, drafts)
        return drafted

    def _run_at(self, run: GraphRun, start: IntArray) -> None:
        """Run a graph for positions from ``start [batch]`` on, if it has any."""
        if (run.graph, "start") in self._slots:
            for name in self._states_of[run.graph]:
                start = self._states[name].place(start, run.rows)
            self._slots[run.graph, "start"][:] = start
        self._run(run, start.shape[0])

    def _run(self, run: GraphRun, batch: int) -> None:
        binding = self._bindings.get((run, batch))
        if binding is None:
            binding = self._bindings[run, batch] = self._bind(run, batch)
        begin = time.perf_counter()
        run_bound(self._sessions[run.graph], run.graph, binding, f"{batch} x {run.rows} rows")
        seconds = time.perf_counter() - begin
        self._stage_seconds[run.stage] = self._stage_seconds.get(run.stage, 0.0) + seconds

    # Memory and bindings.

    def _make_buffers(self, rows: int) -> dict[str, HostBuffer]:
        def make(graph: str, tensor: str, max_rows: int) -> HostBuffer:
            return HostBuffer(self._graphs[graph].tensor(tensor), self._batch, max_rows)

        block = self._block_size
        buffers = {
            "input_ids": make("embed", "input_ids", rows),
            "embeddings": make("embed", "embeddings", rows),
            "hidden": make("target", "hidden", rows),
            "features": make("target", "features", rows),
            # Copied out of `features`, and back to be injected: a few rows, once a step.
            "kept_features": make("target", "features", rows),
            "draft_hidden": make("draft", "hidden", block),
            # Rows that want logits, gathered: never more than a block.
            "head_hidden": make("lm_head", "hidden", block),
            "logits": make("lm_head", "logits", block),
            "token_ids": make("lm_head", "token_ids", block),
        }
        for run in self._drafter.step(block - 1):
            if not isinstance(run, GraphRun):
                continue
            spec = self._graphs[run.graph]
            for tensor in (*spec.inputs, *spec.outputs):
                name = run.buffer(tensor.name)
                if name in buffers or "rows" not in tensor.shape:
                    continue
                shared = buffers.get(_SHARED.get(name, ""))
                if shared is None or not shared.fits(tensor):
                    shared = HostBuffer(tensor, self._batch, run.rows)
                buffers[name] = shared
        return buffers

    def _bind(self, run: GraphRun, batch: int) -> ort.IOBinding:
        """One binding per graph and shape, kept until the caches move."""
        spec, owners = self._graphs[run.graph], self._owners[run.graph]
        binding = self._sessions[run.graph].io_binding()
        inputs = {name: array for state in self._states.values() for name, array in state.inputs.items()}

        def memory(tensor: TensorSpec) -> npt.NDArray[Any]:
            name = spec.aliases.get(tensor.name, tensor.name)
            if name in owners:
                return self._states[owners[name]].arrays[name]
            if name in inputs:
                return inputs[name]
            if (run.graph, name) in self._slots:
                return self._slots[run.graph, name]
            return self._buffers[run.buffer(name)].view(batch, run.rows)

        def bind(tensors: tuple[TensorSpec, ...], attach: Callable[..., None]) -> None:
            for tensor in tensors:
                array = memory(tensor)
                attach(tensor.name, "cpu", 0, ONNX_TYPES[tensor.dtype], array.shape, array.ctypes.data)

        bind(spec.inputs, binding.bind_input)
        bind(spec.outputs, binding.bind_output)
        return binding

    def _grow(self, capacity: int) -> None:
        """Move the caches into buffers of ``capacity`` rows; new rows are zeros.

        All of them are allocated before any is moved, so that a lack of memory leaves everything as it was.
        """
        grown = {name: state.allocate(capacity) for name, state in self._states.items()}
        self._bindings.clear()
        self._capacity = 0  # until every cache is moved: an interruption here makes the next call grow again
        for name, caches in grown.items():
            self._states[name].move(caches)
        self._capacity = capacity
