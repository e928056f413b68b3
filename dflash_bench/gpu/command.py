"""The command line, and the clock that no part can outlast."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflash_bench.gpu.backend_spec import FUSED, NO_GRAPH, BackendSpec
from dflash_bench.gpu.budget import Budget
from dflash_bench.gpu.bundles import PRECISIONS
from dflash_bench.gpu.machine import gpu_name
from dflash_bench.gpu.report import DRY_RUN_WARNING, default_name, write_report
from dflash_bench.gpu.shapes import PAIRS, PARITY, TINY
from dflash_bench.gpu.suite import Plan, run_suite
from dflash_export.progress import LineProgress
from dflash_rt.errors import BackendUnavailableError
from dflash_rt.files import utc_now

__all__ = ["main", "make_plan", "mark_cut_off"]

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = (
    "tensorrt",
    "tensorrt-rtx",
    f"onnxruntime-cuda{FUSED}",
    "onnxruntime-cuda",
    f"onnxruntime-cuda{NO_GRAPH}",
)
DRY_BACKENDS = ("onnxruntime-device", f"onnxruntime-device{NO_GRAPH}", f"onnxruntime-device{FUSED}")
_CHILD = "DFLASH_GPU_SUITE_CHILD"
# Of the minutes, what the parent keeps for itself: a child that is late is killed before the time is over.
_RESERVE = 10.0


def main(arguments: Sequence[str]) -> int:
    """Run the suite in a process of its own, and kill that when the time is over.

    A library may sit in one call for minutes (an engine's build), where nothing else can stop it. Returns 0
    when the suite ran to its end and something was measured, 1 otherwise, 2 on wrong usage.
    """
    options = _parser().parse_args(arguments)
    if not options.dry_run and gpu_name() is None:
        print("There is no GPU here. `--dry-run` shows on a CPU that the suite runs.", file=sys.stderr)
        return 2
    plan = make_plan(options)
    if os.environ.get(_CHILD):
        report = run_suite(plan, Budget(plan.minutes * 60 - 2 * _RESERVE))
        return 0 if report["rows"] else 1
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), *arguments]
    command += ["--output", str(plan.output)]
    child = subprocess.Popen(command, env={**os.environ, _CHILD: "1"}, start_new_session=True)
    try:
        code = child.wait(plan.minutes * 60 - _RESERVE - (time.monotonic() - began))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        code = 1
        mark_cut_off(plan.output)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if plan.dry_run:
        print(DRY_RUN_WARNING, file=sys.stderr)
    if plan.output.exists():
        print(plan.output.with_suffix(".md").read_text(encoding="utf-8"))
        print(plan.output, file=sys.stderr)
    return code


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


def make_plan(options: argparse.Namespace) -> Plan:
    """What the options ask for; a dry run has tiny pairs, short contexts and a backend for the CPU."""
    dry = options.dry_run
    created = utc_now()
    output = options.output
    if output is None:
        name = default_name(created, None if dry else gpu_name(), dry_run=dry)
        output = ROOT / "benchmarks" / "results" / f"{name}.json"
    scratch = options.scratch
    if scratch is None:
        scratch = Path(tempfile.gettempdir()) / f"dflash-gpu-suite-{os.getuid()}"
    return Plan(
        output=output.with_suffix(".json").absolute(),
        scratch=scratch / ("gpu-suite-dry-run" if dry else "gpu-suite"),
        backends=options.backend or [BackendSpec.parse(name) for name in (DRY_BACKENDS if dry else BACKENDS)],
        small=TINY if dry else PARITY,
        pairs=(TINY,) if dry else [PAIRS[name] for name in options.pair or PAIRS],
        precisions=("fp32", "fp8") if dry else options.precision or ("bf16", "fp8"),
        contexts=(32, 64) if dry else options.context or (1024, 8192),
        device="cpu" if dry else "cuda",
        minutes=options.minutes,
        steps=4 if dry else 32,
        repeats=2 if dry else 3,
        copy_bytes=1 << (24 if dry else 30),
        dry_run=dry,
        demo=options.bundle,
        keep=options.keep,
        progress=LineProgress(sys.stderr),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_suite.py", description="Parity and speed on a GPU; see benchmarks/README.md."
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny pairs")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="the whole run takes no longer (8)")
    parser.add_argument(
        "--backend",
        action="append",
        type=_backend,
        help=f"NAME, NAME{FUSED} or NAME{NO_GRAPH}; repeat; pairs are measured on the first that works",
    )
    parser.add_argument("--pair", action="append", choices=list(PAIRS), help="a pair; repeat for more (all)")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="repeat for more (bf16 and fp8)"
    )
    parser.add_argument("--context", action="append", type=int, help="rows; repeat for more (1024 and 8192)")
    parser.add_argument("--bundle", type=Path, help="a bundle of real weights, such as the demo pair's")
    parser.add_argument("--scratch", type=Path, help="folder for what is built; 40 GB for qwen3-8b")
    parser.add_argument("--keep", action="store_true", help="leave bundles and engines there for another run")
    parser.add_argument("--output", type=Path, help="file for the JSON report; the page lies beside it")
    return parser


def _backend(text: str) -> BackendSpec:
    try:
        return BackendSpec.parse(text)
    except BackendUnavailableError as error:
        raise argparse.ArgumentTypeError(" ".join(str(error).split())) from error


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 1 <= minutes <= 600:
        raise argparse.ArgumentTypeError("from 1 to 600")
    return minutes
