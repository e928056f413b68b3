"""Carries plans out: operation by operation, or as one captured graph that was compared with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from dflash_rt.backends.device.memory import Memory, Readback
from dflash_rt.backends.device.plan import Copy, Operation, Run
from dflash_rt.backends.device.planner import STATE, Planner
from dflash_rt.backends.device.protocols import Captured, Device, Engines, Work
from dflash_rt.bundle.dtypes import as_float32
from dflash_rt.errors import BackendError

__all__ = ["Runner"]

# Steps at which a new graph is compared. At the first one the drafter's cache holds what an earlier step
# put there, at the second `start` has moved on: a graph that keeps an old value shows. But an anchor that
# isn't moved on shows only where the next one is another token, and drafts that aren't written only where
# they aren't the zeros that were put there: such steps are waited for, within reason.
_COMPARED, _MOST_COMPARED = 2, 8
# Besides the readback: what no token may show. The buffer, and the one that has the size of a block of it.
_SEEN = {"features": "saved.features", "draft_hidden": "draft_hidden"}
_ROUNDING = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.02}  # of the largest value


@dataclass
class _Step:
    """One kind of step. ``warm``: it has run operation by operation, so that nothing is set up any more.

    ``compared``: how often its graph was; ``anchor_moved``, ``drafts_show``: whether one of these steps went
    to another anchor, and whether one had drafts other than token 0.
    """

    operations: tuple[Operation, ...]
    captured: Captured | None = None
    warm: bool = False
    compared: int = 0
    anchor_moved: bool = False
    drafts_show: bool = False
    scratch: tuple[str, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether the graph may run alone."""
        tells = self.anchor_moved and self.drafts_show
        return self.compared >= (_COMPARED if tells else _MOST_COMPARED)


