"""What is run, in which order: the most telling parts first, so that a run that is cut off keeps them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dflash_bench.budget import Budget
from dflash_bench.gpu.backend_spec import BackendSpec
from dflash_bench.gpu.bundles import Made, compile_for, make_bundle
from dflash_bench.gpu.goals import GOAL_CONTEXT, GOAL_PAIR, GOAL_PRECISION, judge_goals
from dflash_bench.gpu.measure import Measured, measure_row, seconds_to_measure
from dflash_bench.gpu.parity import run_parity
from dflash_bench.gpu.parts import Parts
from dflash_bench.gpu.plan import Plan, rows_needed
from dflash_bench.gpu.report import FORMAT, write_report
from dflash_bench.gpu.shapes import PairShape
from dflash_bench.gpu.torch_device import copy_bandwidth, release_memory
from dflash_bench.machine import environment
from dflash_rt.errors import DFlashError
from dflash_rt.files import utc_now

__all__ = ["run_suite"]

_PROMPT_SEED = 0


def run_suite(plan: Plan, budget: Budget) -> dict[str, Any]:
    """Run all parts and return the report, which is also at ``plan.output`` the whole time."""
    return _Suite(plan, budget).run()


class _Suite:
    def __init__(self, plan: Plan, budget: Budget) -> None:
        self._plan = plan
        self._budget = budget
        self._parts = Parts(budget, self._write)
        self._report: dict[str, Any] = {
            "format": FORMAT,
            "format_version": 1,
            "created": utc_now(),
            "state": "running",
            "dry_run": plan.dry_run,
            "minutes": plan.minutes,
            "environment": None,
            "bytes_per_second": None,
            "backends": [],
            "parity": [],
            "rows": [],
            "goals": [],
            "goals_of": f"{GOAL_PAIR}, {GOAL_PRECISION}, context {GOAL_CONTEXT}, batch 1",
            "parts": [],
        }

    def run(self) -> dict[str, Any]:
        """Everything, in order."""
        plan, parts = self._plan, self._parts
        if not plan.keep:
            shutil.rmtree(plan.scratch, ignore_errors=True)
        parts.run("environment", 0, self._environment)
        parts.run("copy bandwidth", 1, self._bandwidth)
        small = {
            precision: parts.run(f"a small pair in {precision}", 5, self._small(precision))
            for precision in (("fp32",) if plan.dry_run else ("fp32", "bf16"))
        }
        usable = self._check_parity(small, self._try_backends(small))
        if plan.demo is not None:
            self._measure_demo(plan.demo, usable)
        for precision in plan.precisions:
            for pair in plan.pairs:
                self._measure_pair(pair, precision, usable.get(_base(precision), []))
        if not plan.keep:
            shutil.rmtree(plan.scratch, ignore_errors=True)
        self._report["state"] = "finished"
        self._write()
        return self._report

    def _write(self) -> None:
        self._report["parts"] = [asdict(part) for part in self._parts.parts]
        judged = judge_goals(self._report["rows"], dry_run=self._plan.dry_run)
        self._report["goals"] = [asdict(goal) for goal in judged]
        write_report(self._plan.output, self._report)

    def _environment(self) -> None:
        self._report["environment"] = environment()

    def _bandwidth(self) -> None:
        self._report["bytes_per_second"] = copy_bandwidth(self._plan.device, self._plan.copy_bytes, 16)

    def _small(self, precision: str) -> Callable[[], Made]:
        def make() -> Made:
            plan = self._plan
            return make_bundle(
                plan.small,
                precision,
                plan.scratch,
                # So that a dry run, which measures the same pair, exports it once.
                max_seq_len=min(plan.small.positions, plan.max_seq_len),
                keep_weights=True,
                progress=plan.progress,
            )

        return make

    def _try_backends(self, small: dict[str, Made | None]) -> dict[str, list[BackendSpec]]:
        """Load every backend on the small pair; names of those that load, by precision."""
        usable: dict[str, list[BackendSpec]] = {}
        for precision, made in small.items():
            usable[precision] = []
            for name in self._plan.backends:
                if made is None:
                    self._parts.skip(
                        f"load {name} in {precision}", "there is no small pair in this precision"
                    )
                elif self._parts.run(f"load {name} in {precision}", 5, self._load(name, made)):
                    usable[precision].append(name)
        return usable

    def _load(self, backend: BackendSpec, made: Made) -> Callable[[], bool]:
        def load() -> bool:
            found = {
                "backend": str(backend),
                "precision": made.bundle.manifest.precision,
                "loads": True,
                "error": None,
            }
            self._report["backends"].append(found)
            try:
                compile_for(backend.name, made.bundle, self._budget, progress=self._plan.progress)
                backend.open(made.bundle).close()
            except DFlashError as error:
                found |= {"loads": False, "error": str(error)}
                raise
            return True

        return load

    def _check_parity(
        self, small: dict[str, Made | None], loaded: dict[str, list[BackendSpec]]
    ) -> dict[str, list[BackendSpec]]:
        """Compare tokens; backends that came to the end of it, by precision, whatever their tokens were."""
        return {
            precision: [
                name
                for name in loaded[precision]
                if self._parts.run(f"parity of {name} in {precision}", 10, self._parity(name, made))
            ]
            for precision, made in small.items()
        }

    def _parity(self, backend: BackendSpec, made: Made | None) -> Callable[[], bool]:
        def compare() -> bool:
            assert made is not None  # no backend is usable without one
            vocab = made.bundle.manifest.target.vocab_size
            prompts = [_random_ids(vocab, rows, rows) for rows in (1, 7, 40)]
            found = run_parity(made, backend, self._plan.device, prompts=prompts, max_new_tokens=48)
            self._report["parity"] += [result.as_dict() for result in found]
            release_memory()
            return True

        return compare

    def _measure_pair(self, pair: PairShape, precision: str, usable: Sequence[BackendSpec]) -> None:
        title = f"{pair.name} in {precision}"
        if not usable:
            self._parts.skip(title, f"no backend decodes the small pair in {_base(precision)}")
            return
        if self._report["bytes_per_second"] is None:
            self._parts.skip(title, "the copy bandwidth isn't known")
            return
        measured = None
        for name in usable:
            measured = self._parts.run(f"make {title} for {name}", 5, self._make(pair, precision, name))
            if measured is not None:
                break
        if measured is None:
            self._parts.skip(title, "there is no bundle to measure, see above")
            return
        with measured:
            for context in self._plan.contexts:
                seconds = seconds_to_measure(pair, context) if not self._plan.dry_run else 1.0
                self._parts.run(f"{title} at {context}", seconds, self._row(measured, precision, context))
        if not self._plan.keep:
            measured.remove()

    def _make(self, pair: PairShape, precision: str, backend: BackendSpec) -> Callable[[], Measured]:
        return lambda: Measured.make(self._plan, self._budget, pair, precision, backend)

    def _row(self, measured: Measured, precision: str, context: int) -> Callable[[], None]:
        def measure() -> None:
            prompt = _random_ids(measured.made.bundle.manifest.target.vocab_size, context, _PROMPT_SEED)
            bandwidth = self._report["bytes_per_second"]
            row = measure_row(self._plan, self._budget, measured, precision, prompt, bandwidth)
            self._report["rows"].append(row)

        return measure

    def _measure_demo(self, folder: Path, usable: dict[str, list[BackendSpec]]) -> None:
        def open_demo() -> Measured:
            return Measured.open(self._plan, self._budget, folder, usable)

        measured = self._parts.run("open the demo bundle", 5, open_demo)
        if measured is None:
            return
        with measured:
            manifest = measured.made.bundle.manifest
            for context in self._plan.contexts:
                needed = rows_needed(context, self._plan.steps, manifest.drafter.block_size)
                if needed > manifest.limits.max_seq_len:
                    reason = f"the bundle takes {manifest.limits.max_seq_len} tokens at most"
                    self._parts.skip(f"{manifest.name} at {context}", reason)
                    continue
                work = self._row(measured, manifest.precision, context)
                self._parts.run(f"{manifest.name} at {context}", 5, work)


def _base(precision: str) -> str:
    """The precision of activations and caches."""
    return "bf16" if precision == "fp8" else precision


def _random_ids(vocab: int, rows: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab, rows).tolist()
    return ids
