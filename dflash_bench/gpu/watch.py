"""Runs the suite in a process of its own, and kills that when the time is over.

A library may sit in one call for minutes (an engine's build), where nothing else can stop it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dflash_bench.budget import Budget
from dflash_bench.gpu.plan import Plan
from dflash_bench.gpu.report import write_report
from dflash_export.progress import LineProgress

__all__ = ["mark_cut_off", "run_in_time"]

# Of the minutes, what the parent keeps for itself: a child that is late is killed before the time is over.
_RESERVE = 10.0


def run_in_time(plan: Plan) -> bool:
    """Run a plan, within its minutes; whether it ran to its end and measured something.

    What was measured is in the report at ``plan.output``, also when the run was cut off.
    """
    began = time.monotonic()
    child = multiprocessing.get_context("spawn").Process(target=_run, args=(plan,))
    child.start()
    try:
        child.join(plan.minutes * 60 - _RESERVE - (time.monotonic() - began))
        if child.exitcode is None:
            _kill(child)
            mark_cut_off(plan.output)
    except BaseException:
        _kill(child)
        raise
    return child.exitcode == 0


def _run(plan: Plan) -> None:
    os.setsid()  # a group of its own: compilers that a library starts are killed with it
    from dflash_bench.gpu.suite import run_suite

    plan = replace(plan, progress=LineProgress(sys.stderr))
    report = run_suite(plan, Budget(plan.minutes * 60 - 2 * _RESERVE))
    sys.exit(0 if report["rows"] else 1)


def _kill(child: multiprocessing.process.BaseProcess) -> None:
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it has no group yet, or is gone
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()


def mark_cut_off(path: Path) -> None:
    """Say in the report of a killed run that it was killed, and in which part. Nothing if there is none."""
    if not path.exists():
        return
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    running = [part for part in report["parts"] if part["state"] == "running"]
    report["state"] = "cut off, the time was over" + "".join(f", in: {part['name']}" for part in running)
    for part in running:
        part["state"], part["reason"] = "failed", "cut off: the time was over"
    write_report(path, report)
