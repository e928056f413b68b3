"""One row: a pair on a backend at one context, with PyTorch's two loops."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch

from dflash_bench.budget import Budget, SkippedError
from dflash_bench.floor import StepFloor, step_floor
from dflash_bench.gpu.backend_spec import BackendSpec
from dflash_bench.gpu.bundles import (
    DTYPES,
    Made,
    checkpoint_bytes,
    compile_for,
    is_made,
    load_random_drafter,
    load_random_target,
    make_bundle,
    seconds_to_make,
)
from dflash_bench.gpu.device_clock import measure_draft_share, time_steps
from dflash_bench.gpu.plan import Plan
from dflash_bench.gpu.rows import DRAFTED, HF, PLAIN, REFERENCE, Sample, make_row
from dflash_bench.gpu.shapes import PairShape
from dflash_bench.interleave import measure
from dflash_bench.systems.pytorch import HuggingFace, ReferenceLoop
from dflash_export.reference import reference_version
from dflash_rt import Bundle
from dflash_rt.backends.base import Backend
from dflash_rt.errors import BackendError

__all__ = ["Measured", "measure_row", "release_memory", "seconds_to_measure"]


@dataclass
class Measured:
    """A bundle on a backend, and PyTorch's models of the same shape."""

    made: Made
    backend: Backend
    name: str
    shape: PairShape | None
    torch_models: tuple[Any, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, plan: Plan, budget: Budget, shape: PairShape, precision: str, backend: BackendSpec) -> Self:
        """Export random weights, build engines, load both sides.

        Raises SkippedError where time, disk or the exporter don't allow it; DFlashError where they fail.
        """
        if not plan.dry_run and not is_made(shape, precision, plan.scratch, plan.max_seq_len):
            budget.require(seconds_to_make(shape, precision, engines=backend.name.startswith("tensorrt")))
        made = make_bundle(
            shape, precision, plan.scratch, max_seq_len=plan.max_seq_len, progress=plan.progress
        )
        compile_for(backend.name, made.bundle, progress=plan.progress)
        measured = cls(made, backend.open(made.bundle), str(backend), shape)
        measured._load_torch(plan, shape)
        return measured

    @classmethod
    def open(cls, plan: Plan, folder: Path, usable: Mapping[str, Sequence[BackendSpec]]) -> Self:
        """A bundle that is there already; PyTorch doesn't run on it."""
        bundle = Bundle.open(folder)
        names = usable.get(bundle.manifest.precision, ())
        if not names:
            raise SkippedError(f"no backend decodes the small pair in {bundle.manifest.precision}")
        compile_for(names[0].name, bundle, progress=plan.progress)
        reason = (
            "only pairs of random weights are compared with PyTorch; for real ones see `dflash-bench run`"
        )
        made, missing = Made(bundle, folder, folder), dict.fromkeys((HF, REFERENCE), reason)
        return cls(made, names[0].open(bundle), str(names[0]), None, missing=missing)

    def close(self) -> None:
        """Free both."""
        self.backend.close()
        self.torch_models = None
        release_memory()

    def _load_torch(self, plan: Plan, shape: PairShape) -> None:
        dtype = DTYPES[self.made.bundle.manifest.precision]
        if plan.device != "cpu":
            # A fifth more for caches and activations.
            needed, free = checkpoint_bytes(shape, dtype) * 6 // 5, torch.cuda.mem_get_info(plan.device)[0]
            if free < needed:
                reason = (
                    f"{needed / 1e9:.0f} GB of GPU memory needed, {free / 1e9:.0f} GB free beside the backend"
                )
                self.missing |= dict.fromkeys((HF, REFERENCE), reason)
                return
        try:
            target = load_random_target(shape, dtype, plan.device)
            drafter = None
            if reference_version() is None:
                self.missing[REFERENCE] = "PyPI dflash isn't installed"
            else:
                drafter = load_random_drafter(shape, dtype, plan.device)
        except Exception as error:  # noqa: BLE001  # the backend's steps are still worth measuring
            self.missing |= dict.fromkeys((HF, REFERENCE), f"{type(error).__name__}: {error}")
        else:
            self.torch_models = (target, drafter)


