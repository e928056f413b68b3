"""From a shape to a bundle with engines, in the scratch folder, within the budget."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflash_bench.budget import Budget, SkippedError
from dflash_bench.gpu.checkpoint import checkpoint_bytes, write_pair
from dflash_bench.gpu.shapes import PairShape
from dflash_export import build, compile_engines
from dflash_export.engines.vendor import BACKENDS as ENGINE_BACKENDS
from dflash_export.progress import Progress
from dflash_rt import Bundle

__all__ = ["DTYPES", "Made", "compile_for", "is_made", "make_bundle", "seconds_to_make"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Guesses for planning, on the careful side: no measurement behind them.
_EXPORT_SECONDS, _EXPORT_SECONDS_A_GB = 20.0, 4.0
_COMPILE_SECONDS, _COMPILE_SECONDS_A_GB = 15.0, 5.0


@dataclass(frozen=True)
class Made:
    """A bundle, and the checkpoints that it was built from while they are kept."""

    bundle: Bundle
    target: Path
    drafter: Path


def seconds_to_make(shape: PairShape, precision: str, *, engines: bool) -> float:
    """How long export and engines may take."""
    size = checkpoint_bytes(shape, DTYPES.get(precision, torch.bfloat16)) / 1e9
    seconds = _EXPORT_SECONDS + size * _EXPORT_SECONDS_A_GB
    return seconds + (_COMPILE_SECONDS + size * _COMPILE_SECONDS_A_GB if engines else 0)


def make_bundle(
    shape: PairShape,
    precision: str,
    scratch: Path,
    *,
    max_seq_len: int,
    keep_weights: bool = False,
    progress: Progress | None = None,
) -> Made:
    """Export random weights of a shape. One that is in ``scratch`` already is taken as it is.

    The checkpoints' weights are removed afterwards unless ``keep_weights``: a bundle has them all, and a
    large pair is there twice otherwise. ``precision`` is one of ``shapes.PRECISIONS``.

    Raises:
        SkippedError: the disk is too full.
        DFlashError: as :func:`dflash_export.build` does.
    """
    options = _options(precision)
    dtype = DTYPES[options["precision"]]
    folder = _folder(shape, precision, scratch, max_seq_len)
    target, drafter, output = folder / "target", folder / "drafter", folder / "bundle"
    if output.is_dir() and (not keep_weights or list(target.glob("*.safetensors"))):
        return Made(Bundle.open(output), target, drafter)
    shutil.rmtree(folder, ignore_errors=True)
    _require_disk(scratch, 2 * checkpoint_bytes(shape, dtype))
    write_pair(shape, folder, dtype)
    options |= {"name": shape.name, "max_seq_len": max_seq_len}
    bundle = build(target, drafter, output, progress=progress, **options)
    if not keep_weights:
        for path in (*target.glob("*.safetensors"), *drafter.glob("*.safetensors")):
            path.unlink()
    return Made(bundle, target, drafter)


def is_made(shape: PairShape, precision: str, scratch: Path, max_seq_len: int) -> bool:
    """Whether :func:`make_bundle` would find it there."""
    return (_folder(shape, precision, scratch, max_seq_len) / "bundle").is_dir()


def compile_for(
    backend: str, bundle: Bundle, budget: Budget, *, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Build the engines that ``backend`` needs; ``None`` if it runs the graphs themselves.

    Raises DFlashError as :func:`dflash_export.compile_engines` does: also for a GPU that TensorRT-RTX can't
    build for, which is asked for by its compute capability.
    """
    if backend not in ENGINE_BACKENDS:
        return None
    from dflash_export.engines.devices import present_gpu

    gpu = present_gpu()
    targets = () if backend == "tensorrt" or gpu is None else (gpu.compute_capability,)
    before = budget.left
    made = compile_engines(bundle, backend=backend, compute_capabilities=targets, progress=progress)
    return {"built": list(made.built), "reused": list(made.reused), "seconds": before - budget.left}


def _folder(shape: PairShape, precision: str, scratch: Path, max_seq_len: int) -> Path:
    return scratch / f"{shape.name}-{precision}-{max_seq_len}"


def _options(precision: str) -> dict[str, Any]:
    """Options of :func:`dflash_export.build`."""
    if precision in DTYPES:
        return {"precision": precision}
    # Calibrated on next to nothing: the scales of random weights mean nothing, only their places count.
    fp8 = {"quantize": "fp8", "calib_limit": 1, "calib_tokens": 4, "measure_quantization": False}
    return {"precision": "bf16", **fp8}


def _require_disk(scratch: Path, size: int) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(scratch).free
    if free < size:
        raise SkippedError(
            f"the disk is too full: {free / 1e9:.1f} GB free in {scratch}, {size / 1e9:.1f} GB needed"
        )
