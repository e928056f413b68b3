"""The plans of every kind of drafter: what they read was given to them or written before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dflash_rt.bundle.contract import drafter_of
from dflash_rt.bundle.manifest import Manifest
from dflash_rt.bundle.read import read_manifest
from dflash_rt.drafters import DRAFTERS
from dflash_rt.drafters.base import CheckFinite, CopyRows, GraphRun
from tests.rt.bundle_maker import (
    BLOCK,
    dflash2_document,
    manifest_document,
    speculators_document,
    with_draft_logits,
)

GIVEN = {"draft_ids", "anchors", "start", "temperature", "uniforms"}


def masked_anchor() -> dict[str, Any]:
    document = speculators_document()
    document["drafter"]["samples_from_anchor"] = False
    return document


DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "block": manifest_document,
    "block that changes logits": lambda: with_draft_logits(manifest_document()),
    "selector": dflash2_document,
    "selector that changes logits": lambda: with_draft_logits(dflash2_document()),
    "own vocabulary": masked_anchor,
    "own vocabulary, from the anchor": speculators_document,
}


def manifest_of(name: str) -> Manifest:
    return read_manifest(json.dumps(DOCUMENTS[name]()))


def test_every_kind_has_a_document_here() -> None:
    assert {manifest_of(name).drafter.kind for name in DOCUMENTS} == set(DRAFTERS)


@pytest.mark.parametrize("drafts", range(1, BLOCK))
@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_read_before_it_is_written(name: str, drafts: int) -> None:
    manifest = manifest_of(name)
    drafter = drafter_of(manifest)
    kept = {tensor for state in manifest.state for tensor in state.tensors}
    rows = {buffer: drafter.rows(drafts) for buffer in GIVEN}
    rows["uniforms"] = drafts
    for step in drafter.step(drafts):
        if isinstance(step, GraphRun):
            spec = manifest.graphs[step.graph]
            for tensor in spec.inputs:
                if tensor.name not in kept and "rows" in tensor.shape:
                    assert rows[step.buffer(tensor.name)] == step.rows, (step, tensor.name)
                elif tensor.name not in kept:
                    assert step.buffer(tensor.name) in GIVEN
            rows |= {step.buffer(tensor.name): step.rows for tensor in spec.outputs}
        elif isinstance(step, CopyRows):
            assert rows[step.source] == step.source_rows == step.begin + step.rows
            rows[step.target] = step.rows
        else:
            assert rows[step.buffer] == step.rows
    assert rows["drafted"] == drafts
    if drafter.samples:
        assert rows["candidates"] == rows["probabilities"] == drafts


@pytest.mark.parametrize("name", DOCUMENTS)
def test_logits_that_choose_are_checked(name: str) -> None:
    step = drafter_of(manifest_of(name)).step(2)
    (check,) = [each for each in step if isinstance(each, CheckFinite)]
    changed = "changes logits" in name
    assert check.buffer == ("draft_logits.out" if changed else "draft_logits")


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("block", (("embed", 3), ("draft", 3), ("lm_head", 2))),
        ("block that changes logits", (("embed", 3), ("draft", 3), ("lm_head", 2), ("draft_logits", 2))),
        ("selector", (("embed", 3), ("draft", 3), ("lm_head", 2), ("select", 2))),
        ("own vocabulary", (("draft_embed", 3), ("draft", 3), ("draft_lm_head", 2))),
        ("own vocabulary, from the anchor", (("draft_embed", 2), ("draft", 2), ("draft_lm_head", 2))),
    ],
)
def test_the_graphs_of_a_step_and_their_rows(name: str, graphs: tuple[tuple[str, int], ...]) -> None:
    assert drafter_of(manifest_of(name)).graphs(2) == graphs
