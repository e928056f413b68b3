"""Every option of a build is one field, and the keywords, the command line and provenance follow it."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dflash_export import build
from dflash_export.cli import main
from dflash_export.errors import RecipeError
from dflash_export.manifest import provenance
from dflash_export.options import OPTIONS, REQUIRED, BuildOptions

PLACES = {"target": "t", "drafter": "d", "output": "o"}
ENGINES = {"backend", "max_batch", "device", "compute_capabilities", "workspace"}
ENGINES |= {"version_compatible", "hardware_compatible"}


def test_keywords_are_the_fields() -> None:
    assert list(signature(build).parameters) == [field.name for field in fields(BuildOptions)]
    assert set(OPTIONS) == {field.name for field in fields(BuildOptions)} - {"progress"}
    assert REQUIRED == ("target", "drafter", "output")


def test_each_option_is_on_the_command_line() -> None:
    parameters = [each for each in main.commands["build"].params if isinstance(each, click.Option)]
    assert {each.name for each in parameters} == {*OPTIONS, *ENGINES, "recipe"}
    assert [each.name for each in parameters if not each.help] == []


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("--num-draft-tokens 0", {"num_draft_tokens": 0}),
        ("--no-fused", {"fused": False}),
        ("--int8-weight-only --quantize-head", {"quantize": "int8-weight-only", "quantize_head": "int8"}),
        ("--quantize-head int4 --quantize-block 64", {"quantize_head": "int4", "quantize_block": 64}),
        ("--quantize-drafter", {"quantize_drafter": True}),
        ("--no-measure-quantization", {"measure_quantization": False}),
        ("--chat-template-kwarg a=null", {"chat_template_kwargs": {"a": None}}),
        ("-o o2 --force", {"output": "o2", "force": True}),
    ],
)
def test_what_the_command_line_gives(
    arguments: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recipe whose values they replace; what isn't given isn't named at all."""
    recipe = tmp_path / "pair.yaml"
    recipe.write_text("target: t\ndrafter: d\nfused: true\nquantize_head: false\n")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("dflash_export.exporter.build", lambda **options: calls.append(options))
    CliRunner().invoke(main, ["build", "--recipe", str(recipe), *arguments.split()])
    assert calls[0].pop("progress") is not None
    expected = {**PLACES, "output": tmp_path / "pair", "fused": True, "quantize_head": False}
    assert calls == [{**expected, **given}]
    BuildOptions(**calls[0])


def test_all_wrong_options_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        BuildOptions("", "d", "o", precision="int3", max_seq_len=True, quantize_block=8, quantize_head="fp8")  # type: ignore[arg-type]
    for part in (
        "has 5 problems",
        "target: found '', expected a hub id org/name, or a path",
        "precision: found 'int3', expected one of fp32, fp16, bf16",
        "max_seq_len: found True, expected a whole number of at least 1",
        "quantize_block: found 8, expected one of 16, 32, 64, 128, 256",
        "quantize_head: found 'fp8', expected true or false or int8, int4 or null",
        "what to do: ",
    ):
        assert part in str(caught.value)


def test_provenance_is_the_options_themselves() -> None:
    options = provenance(BuildOptions(**PLACES, calib="prompts/mine.txt", quantize="int4")).options
    assert set(options) == set(OPTIONS) - {*PLACES, "name", "chat_template_kwargs", "force"}
    assert (options["calib"], options["quantize"], options["precision"]) == ("mine.txt", "int4", "fp32")