class Runner:
    """Enqueues passes on a device.

    A captured graph repeats what was captured, right or wrong, and a wrong one looks well: drafts that are
    not drafted again equal what was verified before, so that everything is accepted. So a graph is compared
    with its operations at its first steps, on the sequence that is being decoded, each from the same state,
    with everything that the step computes zeroed before.
    """

    def __init__(
        self,
        device: Device,
        engines: Engines,
        memory: Memory,
        planner: Planner,
        scratch: int,
        *,
        graphs: bool,
    ) -> None:
        self._device = device
        self._engines = engines
        self._memory = memory
        self._planner = planner
        self._scratch = scratch
        self._graphs = graphs
        self._prepared: dict[Run, Work] = {}
        self._steps: dict[tuple[int, bool], _Step] = {}
        self._readbacks = [memory.new_readback() for _ in range(2)]
        self._seen = [{name: memory.new_staging(name) for name in _SEEN.values()} for _ in range(2)]

    def prefill(self, rows: int, used: int, *, inject: bool) -> None:
        """Enqueue a prefill pass of ``rows`` rows, of which the first ``used`` are the prompt's."""
        self._enqueue(self._planner.prefill(rows, used, inject=inject))

    def step(self, verify_len: int, *, inject: bool) -> None:
        """Enqueue a step: one launch, once its graph was captured and compared."""
        key = verify_len, inject
        step = self._steps.get(key)
        if step is None:
            operations = self._planner.step(verify_len, inject=inject)
            step = self._steps[key] = _Step(operations, scratch=self._computed(operations))
        if not self._graphs or not step.warm:
            step.warm = True
            self._enqueue(step.operations)
            return
        if step.captured is None:
            self._engines.require_capturable()
            operations = step.operations
            step.captured = self._device.capture(lambda: self._enqueue(operations))
        if step.trusted:
            step.captured.launch()
        else:
            self._compare(step, step.captured, verify_len)

    def is_warm(self, verify_len: int, *, inject: bool) -> bool:
        """Whether such a step has nothing left to do that is done only once."""
        step = self._steps.get((verify_len, inject))
        return step is not None and (step.trusted if self._graphs else step.warm)

    def close(self) -> None:
        """Let go of everything that was prepared and captured. Nothing may run any more."""
        self._prepared.clear()
        self._steps.clear()

    def _enqueue(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Copy):
                self._memory.copy(operation)
            else:
                self._device.call(self._work(operation))

    def _work(self, run: Run) -> Work:
        work = self._prepared.get(run)
        if work is None:
            work = self._prepared[run] = self._engines.prepare(run, self._memory.address, self._scratch)
        return work

    # --- Is the graph the step? ---

    def _compare(self, step: _Step, captured: Captured, verify_len: int) -> None:
        """Launch the graph, then do the step again by its operations, whose results stay. Waits for both."""
        self._save("saved.{}", "{}")
        by_graph = self._observe(0, step, captured.launch)
        self._save("{}", "saved.{}")
        by_operations = self._observe(1, step, lambda: self._enqueue(step.operations))
        differing = [
            name
            for name, values in by_operations.values.items()
            if not np.array_equal(values, by_graph.values[name])
        ]
        rows = {
            "features": verify_len,
            "draft_hidden": self._planner.drafter.rows(verify_len - 1) if verify_len > 1 else 0,
        }
        differing += [name for name, count in rows.items() if count and not self._same(name, count)]
        if differing:
            raise BackendError(
                f"the captured graph of a step of {verify_len} rows isn't that step",
                found="it left other values in " + ", ".join(differing),
                expected="those of the same operations one by one, from the same state",
                remedy="run without graphs (cuda_graph=False), and report this; kernels whose results vary "
                "from run to run look the same where two tokens are nearly as likely",
            )
        step.compared += 1
        block = by_operations.rows("block", verify_len)
        step.anchor_moved |= not np.array_equal(block[:, 0], by_operations.values["anchors"])
        step.drafts_show |= verify_len == 1 or bool(block[:, 1:].any())

    def _save(self, target: str, source: str) -> None:
        """Copy what a step starts from, or put it back."""
        for name in (*STATE, "features"):
            size = self._memory.layout.buffers[f"saved.{name}"].nbytes
            self._memory.copy(
                Copy(source.format(name), 0, size, target.format(name), 0, size, size, height=1)
            )

    def _observe(self, slot: int, step: _Step, launch: Work) -> Readback:
        for name in step.scratch:
            self._memory.zero(name)
        for operation in step.operations:
            if isinstance(operation, Copy) and self._is_constant(operation.target):
                # Of these only the anchor's column is written, the others stay.
                self._memory.copy(replace(operation, source="offset", source_at=0))
        launch()
        self._memory.read_back(self._readbacks[slot])
        for name, buffer in _SEEN.items():
            self._memory.read(name, self._seen[slot][buffer])
        self._device.wait(self._device.record_event())
        return self._memory.readback(self._readbacks[slot])

    def _computed(self, operations: Iterable[Operation]) -> tuple[str, ...]:
        """Buffers that a step writes before it reads them: a graph must not take them from an earlier one."""
        names: dict[str, None] = {}
        for operation in operations:
            if isinstance(operation, Run):
                names |= dict.fromkeys(item.buffer for item in operation.outputs)
            elif not self._is_constant(operation.target):
                names[operation.target] = None
        kept, buffers = {*STATE, "features"}, self._memory.layout.buffers
        return tuple(name for name in names if name not in kept and buffers[name].kind != "cache")

    def _is_constant(self, name: str) -> bool:
        return self._memory.layout.buffers[name].kind == "constant"

    def _same(self, name: str, rows: int) -> bool:
        """Up to what kernels may round differently from run to run."""
        spec = self._memory.layout.buffers[_SEEN[name]]
        shape = (spec.shape[0], rows, *spec.shape[2:])
        first, second = (
            as_float32(self._memory.as_array(name, staging[_SEEN[name]], shape)) for staging in self._seen
        )
        error = float(np.abs(first - second).max())
        return error <= _ROUNDING[spec.dtype] * float(np.abs(second).max())  # also False for NaN
