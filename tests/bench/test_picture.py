"""The picture of the README: drawn from a committed result, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def draw(report: dict[str, Any]) -> str:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "benchmarks" / "picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.draw(report))


def newest() -> dict[str, Any]:
    path = max((ROOT / "benchmarks" / "results").glob("demo-*.json"))
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def test_the_picture_is_that_of_the_newest_result() -> None:
    assert (ROOT / "docs" / "images" / "demo.svg").read_text(encoding="utf-8") == draw(newest())


def test_bars_follow_the_rates() -> None:
    report = newest()
    report["systems"]["hf"]["tokens_per_second"] *= 2
    image = ElementTree.fromstring(draw(report))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width", "")) for bar in image.findall(f"{space}rect")[1:]]
    texts = [text.text or "" for text in image.findall(f"{space}text")]
    rates = [float(text) for text in texts[2:-1:2]]
    assert rates == sorted(rates, reverse=True)
    assert f"{report['systems']['hf']['tokens_per_second']:.1f}" in texts
    assert all(abs(bar / bars[0] - rate / rates[0]) < 0.01 for bar, rate in zip(bars, rates, strict=True))
    assert not any("reference" in text for text in texts)
