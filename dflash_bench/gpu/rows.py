"""From samples to a row of the report. Pure functions: nothing here measures anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from dflash_bench.gpu.floor import StepBytes

__all__ = ["DRAFTED", "HF", "PLAIN", "REFERENCE", "Sample", "make_row", "pair_ratio"]

PLAIN, DRAFTED, HF, REFERENCE = "plain", "drafted", "hf", "reference"


@dataclass(frozen=True)
class Sample:
    """One contender in one repeat: medians over its steps, in seconds.

    Attributes:
        step_seconds: from token to token.
        run_seconds: of those, on the device by events, or inside the backend's runs where there is no GPU;
            ``None`` for others than ours.
        gap_seconds: mean time of a step less its mean time on the device.
    """

    step_seconds: float
    run_seconds: float | None = None
    gap_seconds: float | None = None


def pair_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float] | None:
    """Ratios of values of the same repeat: median and quartiles; ``None`` if there is no pair."""
    values = [a / b for a, b in zip(numerator, denominator, strict=False) if b > 0]
    if not values:
        return None
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": middle, "lower_quartile": lower, "upper_quartile": upper, "pairs": len(values)}


def make_row(
    *,
    pair: str,
    precision: str,
    backend: str,
    context: int,
    width: int,
    samples: Mapping[str, Sequence[Sample]],
    step_bytes: StepBytes,
    plain_bytes: StepBytes,
    bytes_per_second: float,
    published: Mapping[str, float],
    missing: Mapping[str, str],
    draft_share: float | None = None,
) -> dict[str, Any]:
    """One row: medians over repeats, ratios over pairs of the same repeat.

    ``missing`` says by contender why it has no samples. ``published`` gives tokens per step, from which the
    gain follows that this cycle cost would bring; what random weights accept means nothing.
    """
    steps = {name: [sample.step_seconds for sample in found] for name, found in samples.items()}
    plain, drafted = steps.get(PLAIN, []), steps.get(DRAFTED, [])
    cycle = pair_ratio(drafted, plain)
    over_hf = pair_ratio(steps.get(HF, []), drafted)
    floor_ms, plain_floor_ms = (b.floor_ms(bytes_per_second) for b in (step_bytes, plain_bytes))
    step_ms, plain_ms = _ms(drafted), _ms(plain)
    over_reference = pair_ratio(steps.get(REFERENCE, []), drafted)
    return {
        "pair": pair,
        "precision": precision,
        "backend": backend,
        "context": context,
        "width": width,
        "repeats": len(drafted),
        "step_ms": step_ms,
        "plain_step_ms": plain_ms,
        "reference_step_ms": _ms(steps.get(REFERENCE, [])),
        "hf_step_ms": _ms(steps.get(HF, [])),
        "step_bytes": step_bytes.total,
        "plain_step_bytes": plain_bytes.total,
        "floor_ms": floor_ms,
        "plain_floor_ms": plain_floor_ms,
        "step_over_floor": None if step_ms is None else step_ms / floor_ms,
        "plain_over_floor": None if plain_ms is None else plain_ms / plain_floor_ms,
        "host_gap_us": _us([s.gap_seconds for s in samples.get(DRAFTED, [])]),
        "plain_host_gap_us": _us([s.gap_seconds for s in samples.get(PLAIN, [])]),
        "device_ms": _ms([s.run_seconds for s in samples.get(DRAFTED, []) if s.run_seconds is not None]),
        "draft_share": draft_share,
        "cycle_cost": cycle,
        "over_reference": None if over_reference is None else over_reference["median"],
        "over_reference_quartiles": over_reference,
        "plain_over_hf": pair_ratio(steps.get(HF, []), plain),
        "expected": {
            name: {
                "tokens_per_step": tokens,
                "over_plain": None if cycle is None else tokens / cycle["median"],
                "over_hf": None if over_hf is None else tokens * over_hf["median"],
            }
            for name, tokens in published.items()
        },
        "missing": dict(missing),
    }


def _ms(seconds: Sequence[float]) -> float | None:
    return 1e3 * median(seconds) if seconds else None


def _us(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return 1e6 * median(known) if known else None
