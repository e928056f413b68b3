"""A backend whose steps never leave a device; what is behind it is a device and whoever runs graphs there.

The host launches a step and reads a few numbers of it from pinned memory. Where a step begins, its anchor and
its counts are on the device, so the next step can be launched before the last one is read. A step that was
launched in vain does no harm: like a rejected draft, it wrote behind the last committed row only.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.backends.base import Backend, Inject, StepOutput
from dflash_rt.backends.device.budget import Budget
from dflash_rt.backends.device.memory import Memory, Readback
from dflash_rt.backends.device.planner import Planner
from dflash_rt.backends.device.protocols import Bytes, Device, Engines, Event
from dflash_rt.backends.device.runner import Runner
from dflash_rt.drafters.base import PROPOSAL
from dflash_rt.errors import BackendError, NumericalError
from dflash_rt.sampling.proposal import DraftSampling, Proposal

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["DeviceBackend", "DeviceOptions"]

_LOG = logging.getLogger("dflash_rt.backends.device")
_DEPTH = 2  # steps that are launched and not read, at most


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options of every backend on a device.

    Attributes:
        cuda_graph: launch a step as one captured graph; otherwise operation by operation. Same tokens.
        run_ahead: let the loop launch a greedy request's next step before it has read the last. Same tokens.
        memory_limit: bytes of the device's memory to use at most, even if less is free; ``None``: what is
            free.
        max_seq_len: prompt and output tokens together at most; ``None``: what bundle and engines allow. It
            chooses among engine sets. Caches are allocated for it, unless engines fix their size.
        fused: run the bundle's fused target; for ONNX Runtime only. Its rounding is another one.
    """

    cuda_graph: bool = True
    run_ahead: bool = True
    memory_limit: int | None = None
    max_seq_len: int | None = None
    fused: bool = False


@dataclass(frozen=True)
class _Launched:
    """A pass that wasn't read yet: its rows, the staging buffer for its readback, and when that is there."""

    verify_len: int
    staging: Bytes
    done: Event


