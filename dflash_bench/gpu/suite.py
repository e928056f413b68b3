"""What is run, in which order: the most telling parts first, so that a run that is cut off keeps them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dflash_bench.budget import Budget, Parts
from dflash_bench.gpu.backend_spec import BackendSpec
from dflash_bench.gpu.bundles import Made, compile_for, make_bundle
from dflash_bench.gpu.device_clock import copy_bandwidth
from dflash_bench.gpu.measure import Measured, measure_row, release_memory, seconds_to_measure
from dflash_bench.gpu.parity import run_parity
from dflash_bench.gpu.plan import Plan, rows_needed
from dflash_bench.gpu.report import FORMAT, write_report
from dflash_bench.gpu.rows import GOAL_CONTEXT, GOAL_PAIR, GOAL_PRECISION, judge_goals
from dflash_bench.gpu.shapes import PairShape
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
        self._report["environment"] = parts.run("environment", 0, environment)
        self._report["bytes_per_second"] = parts.run(
            "copy bandwidth", 1, copy_bandwidth, plan.device, plan.copy_bytes, 16
        )
        small = {
            precision: parts.run(f"a small pair in {precision}", 5, self._make_small, precision)
            for precision in (("fp32",) if plan.dry_run else ("fp32", "bf16"))
        }
        loaded = {precision: self._try_backends(precision, made) for precision, made in small.items()}
        usable = {
            precision: [
                name
                for name in loaded[precision]
                if made and parts.run(f"parity of {name} in {precision}", 10, self._parity, name, made)
            ]
            for precision, made in small.items()
        }
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
        self._report["goals"] = judge_goals(self._report["rows"], dry_run=self._plan.dry_run)
        write_report(self._plan.output, self._report)

    def _make_small(self, precision: str) -> Made:
        plan = self._plan
        # So that a dry run, which measures the same pair, exports it once.
        rows = min(plan.small.positions, plan.max_seq_len)
        return make_bundle(
            plan.small,
            precision,
            plan.scratch,
            max_seq_len=rows,
            keep_weights=True,
            progress=plan.progress,
        )

    def _try_backends(self, precision: str, made: Made | None) -> list[BackendSpec]:
        """Backends that load the small pair."""
        loaded = []
        for name in self._plan.backends:
            title = f"load {name} in {precision}"
            if made is None:
                self._parts.skip(title, "there is no small pair in this precision")
            elif self._parts.run(title, 5, self._load, name, made):
                loaded.append(name)
        return loaded

    def _load(self, backend: BackendSpec, made: Made) -> bool:
        precision = made.bundle.manifest.precision
        found = {"backend": str(backend), "precision": precision, "loads": True, "error": None}
        self._report["backends"].append(found)
        try:
            compile_for(backend.name, made.bundle, progress=self._plan.progress)
            backend.open(made.bundle).close()
        except DFlashError as error:
            found |= {"loads": False, "error": str(error)}
            raise
        return True

    def _parity(self, backend: BackendSpec, made: Made) -> bool:
        """Compare tokens; true when it came to its end, whatever the tokens were."""
        vocab = made.bundle.manifest.target.vocab_size
        prompts = [_random_ids(vocab, rows, rows) for rows in (1, 7, 40)]
        self._report["parity"] += run_parity(
            made, backend, self._plan.device, prompts=prompts, max_new_tokens=48
        )
        release_memory()
        return True

    def _measure_pair(self, pair: PairShape, precision: str, usable: Sequence[BackendSpec]) -> None:
        plan, title = self._plan, f"{pair.name} in {precision}"
        if not usable:
            self._parts.skip(title, f"no backend decodes the small pair in {_base(precision)}")
            return
        if self._report["bytes_per_second"] is None:
            self._parts.skip(title, "the copy bandwidth isn't known")
            return
        run, make, budget = self._parts.run, Measured.make, self._budget
        made = (
            run(f"make {title} for {name}", 5, make, plan, budget, pair, precision, name) for name in usable
        )
        measured = next((one for one in made if one is not None), None)
        if measured is None:
            self._parts.skip(title, "there is no bundle to measure, see above")
            return
        with closing(measured):
            for context in plan.contexts:
                seconds = seconds_to_measure(pair, context) if not plan.dry_run else 1.0
                self._parts.run(f"{title} at {context}", seconds, self._row, measured, precision, context)
        if not plan.keep:
            shutil.rmtree(measured.made.target.parent, ignore_errors=True)

    def _row(self, measured: Measured, precision: str, context: int) -> None:
        prompt = _random_ids(measured.made.bundle.manifest.target.vocab_size, context, _PROMPT_SEED)
        bandwidth = self._report["bytes_per_second"]
        row = measure_row(self._plan, self._budget, measured, precision, prompt, bandwidth)
        self._report["rows"].append(row)

    def _measure_demo(self, folder: Path, usable: dict[str, list[BackendSpec]]) -> None:
        plan, parts = self._plan, self._parts
        measured = parts.run("open the demo bundle", 5, Measured.open, plan, folder, usable)
        if measured is None:
            return
        with closing(measured):
            manifest = measured.made.bundle.manifest
            for context in plan.contexts:
                title = f"{manifest.name} at {context}"
                if (
                    rows_needed(context, plan.steps, manifest.drafter.block_size)
                    > manifest.limits.max_seq_len
                ):
                    parts.skip(title, f"the bundle takes {manifest.limits.max_seq_len} tokens at most")
                else:
                    parts.run(title, 5, self._row, measured, manifest.precision, context)


def _base(precision: str) -> str:
    """The precision of activations and caches."""
    return "bf16" if precision == "fp8" else precision


def _random_ids(vocab: int, rows: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab, rows).tolist()
    return ids
