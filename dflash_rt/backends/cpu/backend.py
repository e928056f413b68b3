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
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.backends.base import Backend, Inject, StepOutput
from dflash_rt.backends.host_arrays import STORAGE, HostBuffer, zeros
from dflash_rt.backends.state.window import Window
from dflash_rt.bundle.graph_names import STEP_GRAPHS, output_name
from dflash_rt.bundle.manifest import GraphSpec, TensorSpec
from dflash_rt.errors import BackendError, NumericalError
from dflash_rt.sampling.proposal import DraftSampling, Proposal

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["OnnxRuntimeBackend"]

_BUCKET = 128  # rows that a cache grows by, at least


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
        if fused and bundle.fused_path("target") is None:
            raise BackendError(
                "the bundle has no fused target",
                found=f"{manifest.target.model_type} in {manifest.precision}",
                expected="an fp32 target of a form that can be fused (docs/reference/bundle.md)",
                remedy="leave fused out: it is used wherever it is there",
            )
        # What kept step costs are told apart by.
        self.name = "onnxruntime" + ("-fast-plain" if fast_plain else "")
        if manifest.quantization is not None and not integer_activations:
            self.name += "-float-activations"
        if fused is False:
            self.name += "-unfused"
        self._pads_plain_steps = rounds and not fast_plain
        self._block_size = manifest.drafter.block_size
        self._mask_token_id = manifest.drafter.mask_token_id
        self._vocab_size = manifest.target.vocab_size
        # Rows of a draft pass that draft nothing: the anchor's, unless it drafts too.
        self._silent_rows = 0 if manifest.drafter.samples_from_anchor else 1
        # Rejected rows of the last block may lie behind the last row that a request can commit.
        self._limit = manifest.limits.max_seq_len + self._block_size
        self._graphs: dict[str, GraphSpec] = {
            name: graph for name, graph in manifest.graphs.items() if name not in STEP_GRAPHS
        }
        self._sessions = {
            name: _load(name, _path(bundle, name, fused), threads, integer_activations)
            for name in self._graphs
        }
        self._batch = 1
        # A prompt isn't longer than max_seq_len, whatever a chunk may be, nor is what waits to be injected.
        chunk = min(manifest.limits.prefill_chunk, manifest.limits.max_seq_len)
        self._kept_rows = max(chunk, self._block_size)
        self._window_size = manifest.drafter.sliding_window if manifest.drafter.is_windowed else None
        self._allocate()

    def share_weights(self) -> OnnxRuntimeBackend:
        """Another backend on the same sessions; see the protocol."""
        other = copy.copy(self)
        other._sessions = dict(self._sessions)
        other._allocate()
        return other

    def _allocate(self) -> None:
        """Everything that changes while requests run."""
        self._stage_seconds: dict[str, float] = {}
        self._head_shape = (self._batch, 0)  # batch and rows of what lies in the buffer `logits`
        self._buffers = self._make_buffers(self._kept_rows)
        self._starts = {stage: np.zeros(self._batch, np.int64) for stage in ("inject", "draft", "target")}
        self._window: Window | None = None
        if self._window_size is not None:
            self._window = Window(self._window_size, self._kept_rows, self._block_size, self._batch)
        # One value for each slot; only `select` reads them.
        self._slots: dict[str, npt.NDArray[Any]] = {
            "anchors": np.zeros(self._batch, np.int64),
            "temperature": np.zeros(self._batch, np.float32),
        }
        self._capacity = 0
        self._caches: dict[str, dict[str, npt.NDArray[Any]]] = {"target": {}, "draft": {}}
        self._bindings: dict[tuple[str, int, int], ort.IOBinding] = {}
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
        return sum(array.nbytes for caches in self._caches.values() for array in caches.values())

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
        """Feed prompt rows; see the protocol."""
        batch, rows = token_ids.shape
        self._target(token_ids, start)
        if inject:
            self._inject(start, batch, rows)
        hidden = self._buffers["hidden"].view(batch, rows)
        return self._head(hidden[:, -1:], "target_head")[:, 0]

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        """Run inject, draft and verify; see the protocol."""
        batch = anchors.shape[0]
        block = np.full((batch, verify_len), self._mask_token_id, np.int64)
        block[:, 0] = anchors
        if inject is not None:
            places = self._places(inject.start, inject.rows)
            self._buffers["features"].view(batch, inject.rows)[:] = self._kept[places]
            self._inject(inject.start, batch, inject.rows)
        if verify_len > 1:
            block[:, 1:] = self._draft(block, start, sampling)
        proposal = self._proposal(batch, verify_len - 1) if verify_len > 1 and sampling is not None else None
        self._target(block, start)
        self._kept[self._places(start, verify_len)] = self._buffers["features"].view(batch, verify_len)
        verified = self._head(self._buffers["hidden"].view(batch, verify_len), "target_head")
        return StepOutput(drafted=block[:, 1:], verified=verified, proposal=proposal)

    def logits(self) -> FloatArray:
        """A view; see the protocol. The target's head always runs last."""
        return self._buffers["logits"].view(*self._head_shape)

    def clear(self) -> None:
        """Zero caches and buffers."""
        for caches in self._caches.values():
            for array in caches.values():
                array.fill(0)
        if self._window is not None:
            self._window.clear()
        # Features of a failed step must not be injected by the next sequence either.
        for buffer in self._buffers.values():
            buffer.clear()

    def close(self) -> None:
        """Free sessions and memory."""
        self._bindings.clear()
        self._sessions.clear()
        self._caches = {"target": {}, "draft": {}}
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

    # One method per graph. Each fills its inputs, runs, and leaves its outputs in the buffers.

    def _target(self, token_ids: IntArray, start: IntArray) -> None:
        if token_ids.shape[1] == 1 and self._pads_plain_steps:
            # The second row is for nothing. It lies behind the first in every buffer, since the batch is 1,
            # and in the caches where the next pass writes.
            token_ids = np.repeat(token_ids, 2, axis=1)
        batch, rows = token_ids.shape
        self._embed(token_ids)
        self._starts["target"][:] = start
        self._run("target", "target", batch, rows)

    def _inject(self, start: IntArray, batch: int, rows: int) -> None:
        self._starts["inject"][:] = self._draft_rows(start, rows)
        self._run("inject", "inject", batch, rows)

    def _draft(self, block: IntArray, start: IntArray, sampling: DraftSampling | None) -> IntArray:
        batch, rows = block.shape[0], block.shape[1] - 1 + self._silent_rows
        self._embed(block[:, :rows], "draft_embed" if "draft_embed" in self._graphs else "embed")
        self._starts["draft"][:] = self._draft_rows(start, rows)
        self._run("draft", "draft", batch, rows)
        hidden = self._buffers["draft_hidden"].view(batch, rows)[:, self._silent_rows :]
        if "draft_lm_head" in self._graphs:
            return self._own_head(hidden)
        best = self._head(hidden, "draft_head")
        return self._select(block[:, 0], sampling) if "select" in self._graphs else best

    def _draft_rows(self, start: IntArray, rows: int) -> IntArray:
        """Where ``rows`` from position ``start`` on lie in the drafter's caches."""
        if self._window is None:
            return start
        return self._window.place(start, rows, self._caches["draft"].values())

    def _embed(self, token_ids: IntArray, graph: str = "embed") -> None:
        batch, rows = token_ids.shape
        self._buffers["input_ids"].view(batch, rows)[:] = token_ids
        self._run(graph, "embed", batch, rows)

    def _head(self, hidden: npt.NDArray[Any], stage: str) -> IntArray:
        batch, rows = self._head_shape = hidden.shape[:2]
        self._buffers["head_hidden"].view(batch, rows)[:] = hidden
        self._run("lm_head", stage, batch, rows)
        if stage == "draft_head" and "draft_logits" in self._graphs:
            self._run("draft_logits", stage, batch, rows)
        self._check_finite(self._buffers["logits"].view(batch, rows), stage)
        token_ids: IntArray = self._buffers["token_ids"].view(batch, rows).copy()
        return token_ids

    def _own_head(self, hidden: npt.NDArray[Any]) -> IntArray:
        """The head of a drafter that has a vocabulary of its own; the tokens are the target's."""
        batch, rows = hidden.shape[:2]
        self._buffers["head_hidden"].view(batch, rows)[:] = hidden
        self._run("draft_lm_head", "draft_head", batch, rows)
        self._check_finite(self._buffers["own_logits"].view(batch, rows), "draft_head")
        token_ids: IntArray = self._buffers["token_ids"].view(batch, rows).copy()
        return token_ids

    def _select(self, anchors: IntArray, sampling: DraftSampling | None) -> IntArray:
        """Walk through the best candidates of the rows whose logits were just computed."""
        batch, rows = self._head_shape
        self._slots["anchors"][:] = anchors
        self._slots["temperature"][:] = 0 if sampling is None else sampling.temperature
        self._buffers["uniforms"].view(batch, rows)[:] = 0 if sampling is None else sampling.uniforms
        self._run("select", "draft_head", batch, rows)
        token_ids: IntArray = self._buffers["token_ids"].view(batch, rows).copy()
        return token_ids

    def _proposal(self, batch: int, rows: int) -> Proposal | None:
        if "select" not in self._graphs:
            return None
        views = (self._buffers[name].view(batch, rows).copy() for name in ("candidates", "probabilities"))
        return Proposal(*views)

    def _check_finite(self, logits: npt.NDArray[Any], stage: str) -> None:
        # A sum is finite only if every term is; it costs a tenth of looking at each term. A finite
        # row may still overflow it, so that what looks wrong is looked at again.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(logits.sum()):
                return
        bad = ~np.isfinite(logits)
        if bad.any():
            raise NumericalError(
                "a step gave logits that are not finite",
                found=f"{int(bad.sum())} of {bad.size} values of {stage} are NaN or infinite",
                expected="finite logits",
                remedy="check the bundle with `dflash-export inspect`; in fp16, build with bf16 or fp32",
            )

    def _run(self, graph: str, stage: str, batch: int, rows: int) -> None:
        binding = self._bindings.get((graph, batch, rows))
        if binding is None:
            binding = self._bindings[graph, batch, rows] = self._bind(graph, batch, rows)
        session = self._sessions[graph]
        begin = time.perf_counter()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own classes share no public base
            raise BackendError(
                f"ONNX Runtime failed in graph {graph}",
                found=str(error),
                expected=f"a run of {batch} x {rows} rows",
                remedy="check the bundle with `dflash-export inspect`; if it is whole, report this",
            ) from error
        self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + time.perf_counter() - begin

    # Memory and bindings.

    def _make_buffers(self, rows: int) -> dict[str, HostBuffer]:
        def make(graph: str, tensor: str, max_rows: int) -> HostBuffer:
            spec = self._graphs[graph]
            (found,) = (t for t in (*spec.inputs, *spec.outputs) if t.name == tensor)
            return HostBuffer(found, self._batch, max_rows)

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
        if "draft_lm_head" in self._graphs:
            buffers["own_logits"] = make("draft_lm_head", "logits", block)
        if "select" in self._graphs:
            buffers |= {
                name: make("select", name, block) for name in ("uniforms", "candidates", "probabilities")
            }
        return buffers

    def _bind(self, graph: str, batch: int, rows: int) -> ort.IOBinding:
        """One binding per graph and shape, kept until the caches move."""
        spec = self._graphs[graph]
        binding = self._sessions[graph].io_binding()
        caches = self._caches["target" if graph == "target" else "draft"]

        def memory(tensor: TensorSpec, is_output: bool) -> npt.NDArray[Any]:
            name = tensor.name
            if name == "start":
                return self._starts[graph]
            if name == "offset":
                assert self._window is not None
                return self._window.offset
            if name in self._slots:
                return self._slots[name]
            cache = caches.get(spec.aliases.get(name, name) if is_output else name)
            if cache is not None and graph in ("target", "inject", "draft"):
                return cache
            if name == "hidden" and graph in ("lm_head", "draft_lm_head", "select"):
                name = "head_hidden"
            elif name == "logits" and graph == "draft_lm_head":
                name = "own_logits"
            elif name == "hidden" and graph == "draft":
                name = "draft_hidden"
            elif name == output_name("logits"):
                name = "logits"  # multiplier and softcap work in place
            return self._buffers[name].view(batch, rows)

        def bind(tensors: tuple[TensorSpec, ...], attach: Callable[..., None], is_output: bool) -> None:
            for tensor in tensors:
                array = memory(tensor, is_output)
                onnx_type = STORAGE[tensor.dtype][1]
                attach(tensor.name, "cpu", 0, onnx_type, array.shape, array.ctypes.data)

        bind(spec.inputs, binding.bind_input, False)
        bind(spec.outputs, binding.bind_output, True)
        return binding

    def _grow(self, capacity: int) -> None:
        """Move the caches into buffers of ``capacity`` rows; new rows are zeros.

        All of them are allocated before any is moved, so that a lack of memory leaves everything as it was.
        """
        draft_capacity = capacity if self._window is None else min(capacity, self._window.rows)
        grown = {
            graph: {
                tensor.name: _new_cache(tensor, self._batch, rows)
                for tensor in self._graphs[graph].inputs
                if "capacity" in tensor.shape
            }
            for graph, rows in (("target", capacity), ("draft", draft_capacity))
        }
        self._bindings.clear()
        self._capacity = 0  # until every cache is moved: an interruption here makes the next call grow again
        for graph, caches in grown.items():
            for name, cache in caches.items():
                old = self._caches[graph].pop(name, None)  # freed before the next one is copied
                if old is not None:
                    rows = min(old.shape[2], cache.shape[2])
                    cache[:, :, :rows] = old[:, :, :rows]
                self._caches[graph][name] = cache
        self._capacity = capacity


def _new_cache(tensor: TensorSpec, batch: int, rows: int) -> npt.NDArray[Any]:
    sizes = {"batch": batch, "capacity": rows}
    shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
    return zeros(shape, tensor.dtype, f"a cache of {rows} rows")


def _path(bundle: Bundle, graph: str, fused: bool | None) -> str:
    found = None if fused is False else bundle.fused_path(graph)
    return str(found or bundle.graph_path(graph))


def _load(graph: str, path: str, threads: int | None, integer_activations: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # A lookup needs no pool of threads.
    options.intra_op_num_threads = 1 if graph in ("embed", "draft_embed") else (threads or 0)
    options.inter_op_num_threads = 1
    # Without this the idle threads of one session spin for milliseconds into the run of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if integer_activations:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")  # int8
    else:
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # constants are folded
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes share no public base
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't load graph {graph}",
            found=str(error),
            expected="a graph of opset 24 whose operators have CPU kernels of its precision",
            remedy="use onnxruntime 1.32 or newer; on a CPU, build the bundle with --precision fp32",
        ) from error
