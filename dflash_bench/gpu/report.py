"""The report: JSON for programs, a markdown page for people, both rewritten as the suite goes on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dflash_bench.gpu.shapes import PUBLISHED_SOURCE
from dflash_bench.tables import cell, markdown
from dflash_rt.files import write_atomically

__all__ = ["DRY_RUN_WARNING", "FORMAT", "default_name", "to_markdown", "write_report"]

FORMAT = "dflash-gpu-suite"
DRY_RUN_WARNING = (
    "DRY RUN on a CPU with tiny random pairs: it shows that the suite runs, and proves nothing about speed."
)
RANDOM_WEIGHTS = (
    "Random weights accept no drafts, so a step's cost is measured and the gain is not. The gain that this "
    f"cost would bring follows from published tokens per step ({PUBLISHED_SOURCE}) and was not measured here."
)


def default_name(created: str, gpu: str | None, *, dry_run: bool) -> str:
    """A file name without its ending: the day, and the GPU. ``created`` begins with the date."""
    device = re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower()).strip("-")
    return f"{'dry-run' if dry_run else 'gpu'}-{created[:10]}-{device}"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write ``path`` (JSON) and the same name ending in ``.md``, each whole or not at all."""
    text = json.dumps(_plain(report), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    for goal, content in ((path, text), (path.with_suffix(".md"), to_markdown(report))):
        write_atomically(goal, content)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The page. Takes a report at any time: what isn't measured yet isn't in it."""
    environment = report["environment"] or {}
    title = environment.get("gpu") or environment.get("cpu") or "an unknown machine"
    lines = [f"# GPU suite: {title}, {report['created'][:10]}", ""]
    if report["dry_run"]:
        lines += [f"**{DRY_RUN_WARNING}**", ""]
    if report["state"] != "finished":
        lines += [f"**This run is not complete: {report['state']}.**", ""]
    lines += [*_machine(report), *_backends(report), *_parity(report), *_steps(report)]
    lines += [*_gains(report), *_goals(report), *_parts(report)]
    return "\n".join(lines).rstrip() + "\n"


def _machine(report: Mapping[str, Any]) -> list[str]:
    environment = report["environment"]
    if not environment:
        return []
    smi = environment["nvidia_smi"] or {}
    capability = environment["compute_capability"]
    bandwidth = report["bytes_per_second"]
    rows = [
        ("GPU", environment["gpu"] or "none"),
        ("compute capability", "none" if capability is None else f"sm{capability}"),
        ("driver", smi.get("driver_version", "unknown")),
        ("memory", smi.get("memory.total", "unknown")),
        ("CPU", f"{environment['cpu']}, {environment['cores']} cores"),
        ("Python", environment["python"]),
        ("packages", ", ".join(f"{name} {number}" for name, number in environment["packages"].items())),
        ("copy bandwidth", "not measured" if bandwidth is None else f"{bandwidth / 1e9:.0f} GB/s"),
    ]
    return _section("Machine", (), ("", ""), rows)


def _backends(report: Mapping[str, Any]) -> list[str]:
    rows = [
        (item["backend"], item["precision"], "yes" if item["loads"] else "no", _one_line(item["error"] or ""))
        for item in report["backends"]
    ]
    return _section("Backends", (), ("backend", "precision", "loads", "why not"), rows)


def _parity(report: Mapping[str, Any]) -> list[str]:
    header = ["pair", "precision", "backend", "run", "tokens", "PyTorch's best", "near ties", "bugs", "worst"]
    header += ["answers as PyTorch's", "tokens a step", "steps as the reference's"]
    rows = [
        (
            *_texts(item, "pair precision backend run tokens equal near_ties bugs"),
            f"{_short(item['worst'])} of {_short(item['bound'])}",
            f"{item['equal_answers']} of {item['answers']}",
            _number(item["tokens_per_step"]),
            item["steps_as_reference"] or "",
        )
        for item in report["parity"]
    ]
    text = (
        "Tokens are compared with PyTorch's best in fp32 on the same device; `worst` is the largest distance "
        "below it, beside the bound of a near tie. Answers are compared with PyTorch's in the bundle's own "
        "precision."
    )
    return _section("Parity", (text, ""), header, rows)


def _steps(report: Mapping[str, Any]) -> list[str]:
    header = ["pair", "precision", "backend", "context", "step ms", "floor ms", "x floor", "plain ms"]
    header += ["plain floor ms", "x floor", "gap us", "plain gap us", "draft share", "reference ms", "hf ms"]
    rows = [
        (
            *_texts(row, "pair precision backend context"),
            *_numbers(row, "step_ms floor_ms step_over_floor plain_step_ms plain_floor_ms plain_over_floor"),
            *_numbers(row, "host_gap_us plain_host_gap_us", 1),
            cell(row["draft_share"], ".1%", missing=""),
            *_numbers(row, "reference_step_ms hf_step_ms"),
        )
        for row in report["rows"]
    ]
    notes = [
        f"- {row['pair']} {row['precision']} at {row['context']}: {name} not measured: {_one_line(reason)}"
        for row in report["rows"]
        for name, reason in row["missing"].items()
    ]
    text = (
        "Batch 1, medians. The floor is the bytes of weights and caches that a step reads, over the measured "
        "copy bandwidth. The gap is the mean time of a step less its mean time on the device. The share of "
        "drafting is of the device time of a step whose operations are enqueued one by one."
    )
    return [*_section("Steps", (text, ""), header, rows), *notes, *([""] if rows else [])]


def _gains(report: Mapping[str, Any]) -> list[str]:
    header = ["pair", "precision", "context", "cycle cost", "reference / drafted", "published"]
    header += ["tokens a step", "x plain", "x Hugging Face"]
    rows = [
        (
            *_texts(row, "pair precision context"),
            _ratio(row["cycle_cost"]),
            _ratio(row["over_reference_quartiles"]),
            name,
            *_numbers(gain, "tokens_per_step over_plain over_hf"),
        )
        for row in report["rows"]
        for name, gain in row["expected"].items()
    ]
    text = "Ratios are medians over pairs of runs of the same repeat, with the quartiles."
    return _section("What follows from the costs", (RANDOM_WEIGHTS, text, ""), header, rows)


def _goals(report: Mapping[str, Any]) -> list[str]:
    rows = [(goal["text"], _number(goal["value"], 3), goal["verdict"]) for goal in report["goals"]]
    return _section(f"Goals ({report['goals_of']})", (), ("goal", "measured", "verdict"), rows)


def _parts(report: Mapping[str, Any]) -> list[str]:
    rows = [
        (part["name"], part["state"], f"{part['seconds']:.1f}", _one_line(part["reason"] or ""))
        for part in report["parts"]
    ]
    return _section("Parts", (), ("part", "state", "seconds", "reason"), rows)


def _section(
    title: str, text: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
    """Nothing without rows."""
    return [f"## {title}", "", *text, *markdown(header, rows), ""] if rows else []


def _texts(values: Mapping[str, Any], keys: str) -> list[str]:
    return [str(values[key]) for key in keys.split()]


def _numbers(values: Mapping[str, Any], keys: str, digits: int = 2) -> list[str]:
    return [_number(values[key], digits) for key in keys.split()]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None, digits: int = 2) -> str:
    return cell(value, f".{digits}f", missing="")


def _short(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.1e}"


def _plain(value: Any) -> Any:
    """JSON has no word for what isn't finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _ratio(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['median']:.2f} ({value['lower_quartile']:.2f} to {value['upper_quartile']:.2f})"