class DeviceBackend(Backend):
    """See :class:`dflash_rt.backends.base.Backend` for the protocol.

    ``device`` and ``engines`` are the backend's from now on, and closed with it.

    Raises:
        BackendError: something can't be loaded, or doesn't fit into the device's memory.
    """

    max_seq_len: int

    def __init__(
        self, bundle: Bundle, device: Device, engines: Engines, *, name: str, options: DeviceOptions
    ) -> None:
        self.name = name
        self.runs_ahead = options.run_ahead
        self._device, self._engines = device, engines
        try:
            self._set_up(bundle, options)
        except BaseException:
            self.close()
            raise

    def _set_up(self, bundle: Bundle, options: DeviceOptions) -> None:
        manifest, device, engines = bundle.manifest, self._device, self._engines
        self.max_seq_len = _shortest(options.max_seq_len, engines.max_seq_len, manifest.limits.max_seq_len)
        # Rejected rows of the last block may lie behind the last row that a request can commit.
        needed = self.max_seq_len + manifest.drafter.block_size
        self._planner = planner = Planner(
            manifest,
            capacity=needed if engines.capacity is None else engines.capacity,
            prefill_chunk=min(manifest.limits.prefill_chunk, self.max_seq_len),
        )
        self._mask_token_id = manifest.drafter.mask_token_id
        self._vocab_size = manifest.target.vocab_size
        self._samples = planner.drafter.samples
        scratch = self._load(options.memory_limit)
        self._memory = memory = Memory(device, planner.layout)
        scratch_address = device.allocate(scratch) if scratch else 0
        self._runner = Runner(device, engines, memory, planner, scratch_address, graphs=options.cuda_graph)
        self._staging = deque(memory.new_readback() for _ in range(_DEPTH))
        self._logits = memory.new_staging("logits")
        self._proposals = {each: memory.new_staging(each) for each in PROPOSAL if self._samples}
        self._launched: deque[_Launched] = deque()
        self._seconds = 0.0
        self._logit_rows = 0
        self._sampling_is_greedy = True
        self._furthest = 0  # where the device's next step may begin at most
        self._injects = False
        self._write_constants()

    def _load(self, limit: int | None) -> int:
        """Tell what memory is wanted, see whether it is there, and load the engines; bytes of scratch."""
        device, engines = self._device, self._engines
        budget = Budget.of(self._planner.layout, weights=engines.weight_bytes)
        _LOG.info("%s on %s needs %s, and what kernels want", self.name, device.name, budget)
        budget.check(free=device.free_bytes(), limit=limit)
        scratch = engines.load(device)
        self.budget = budget = replace(budget, scratch=scratch)
        _LOG.info("%s on %s: %s", self.name, device.name, budget)
        if limit is None:
            budget = replace(budget, weights=0)  # they are there by now
        budget.check(free=device.free_bytes(), limit=limit)
        return scratch

    # --- Properties ---

    @property
    def run_seconds(self) -> dict[str, float]:
        """Seconds in which the host launched and waited; one stage."""
        return {"step": self._seconds}

    @property
    def capacity(self) -> int:
        """Rows of each cache."""
        return self._planner.capacity

    def reserve(self, rows: int) -> None:
        """Nothing to make: the caches have their full size. Raises BackendError for more than that."""
        if rows > self.max_seq_len:
            raise BackendError(
                "a sequence outgrew the caches",
                found=f"{rows} rows",
                expected=f"at most {self.max_seq_len}",
                remedy="shorten the prompt or max_new_tokens, or build with a larger --max-seq-len",
            )

    def warm_up(self, verify_lens: Iterable[int]) -> None:
        """Make what prefills and such steps run, capture their graphs and compare them; see the protocol."""
        for rows in self._planner.prefill_rows:
            self._prefill_anything(rows)
        for verify_len in verify_lens:
            self._warm_up_steps(verify_len)
        self.clear()

    def _warm_up_steps(self, verify_len: int) -> None:
        self._furthest = self.max_seq_len  # no room: begin anew
        while not self._runner.is_warm(verify_len, inject=True):
            if self._furthest < self.max_seq_len:
                self.launch(verify_len)
            else:
                self._prefill_anything(1)
                self.launch(verify_len, np.zeros(1, np.int64), np.ones(1, np.int64))
            self.collect()

    def _prefill_anything(self, rows: int) -> None:
        self.prefill(self._anything(rows), np.zeros(1, np.int64), inject=True)

    def _anything(self, rows: int) -> IntArray:
        return (1 + np.arange(rows, dtype=np.int64)[None]) % self._vocab_size

    # --- Passes ---

    def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
        self._forget()
        at = int(start.max())
        self._check_room(at + token_ids.shape[1])
        with self._timed():
            done = 0
            for rows, used in self._planner.pieces(token_ids.shape[1], self.capacity - at):
                ids = np.pad(token_ids[:, done : done + used], ((0, 0), (0, rows - used)), mode="edge")
                self._memory.write("input_ids", ids)
                for name in ("start", "inject_start"):  # what the next step injects was injected: no harm
                    self._memory.write(name, start + done)
                self._runner.prefill(rows, used, inject=inject)
                done += used
            launched = self._read_later(0)
            readback = self._wait(launched)
        self._injects = inject
        self._check_finite(readback, drafted=False)
        self._logit_rows = 1
        return readback.rows("token_ids", 1)[:, 0]

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        """Run a whole step; see the protocol.

        What ``inject`` asks for is a part of what is done anyway: each step injects the rows of the pass
        before it, unless nothing is drafted in this sequence.
        """
        self._forget()
        self._launch(verify_len, anchors, start, sampling)
        output = self.collect()
        if sampling is None or not self._samples or verify_len == 1:
            return output
        return StepOutput(output.drafted, output.verified, self._proposal(verify_len - 1))

    def launch(self, verify_len: int, anchors: IntArray | None = None, start: IntArray | None = None) -> None:
        if len(self._launched) >= _DEPTH:
            raise BackendError(
                "too many steps were launched",
                found=f"{len(self._launched)} that weren't read",
                expected=f"at most {_DEPTH}",
                remedy="collect one first",
            )
        if anchors is not None:
            self._forget()
        self._launch(verify_len, anchors, start, None)

    def _launch(
        self,
        verify_len: int,
        anchors: IntArray | None,
        start: IntArray | None,
        sampling: DraftSampling | None,
    ) -> None:
        with self._timed():
            if self._samples:
                self._set_sampling(sampling, verify_len)
            if anchors is not None and start is not None:
                self._memory.write("anchors", anchors)
                self._memory.write("start", start)
                self._furthest = int(start.max())
            self._check_room(self._furthest)
            self._runner.step(verify_len, inject=self._injects or verify_len > 1)
            self._launched.append(self._read_later(verify_len))
            self._furthest += verify_len

    def collect(self) -> StepOutput:
        with self._timed():
            launched = self._launched.popleft()
            readback, verify_len = self._wait(launched), launched.verify_len
        self._check_finite(readback, drafted=verify_len > 1)
        start = readback.values["start"]
        self._furthest = int(start.max()) + sum(step.verify_len for step in self._launched)
        self._logit_rows = 0 if self._launched else verify_len
        return StepOutput(readback.rows("block", verify_len)[:, 1:], readback.rows("token_ids", verify_len))

    def logits(self) -> FloatArray:
        rows = self._logit_rows
        if not rows:
            raise BackendError(
                "there are no logits to read",
                found="a step that was launched after the last one that was read",
                expected="a step, a prefill, or a collected step with none after it",
                remedy="use step() where logits are wanted",
            )
        self._memory.read("logits", self._logits)
        self._device.wait(self._device.record_event())
        batch, _, vocab = self._memory.layout.buffers["logits"].shape
        logits: FloatArray = self._memory.as_array("logits", self._logits, (batch, rows, vocab)).copy()
        return logits

    def clear(self) -> None:
        """Wait for what runs, and zero all memory."""
        self._device.wait(self._device.record_event())
        self._reset()
        self._memory.zero_all()
        self._write_constants()

    def close(self) -> None:
        self._device.drain()
        runner: Runner | None = getattr(self, "_runner", None)  # none if loading failed
        if runner is not None:
            runner.close()  # what runs an engine goes before the engine
        self._engines.close()
        self._device.close()

    # --- What the host knows ---

    def _reset(self) -> None:
        """Nothing runs, and nothing is known of where the device stands."""
        for step in self._launched:
            self._staging.append(step.staging)
        self._launched.clear()
        self._furthest = self._logit_rows = 0
        self._injects = False

    def _write_constants(self) -> None:
        for name, buffer in self._memory.layout.buffers.items():
            if name.startswith("draft_ids."):
                self._memory.write(name, np.full(buffer.shape, self._mask_token_id, np.int64))

    def _check_room(self, end: int) -> None:
        """There must be room for a block behind ``end``. A write behind a cache would hit other memory."""
        if end + self._planner.block_size > self.capacity:
            raise BackendError(
                "a pass would write behind the caches",
                found=f"a block of {self._planner.block_size} rows from {end} on",
                expected=f"an end of at most {self.capacity}",
                remedy="shorten the prompt or max_new_tokens, or build with a larger --max-seq-len",
            )

    def _forget(self) -> None:
        """Wait for steps that nobody will read. If one of them failed, what it wrote must go.

        Otherwise it lies where they began, and is overwritten.
        """
        failed = False
        while self._launched:
            step = self._launched.popleft()
            failed |= bool(self._wait(step).bad_slots(drafted=step.verify_len > 1))
        if failed:
            self.clear()

    def _set_sampling(self, sampling: DraftSampling | None, verify_len: int) -> None:
        if verify_len == 1:
            return  # nothing is drafted
        if sampling is not None:
            self._memory.write("temperature", sampling.temperature)
            self._memory.write("uniforms", sampling.uniforms[:, : verify_len - 1])
        elif not self._sampling_is_greedy:
            self._memory.write(
                "temperature", np.zeros(self._memory.layout.buffers["temperature"].shape[0], np.float32)
            )
        self._sampling_is_greedy = sampling is None

    def _proposal(self, drafts: int) -> Proposal:
        arrays = []
        for name, staging in self._proposals.items():
            self._memory.read(name, staging)
            self._device.wait(self._device.record_event())
            batch, _, count = self._memory.layout.buffers[name].shape
            arrays.append(self._memory.as_array(name, staging, (batch, drafts, count)).copy())
        return Proposal(*arrays)

    def _read_later(self, verify_len: int) -> _Launched:
        staging = self._staging.popleft()
        self._memory.read_back(staging)
        return _Launched(verify_len, staging, self._device.record_event())

    def _wait(self, launched: _Launched) -> Readback:
        self._device.wait(launched.done)
        self._staging.append(launched.staging)
        return self._memory.readback(launched.staging)

    def _check_finite(self, readback: Readback, *, drafted: bool) -> None:
        bad = readback.bad_slots(drafted=drafted)
        if bad:
            raise NumericalError(
                "a step gave logits that are not finite",
                found="; ".join(f"values of {stage} are NaN or infinite" for stage in bad),
                expected="finite logits",
                remedy="check the bundle with `dflash-export inspect`; in fp16, build with bf16 or fp32",
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began


def _shortest(wanted: int | None, *limits: int) -> int:
    longest = min(limits)
    if wanted is None:
        return longest
    if type(wanted) is not int or not 1 <= wanted <= longest:
        raise BackendError(
            "max_seq_len is out of range",
            found=wanted,
            expected=f"1 to {longest}, the limit of the bundle or its engines",
            remedy="mend the option, or build with a larger --max-seq-len",
        )
    return wanted