def release_memory() -> None:
    """Give back what PyTorch keeps of a GPU's memory for itself: others need it next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_to_measure(shape: PairShape, context: int) -> float:
    """A guess for planning, on the careful side: four systems prefill and step in every repeat."""
    return 10 + shape.layers * shape.hidden / 147456 * (15 + context / 400)


def measure_row(
    plan: Plan,
    budget: Budget,
    measured: Measured,
    precision: str,
    prompt: Sequence[int],
    bytes_per_second: float,
) -> dict[str, Any]:
    """Measure one row. Raises SkippedError if the time isn't enough for one repeat."""
    manifest = measured.made.bundle.manifest
    width, context = manifest.drafter.block_size, len(prompt)
    results = measure(
        _systems(measured),
        [prompt],
        max_new_tokens=plan.steps,
        repeats=plan.repeats,
        pause_seconds=0,
        warm_up_tokens=plan.steps,
        budget=budget,
        optional=(HF, REFERENCE),
        missing=measured.missing,
    )
    share = measure_draft_share(
        measured.backend, prompt, width=width, prefill_chunk=manifest.limits.prefill_chunk
    )
    published = measured.shape.published if measured.shape is not None else None
    # Halfway through the steps that were measured, of which each commits one row with random weights.
    middle = context + plan.steps // 2
    return make_row(
        pair=manifest.name if measured.shape is None else measured.shape.name,
        precision=precision,
        backend=measured.name,
        context=context,
        width=width,
        samples={name: list(done.values()) for name, done in results.items()},
        floor=_floor(measured.made.bundle, width, middle),
        plain_floor=_floor(measured.made.bundle, 1, middle),
        bytes_per_second=bytes_per_second,
        published=published or {},
        missing=measured.missing,
        draft_share=share,
    )


def _floor(bundle: Bundle, width: int, context: int) -> StepFloor:
    floor = step_floor(bundle, width, context)
    if floor is None:
        raise BackendError(
            "a mixture of experts has no floor",
            found=bundle.manifest.target.model_type,
            expected="a target whose steps all read the same weights",
            remedy="measure another pair",
        )
    return floor


@dataclass(frozen=True)
class _Timed:
    """A system whose steps are timed: ``decode`` gives a sample of so many steps after a prompt."""

    name: str
    decode: Callable[[Sequence[int], int], Sample]


def _systems(measured: Measured) -> list[_Timed]:
    manifest = measured.made.bundle.manifest
    block_size, chunk = manifest.drafter.block_size, manifest.limits.prefill_chunk

    def own(name: str, width: int) -> _Timed:
        def decode(prompt: Sequence[int], steps: int) -> Sample:
            return time_steps(measured.backend, prompt, width=width, steps=steps, prefill_chunk=chunk)

        return _Timed(name, decode)

    def plainly(prompt: Sequence[int], steps: int) -> Sample:
        return Sample(median(plain.decode(prompt, steps + 1).step_seconds or ()))

    def by_reference(prompt: Sequence[int], steps: int) -> Sample:
        # Most of its blocks are whole: the last ones are clipped to the tokens still wanted.
        return Sample(loop.decode(prompt, steps + block_size).seconds_per_step)

    systems = [own(DRAFTED, block_size), own(PLAIN, 1)]
    if measured.torch_models is not None:
        target, drafter = measured.torch_models
        plain = HuggingFace(target)
        systems.append(_Timed(HF, plainly))
        if drafter is not None:
            loop = ReferenceLoop(drafter, target, block_size - 1)
            systems.append(_Timed(REFERENCE, by_reference))
    return systems
