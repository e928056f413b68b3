"""What one run of the GPU suite does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dflash_bench.gpu.backend_spec import FUSED, NO_GRAPH, BackendSpec
from dflash_bench.gpu.report import default_name
from dflash_bench.gpu.shapes import PAIRS, PARITY, TINY, PairShape
from dflash_export.engines.devices import present_gpu
from dflash_export.progress import SILENT, Progress
from dflash_rt.files import utc_now

__all__ = ["RESULTS", "WARM_STEPS", "Plan", "make_plan", "rows_needed"]

RESULTS = Path("benchmarks", "results")
"""Where reports go, below the working folder."""

WARM_STEPS = 10
"""Steps before the first one that counts: shapes are new in them, and a graph is captured and compared."""

_BACKENDS = (
    "tensorrt",
    "tensorrt-rtx",
    f"onnxruntime-cuda{FUSED}",
    "onnxruntime-cuda",
    f"onnxruntime-cuda{NO_GRAPH}",
)
_DRY_BACKENDS = ("onnxruntime-device", f"onnxruntime-device{NO_GRAPH}", f"onnxruntime-device{FUSED}")


@dataclass(frozen=True)
class Plan:
    """What one run of the suite does.

    Attributes:
        backends: names to try; the first that loads a pair is measured.
        small: the pair of which tokens are compared.
        pairs, precisions, contexts: the rows, in this order.
        device: of PyTorch: ``"cuda"`` or ``"cpu"``.
        steps, repeats: of each measurement.
        copy_bytes: size of the copy that gives the bandwidth.
        demo: a bundle of real weights that is measured, too.
        keep: leave what was built in the scratch folder, and take what another run left there.
    """

    output: Path
    scratch: Path
    backends: Sequence[BackendSpec]
    small: PairShape
    pairs: Sequence[PairShape]
    precisions: Sequence[str]
    contexts: Sequence[int]
    device: str
    minutes: float
    steps: int
    repeats: int
    copy_bytes: int
    dry_run: bool
    demo: Path | None = None
    keep: bool = False
    progress: Progress = field(default=SILENT)

    @property
    def max_seq_len(self) -> int:
        """Rows that every bundle has to offer."""
        widest = max(pair.block_size for pair in self.pairs)
        return rows_needed(max(self.contexts), self.steps, widest)


def rows_needed(context: int, steps: int, width: int) -> int:
    """Rows of prompt and output that measuring ``steps`` steps may use, should every draft be accepted."""
    return context + (steps + WARM_STEPS) * width + 1


def make_plan(
    *,
    dry_run: bool = False,
    minutes: float = 8.0,
    backends: Sequence[BackendSpec] = (),
    pairs: Sequence[str] = (),
    precisions: Sequence[str] = (),
    contexts: Sequence[int] = (),
    bundle: Path | None = None,
    scratch: Path | None = None,
    keep: bool = False,
    output: Path | None = None,
) -> Plan:
    """A plan from the command's options; a dry run has tiny pairs, short contexts and backends for a CPU."""
    if output is None:
        gpu = None if dry_run else present_gpu()
        output = RESULTS / f"{default_name(utc_now(), gpu.name if gpu else None, dry_run=dry_run)}.json"
    if scratch is None:
        scratch = Path(tempfile.gettempdir()) / f"dflash-gpu-suite-{os.getuid()}"
    return Plan(
        output=output.with_suffix(".json").absolute(),
        scratch=scratch.absolute() / ("gpu-suite-dry-run" if dry_run else "gpu-suite"),
        backends=backends or [BackendSpec.parse(name) for name in (_DRY_BACKENDS if dry_run else _BACKENDS)],
        small=TINY if dry_run else PARITY,
        pairs=(TINY,) if dry_run else [PAIRS[name] for name in pairs or PAIRS],
        precisions=("fp32", "fp8") if dry_run else precisions or ("bf16", "fp8"),
        contexts=(32, 64) if dry_run else contexts or (1024, 8192),
        device="cpu" if dry_run else "cuda",
        minutes=minutes,
        steps=4 if dry_run else 32,
        repeats=2 if dry_run else 3,
        copy_bytes=1 << (24 if dry_run else 30),
        dry_run=dry_run,
        demo=bundle,
        keep=keep,
    )
