"""From what was measured to the report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence

import torch

from dflash_export.parity.drafting import drafting_at
from dflash_export.parity.limits import make_limits
from dflash_export.parity.measure import ErrorCollectors, Measurements
from dflash_export.parity.report import ReferenceDrafting, VerifyReport
from dflash_export.parity.verdicts import classify_prompt, find_problems, find_warnings
from dflash_export.sources.resolve import Source
from dflash_rt import Bundle
from dflash_rt.bundle.manifest import MANIFEST_NAME
from dflash_rt.files import utc_now
from dflash_rt.machine import cpu_name
from dflash_rt.version import __version__

__all__ = ["assemble"]

_PACKAGES = ("dflash", "numpy", "onnxruntime", "tokenizers", "torch", "transformers")


def assemble(
    bundle: Bundle,
    source: Source,
    max_new_tokens: int,
    measurements: Sequence[Measurements],
    collectors: ErrorCollectors,
    reference: ReferenceDrafting,
    text_of: Callable[[int], str],
    threads: int | None,
    *,
    mixture: bool,
) -> VerifyReport:
    """Derive the limits, classify_prompt every prompt by them, and add what a reader needs to know."""
    manifest = bundle.manifest
    errors = {width: collector.result() for width, collector in collectors.by_width.items()}
    shapes = {width: collector.result() for width, collector in collectors.shapes.items()}
    repeated = collectors.repeated.result()
    sixteen_bit = None if manifest.precision == "fp32" else collectors.sixteen_bit.result()
    limits = make_limits(
        errors=errors.values(),
        shapes=shapes.values(),
        repeated=repeated,
        noise=repeated if sixteen_bit is None else sixteen_bit,
        precision=manifest.precision,
        mixture=mixture,
    )
    features = collectors.features.result()
    prompts = tuple(classify_prompt(index, item, limits, text_of) for index, item in enumerate(measurements))
    text = (bundle.root / MANIFEST_NAME).read_bytes()
    return VerifyReport(
        bundle={
            "name": manifest.name,
            "precision": manifest.precision,
            "quantization": None if manifest.quantization is None else manifest.quantization.weights,
            "manifest_sha256": hashlib.sha256(text).hexdigest(),
        },
        target={"kind": source.kind, "id": source.id, "revision": source.revision},
        max_new_tokens=max_new_tokens,
        created=utc_now(),
        environment=_environment(threads),
        prompts=prompts,
        logit_errors=errors,
        shape_errors=shapes,
        pytorch_repeated=repeated,
        pytorch_16_bit=sixteen_bit,
        limits=limits,
        features=features,
        drafting=tuple(drafting_at(measurements, width) for width in errors if width > 1),
        reference=reference,
        problems=find_problems(prompts, errors, limits),
        warnings=tuple(find_warnings(features, reference, manifest.precision)),
    )


def _environment(threads: int | None) -> dict[str, str | int | None]:
    versions: dict[str, str | int | None] = {
        "dflash-export": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions | {
        "processor": cpu_name(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "onnxruntime_threads": threads,
    }
