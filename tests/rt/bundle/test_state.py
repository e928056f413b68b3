"""The list of what a slot keeps: it follows from the models, and every entry that doesn't is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dflash_rt.bundle.contract import slot_state
from dflash_rt.bundle.manifest import StateSpec
from dflash_rt.bundle.read import read_manifest
from dflash_rt.errors import ManifestError
from tests.rt.bundle_maker import caches, manifest_document, tensor

CACHES = ("key.0", "value.0", "key.1", "value.1")


def windowed_document() -> dict[str, Any]:
    """Both layers of the drafter slide, over 16 rows."""
    document = manifest_document()
    document["drafter"]["layer_types"] = ["sliding_attention"] * 2
    for name in ("inject", "draft"):
        document["graphs"][name]["inputs"].append(tensor("offset", "int64", "batch"))
    document["state"][1] |= {"kind": "window", "window": 16}
    return document


def test_caches_of_a_windowed_drafter_are_a_window() -> None:
    manifest = read_manifest(json.dumps(windowed_document()))
    assert manifest.state == slot_state(manifest.target, manifest.drafter)
    assert manifest.state[0].kind == "kv"
    assert manifest.state[1] == StateSpec(
        name="draft", kind="window", graphs=("inject", "draft"), tensors=CACHES, window=16
    )
    assert [each["name"] for each in caches(2)] == list(CACHES)


@pytest.mark.parametrize(
    ("place", "key", "value", "words"),
    [
        (0, "kind", "ssm", ["state[0].kind", "'ssm'", "kv, window"]),
        (1, "kind", "window", ["state[1].kind", "'window'", "'kv'"]),
        (1, "window", 16, ["state[1].window", "16", "None"]),
        (1, "graphs", ["draft"], ["state[1].graphs", "found: draft", "inject, draft"]),
        (0, "tensors", [*CACHES, "key.2"], ["state[0].tensors", "value.2"]),
        (0, "name", "draft", ["state[0].name", "'draft'", "'target'"]),
    ],
)
def test_an_entry_that_does_not_follow_from_the_models(
    place: int, key: str, value: object, words: list[str]
) -> None:
    document = manifest_document()
    document["state"][place][key] = value
    with pytest.raises(ManifestError) as caught:
        read_manifest(json.dumps(document))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_list_of_another_length() -> None:
    document = manifest_document()
    document["state"] = []
    with pytest.raises(ManifestError, match="state is wrong") as caught:
        read_manifest(json.dumps(document))
    assert "0 entries" in str(caught.value)
    assert "2: target, draft" in str(caught.value)
