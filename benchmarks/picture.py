"""Draws docs/images/demo.svg from the JSON line of a run of ``dflash-bench run``: one bar a system.

python benchmarks/picture.py benchmarks/results/demo-2026-11-28.json docs/images/demo.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_NAMES = {"plain": "dflash-rt, plain", "hf": "Hugging Face generate", "genai": "onnxruntime-genai, plain"}
_OWN, _OTHER = "#0b7285", "#adb5bd"
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 720, 230, 60, 26, 10, 52


def draw(report: dict[str, Any]) -> str:
    """The picture as SVG text; the fastest system comes first.

    ``report`` is the JSON object of ``dflash-bench run`` (docs/reference/benchmark.md). Systems without a
    rate, and the reference's loop, which is a yardstick for tokens and not for speed, have no bar.
    """
    rates = {
        name: system["tokens_per_second"]
        for name, system in report["systems"].items()
        if system["tokens_per_second"] is not None and not name.startswith("reference")
    }
    scale = (_WIDTH - _LEFT - _RIGHT) / max(rates.values())
    height = _TOP + len(rates) * (_BAR + _GAP) + 30
    title = f"{report['bundle']}, {report['precision']}, {report['threads']} threads: tokens per second"
    note = (
        f"{report['cpu']}; greedy, {report['prompts']} prompts of {report['max_new_tokens']} tokens; medians"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<style>text { font: 14px sans-serif; fill: #212529 }</style>",
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-weight="bold">{escape(title)}</text>',
    ]
    for row, (name, rate) in enumerate(sorted(rates.items(), key=lambda item: -item[1])):
        y = _TOP + row * (_BAR + _GAP)
        color = _OWN if name.startswith(("plain", "drafted")) else _OTHER
        lines += [
            f'<text x="{_LEFT - 10}" y="{y + 18}" text-anchor="end">{escape(_label(name))}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{rate * scale:.1f}" height="{_BAR}" fill="{color}"/>',
            f'<text x="{_LEFT + rate * scale + 8:.1f}" y="{y + 18}">{rate:.1f}</text>',
        ]
    lines.append(f'<text x="16" y="{height - 12}">{escape(note)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _label(name: str) -> str:
    kind, _, number = name.partition("-")
    return f"dflash-rt, {number} drafts a step" if kind == "drafted" else _NAMES.get(name, name)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
