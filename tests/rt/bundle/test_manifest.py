from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dflash_rt.bundle import manifest as manifest_module
from dflash_rt.bundle.graph_names import REQUIRED_GRAPHS, cache_names, key_name, output_name
from dflash_rt.bundle.manifest import FileRecord, Manifest
from dflash_rt.bundle.read import manifest_json, read_manifest
from dflash_rt.errors import ManifestError
from tests.rt.bundle_maker import (
    OWN_VOCAB,
    dflash2_document,
    manifest_document,
    speculators_document,
    with_draft_logits,
)

DOC = Path(__file__).parents[3] / "docs" / "reference" / "bundle.md"
Document = dict[str, Any]


def read(document: object) -> Manifest:
    return read_manifest(json.dumps(document))


def test_a_valid_manifest_is_read_as_it_is() -> None:
    manifest = read(manifest_document())
    assert manifest.target.num_layers == 3
    assert manifest.drafter.feature_layers == (0, 2)
    assert manifest.drafter.source.revision is None
    assert manifest.graphs["target"].aliases["value.2.out"] == "value.2"
    assert manifest.graphs["embed"].inputs[0].shape == ("batch", "rows")
    assert manifest.files["tokenizer.json"] == FileRecord(0, "0" * 64)
    assert manifest.generation.chat_template_kwargs == {"enable_thinking": False}
    assert manifest.provenance.options["ratio"] == 0.5
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.bos_token is None


COST = {
    "tokens": 512,
    "top1_agreement": 0.97,
    "kl_divergence": 0.002,
    "tokens_per_step_before": 1.5,
    "tokens_per_step": None,
}
QUANTIZATION = {
    "weights": "int4",
    "activations": None,
    "head": "int8",
    "drafter": None,
    "block_size": 32,
    "method": "awq",
    "calibration": {"prompts": 32, "tokens": 2048, "sha256": "a" * 64},
    "bytes": 100,
    "bytes_before": 400,
    "cost": COST,
}


@pytest.mark.parametrize("cost", [COST, None], ids=["measured", "not measured"])
def test_a_quantised_target(cost: dict[str, Any] | None) -> None:
    document = manifest_document()
    document["quantization"] = {**QUANTIZATION, "cost": cost}
    manifest = read(document)
    assert manifest.quantization is not None
    assert dataclasses.asdict(manifest.quantization) == document["quantization"]
    assert read_manifest(manifest_json(manifest)) == manifest


def test_manifest_without_tokenizer_and_with_draft_logits() -> None:
    document = with_draft_logits(manifest_document())
    document["tokenizer"] = None
    manifest = read(document)
    assert manifest.tokenizer is None
    assert set(manifest.graphs) == {*REQUIRED_GRAPHS, "draft_logits"}


def test_objects_are_frozen_and_slotted() -> None:
    manifest = read(manifest_document())
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.name = "other"  # type: ignore[misc]
    assert not hasattr(manifest, "__dict__")


def test_to_json_is_deterministic_and_read_back_equal() -> None:
    manifest = read(manifest_document())
    document = manifest_document()
    document["files"] = dict(reversed(document["files"].items()))
    document = dict(reversed(document.items()))
    other = read(document)
    assert manifest_json(manifest) == manifest_json(other)
    assert read_manifest(manifest_json(manifest)) == manifest
    assert json.loads(manifest_json(manifest)) == manifest_document()


def test_to_json_has_exactly_this_layout() -> None:
    text = manifest_json(read(manifest_document()))
    assert text.startswith('{\n  "format": "dflash-bundle",\n  "format_version": 3,\n  "name": "tiny",\n')
    assert '\n  "limits": {"max_seq_len": 64, "prefill_chunk": 8},\n' in text
    tensor = '{"name": "key.0", "dtype": "float32", "shape": ["batch", 2, "capacity", 4]}'
    assert f"\n        {tensor},\n" in text
    assert text.endswith("}\n")
    assert text.isprintable() is False
    assert "\t" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, ["name", "isn't empty"]),
        ({"precision": "fp8"}, ["precision", "'fp8'"]),
        ({"name": float("nan")}, ["can't be written"]),
        ({"name": b"bytes"}, ["can't be written"]),
    ],
)
def test_to_json_refuses_what_could_not_be_read_back(changes: dict[str, Any], words: list[str]) -> None:
    broken = dataclasses.replace(read(manifest_document()), **changes)
    with pytest.raises(ManifestError) as caught:
        manifest_json(broken)
    assert all(word in str(caught.value) for word in words)


def test_cache_names_go_layer_by_layer() -> None:
    assert cache_names(2) == ("key.0", "value.0", "key.1", "value.1")
    assert output_name(key_name(0)) == "key.0.out"


# --- text that isn't a manifest at all ------------------------------------------------------------------


TEXTS: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["not valid JSON"]),
    "not JSON": ("{'format': 1}", ["not valid JSON", "line 1"]),
    "cut off": (json.dumps(manifest_document())[:-40], ["not valid JSON"]),
    "two documents": ("{} {}", ["not valid JSON", "Extra data"]),
    "NaN": ('{"format": NaN}', ["not valid JSON", "NaN"]),
    "infinity": ('{"format": -Infinity}', ["not valid JSON", "Infinity"]),
    "number out of range": ('{"format": 1e999}', ["not valid JSON", "1e999"]),
    "integer of 5000 digits": (
        '{"format_version": ' + "9" * 5000 + "}",
        ["not valid JSON", "999", "out of range"],
    ),
    "repeated key": ('{"format": "a", "format": "dflash-bundle"}', ["not valid JSON", "'format'", "twice"]),
    "nested too deeply": ("[" * 100_000, ["not valid JSON", "nested too deeply"]),
    "byte order mark": ("\ufeff{}", ["not valid JSON"]),
    "too large": (" " * (16 * 2**20 + 1), ["too large"]),
    "a list": ("[]", ["not the manifest of a DFlash bundle"]),
    "null": ("null", ["not the manifest of a DFlash bundle"]),
    "another format": ('{"format": "gguf"}', ["not the manifest of a DFlash bundle", "'gguf'"]),
    "no format": ("{}", ["not the manifest of a DFlash bundle"]),
    "newer version": ('{"format": "dflash-bundle", "format_version": 4}', ["newer", "upgrade dflash_rt"]),
    "version 1": (
        '{"format": "dflash-bundle", "format_version": 1, "name": "old"}',
        ["format_version 1, which is older", "expected: format_version 3", "build the bundle again"],
    ),
    "older version": ('{"format": "dflash-bundle", "format_version": 0}', ["format_version 0", "build"]),
    "no version": ('{"format": "dflash-bundle"}', ["format_version None", "build"]),
    "version true": ('{"format": "dflash-bundle", "format_version": true}', ["format_version True"]),
    "version 1.0": ('{"format": "dflash-bundle", "format_version": 1.0}', ["format_version 1.0"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_manifest_is_refused(case: str) -> None:
    text, words = TEXTS[case]
    with pytest.raises(ManifestError) as caught:
        read_manifest(text)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "what to do: " in message
    assert len(message) < 1000


# --- one wrong value --------------------------------------------------------------------------------------

DELETE = object()


def put(*path: str | int, value: object) -> Callable[[Document], None]:
    """A change that sets one place of a document, or removes it."""

    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        if value is DELETE:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


def rename(old: str, new: str) -> Callable[[Document], None]:
    """A change that gives a listed file another name, and the first graph that name as its path."""

    def change(document: Document) -> None:
        document["files"][new] = document["files"].pop(old)
        document["graphs"]["embed"]["path"] = new

    return change


def swap_aliases(document: Document) -> None:
    aliases = document["graphs"]["draft"]["aliases"]
    aliases["key.0.out"], aliases["value.0.out"] = "value.0", "key.0"


def alias_of_another_dtype(document: Document) -> None:
    document["graphs"]["inject"]["outputs"][0]["dtype"] = "float16"


CASES: dict[str, tuple[Callable[[Document], None], list[str]]] = {
    # keys
    "unknown key": (put("extra", value=1), ["extra", "unknown key"]),
    "unknown nested key": (put("target", "rope", value=1), ["target.rope", "unknown key", "hidden_size"]),
    "unknown key with escapes": (put("\x1b[2J", value=1), [r"\x1b", "unknown key"]),
    "missing key": (put("limits", value=DELETE), ["limits", "no such key"]),
    "missing nullable key": (put("tokenizer", value=DELETE), ["tokenizer", "no such key"]),
    "missing nested key": (put("drafter", "block_size", value=DELETE), ["drafter.block_size", "no such key"]),
    # types
    "bool as int": (put("limits", "max_seq_len", value=True), ["limits.max_seq_len", "True", "an integer"]),
    "float as int": (put("limits", "max_seq_len", value=64.0), ["limits.max_seq_len", "64.0", "an integer"]),
    "string as int": (put("target", "hidden_size", value="16"), ["target.hidden_size", "'16'", "an integer"]),
    "int as bool": (put("target", "tie_word_embeddings", value=1), ["tie_word_embeddings", "true or false"]),
    "null where not allowed": (put("name", value=None), ["name", "None"]),
    "list as object": (put("limits", value=[1]), ["limits", "a list of 1", "an object"]),
    "object as list": (put("drafter", "feature_layers", value={}), ["feature_layers", "0 keys", "a list"]),
    "files as list": (put("files", value=[]), ["files", "an object"]),
    "wrong list item": (put("drafter", "feature_layers", 1, value="2"), ["drafter.feature_layers[1]", "'2'"]),
    "object as scalar": (put("provenance", "options", "x", value={}), ["provenance.options['x']", "0 keys"]),
    # limits of values
    "zero limit": (put("limits", "prefill_chunk", value=0), ["limits.prefill_chunk", "found", "from 1"]),
    "huge limit": (put("limits", "max_seq_len", value=2**40), ["limits.max_seq_len", "2147483647"]),
    "huge layer count": (put("target", "num_layers", value=10**9), ["target.num_layers", "1024"]),
    "negative size": (put("files", "embed.onnx", "size", value=-1), ["files['embed.onnx'].size", "-1"]),
    "long string": (put("name", value="x" * 5000), ["name", "4096 characters"]),
    "escape in a string": (put("name", value="a\x1b]0;owned\x07"), ["name", "control characters"]),
    "unpaired surrogate": (put("name", value="\ud800"), ["name", "control characters"]),
    "upper-case hash": (put("files", "embed.onnx", "sha256", value="A" * 64), ["sha256", "hexadecimal"]),
    "short hash": (put("files", "embed.onnx", "sha256", value="a" * 63), ["sha256", "64"]),
    "hash and newline": (put("files", "embed.onnx", "sha256", value="a" * 64 + "\n"), ["sha256", "64"]),
    "unknown precision": (put("precision", value="int4"), ["precision", "'int4'", "fp32, fp16, bf16"]),
    "unknown quantisation": (
        put("quantization", value={**QUANTIZATION, "method": "gptq"}),
        ["quantization.method", "'gptq'", "rtn"],
    ),
    "calibrated on nothing": (
        put("quantization", value={**QUANTIZATION, "calibration": None}),
        ["quantization.calibration", "method rtn"],
    ),
    "blocks beside rounded activations": (
        put("quantization", value={**QUANTIZATION, "weights": "int8", "activations": "int8"}),
        ["quantization.block_size", "null with activations"],
    ),
    "weights and activations of two kinds": (
        put("quantization", value={**QUANTIZATION, "activations": "fp8", "block_size": None}),
        ["quantization.activations", "int4"],
    ),
    "a block that no kernel takes": (
        put("quantization", value={**QUANTIZATION, "block_size": 48}),
        ["quantization.block_size", "48", "16, 32, 64, 128, 256"],
    ),
    "more than all tokens agree": (
        put("quantization", value={**QUANTIZATION, "cost": {**COST, "top1_agreement": 1.5}}),
        ["quantization.cost.top1_agreement", "1.5"],
    ),
    "unknown drafter kind": (put("drafter", "kind", value="eagle"), ["drafter.kind", "dflash-v1"]),
    "unknown source kind": (put("target", "source", "kind", value="ftp"), ["target.source.kind", "gguf"]),
    "unknown dtype": (put("graphs", "embed", "inputs", 0, "dtype", value="int32"), ["dtype", "'int32'"]),
    "unknown axis": (put("graphs", "embed", "inputs", 0, "shape", 0, value="b"), ["shape[0]", "batch"]),
    "negative axis": (put("graphs", "embed", "inputs", 0, "shape", 0, value=-1), ["shape[0]", "-1"]),
    "local time": (put("provenance", "created", value="2026-11-23T12:00:00"), ["created", "UTC"]),
    "impossible date": (put("provenance", "created", value="2026-13-23T12:00:00Z"), ["created", "exist"]),
    # paths
    "parent path": (rename("embed.onnx", "../embed.onnx"), ["../embed.onnx", "relative"]),
    "parent inside": (rename("embed.onnx", "a/../../b"), ["a/../../b", "relative"]),
    "only dots": (rename("embed.onnx", ".."), ["graphs['embed'].path", "relative"]),
    "absolute path": (rename("embed.onnx", "/etc/passwd"), ["/etc/passwd", "relative"]),
    "home path stays a name": (put("tokenizer", "path", value="~/t.json"), ["tokenizer.path", "listed"]),
    "drive": (rename("embed.onnx", "C:embed.onnx"), ["C:embed.onnx", "relative"]),
    "backslash": (rename("embed.onnx", "..\\embed.onnx"), ["embed.onnx", "relative"]),
    "NUL": (rename("embed.onnx", "embed.onnx\x00.txt"), [r"\x00", "relative"]),
    "newline at the end": (rename("embed.onnx", "embed.onnx\n"), [r"\n", "relative"]),
    "dot part": (rename("embed.onnx", "./embed.onnx"), ["./embed.onnx", "relative"]),
    "empty part": (rename("embed.onnx", "a//b"), ["a//b", "relative"]),
    "trailing slash": (rename("embed.onnx", "a/"), ["a/", "relative"]),
    "empty path": (rename("embed.onnx", ""), ["graphs['embed'].path", "relative"]),
    "endless path": (rename("embed.onnx", "a/" * 600 + "b"), ["graphs['embed'].path", "relative"]),
    "source path": (put("target", "source", "files", "../x", value=None), ["target.source.files", "../x"]),
    "manifest lists itself": (rename("embed.onnx", "manifest.json"), ["manifest.json", "neither"]),
    "lists a report": (rename("embed.onnx", "reports/a.json"), ["reports/a.json", "neither"]),
    "lists an engine": (rename("embed.onnx", "engines/a/b"), ["engines/a/b", "neither"]),
    "graph not listed": (put("files", "draft.onnx", value=DELETE), ["graphs.draft.path", "listed in files"]),
    "fused form not listed": (
        put("graphs", "target", "fused", value="f.onnx"),
        ["graphs.target.fused", "listed in files"],
    ),
    "fused form of another graph": (
        put("graphs", "draft", "fused", value="tokenizer.json"),
        ["graphs.draft.fused", "null: only the target"],
    ),
    "fused form is the graph": (
        put("graphs", "target", "fused", value="target.onnx"),
        ["target.onnx", "twice"],
    ),
    "tokenizer not listed": (put("tokenizer", "path", value="t.json"), ["tokenizer.path", "listed"]),
    "template not listed": (put("tokenizer", "chat_template", value="t"), ["chat_template", "listed"]),
    "two graphs in a file": (put("graphs", "draft", "path", value="embed.onnx"), ["embed.onnx", "twice"]),
    # the drafter and the defaults
    "block of 1": (put("drafter", "block_size", value=1), ["drafter.block_size", "from 2"]),
    "mask outside": (put("drafter", "mask_token_id", value=32), ["mask_token_id", "below target.vocab_size"]),
    "tap outside": (put("drafter", "feature_layers", 1, value=3), ["drafter.feature_layers[1]", "0 to 2"]),
    "negative tap": (put("drafter", "feature_layers", 0, value=-1), ["drafter.feature_layers[0]", "-1"]),
    "tap twice": (put("drafter", "feature_layers", 1, value=0), ["drafter.feature_layers[1]", "0 again"]),
    "no taps": (put("drafter", "feature_layers", value=[]), ["drafter.feature_layers", "at least one"]),
    "layer types": (put("drafter", "layer_types", value=["full_attention"]), ["layer_types", "2 drafter"]),
    "unknown layer type": (
        put("drafter", "layer_types", 0, value="conv"),
        ["drafter.layer_types[0]", "conv"],
    ),
    "causality": (put("drafter", "layer_is_causal", value=[True] * 3), ["layer_is_causal", "3 entries"]),
    "no window": (put("drafter", "sliding_window", value=None), ["sliding_window", "sliding_attention"]),
    "drafts below 0": (
        put("generation", "num_draft_tokens", value=-1),
        ["generation.num_draft_tokens", "from 0"],
    ),
    "drafts over block": (
        put("generation", "num_draft_tokens", value=4),
        ["num_draft_tokens", "block_size - 1, which is 3"],
    ),
    "stop id outside": (put("generation", "stop_token_ids", value=[2, 32]), ["stop_token_ids[1]", "32"]),
    "stop id twice": (put("generation", "stop_token_ids", value=[2, 2]), ["stop_token_ids[1]", "twice"]),
    # the graphs
    "no inject": (put("graphs", "inject", value=DELETE), ["graphs.inject", "no such graph"]),
    "unknown graph": (put("graphs", "verify", value={}), ["verify", "one of embed, target"]),
    "no start": (put("graphs", "draft", "inputs", 1, value=DELETE), ["graphs.draft.inputs", "no start"]),
    "no cache": (put("graphs", "target", "inputs", 7, value=DELETE), ["graphs.target.inputs", "no value.2"]),
    "unknown tensor": (put("graphs", "embed", "outputs", 0, "name", value="x"), ["embed.outputs[0]", "'x'"]),
    "tensor twice": (put("graphs", "target", "inputs", 1, "name", value="key.0"), ["'key.0' again"]),
    "wrong width": (
        put("graphs", "inject", "inputs", 0, "shape", 2, value=48),
        ["graphs.inject.inputs[0] (features).shape", "[batch, rows, 48]", "[batch, rows, 32]"],
    ),
    "wrong rank": (
        put("graphs", "lm_head", "outputs", 1, "shape", value=["batch"]),
        ["(token_ids).shape", "[batch]", "[batch, rows]"],
    ),
    "static capacity": (
        put("graphs", "target", "inputs", 2, "shape", 2, value=64),
        ["(key.0).shape", "[batch, 2, 64, 4]", "capacity"],
    ),
    "half-precision logits": (
        put("graphs", "lm_head", "outputs", 0, "dtype", value="float16"),
        ["(logits).dtype", "float16", "float32"],
    ),
    "dtypes don't meet": (
        put("graphs", "embed", "outputs", 0, "dtype", value="float16"),
        ["dtype of embeddings", "float16, as embed gives it"],
    ),
    "no alias": (put("graphs", "target", "aliases", "key.1.out", value=DELETE), ["aliases", "no key.1.out"]),
    "alias to nothing": (put("graphs", "draft", "aliases", "key.0.out", value="key.9"), ["key.0", "'key.9'"]),
    "alias of nothing": (put("graphs", "draft", "aliases", "x", value="key.0"), ["aliases.x", "'key.0'"]),
    "crossed aliases": (swap_aliases, ["key.0.out", "'value.0'", "its own input"]),
    "alias of a row tensor": (
        put("graphs", "draft", "aliases", "hidden", value="embeddings"),
        ["aliases.hidden", "'embeddings'"],
    ),
    "alias of another dtype": (alias_of_another_dtype, ["graphs.inject.aliases", "another dtype"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_manifest_is_refused_with_its_path(case: str) -> None:
    change, words = CASES[case]
    document = manifest_document()
    change(document)
    with pytest.raises(ManifestError) as caught:
        read(document)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "what to do: " in message
    assert re.search("[\x00-\x09\x0b-\x1f\x7f]", message) is None, "a message must not control a terminal"


# --- other kinds of drafter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [speculators_document, dflash2_document])
def test_other_kinds_of_drafter(make: Callable[[], Document]) -> None:
    manifest = read(make())
    assert read_manifest(manifest_json(manifest)) == manifest


KIND_CASES: dict[str, tuple[Callable[[], Document], Callable[[Document], None], list[str]]] = {
    "a head that is too large": (
        speculators_document,
        put("drafter", "vocab_size", value=33),
        ["drafter.vocab_size", "33", "at most target.vocab_size, which is 32"],
    ),
    "another head's size": (
        speculators_document,
        put("drafter", "vocab_size", value=OWN_VOCAB - 1),
        ["graphs.draft_lm_head.outputs[0] (logits).shape", "[batch, rows, 20]"],
    ),
    "no head": (
        speculators_document,
        put("graphs", "draft_lm_head", value=DELETE),
        ["graphs.draft_lm_head", "no such graph"],
    ),
    "no embedding": (
        speculators_document,
        put("graphs", "draft_embed", value=DELETE),
        ["graphs.draft_embed", "no such graph"],
    ),
    "a selector where there is none": (
        speculators_document,
        put("drafter", "selector_top_k", value=3),
        ["drafter.selector_top_k", "null for the others"],
    ),
    "a transform beside an own head": (
        lambda: with_draft_logits(speculators_document()),
        lambda document: None,
        ["graphs.draft_logits", "kind speculators"],
    ),
    "dtypes don't meet": (
        speculators_document,
        put("graphs", "draft_embed", "outputs", 0, "dtype", value="float16"),
        ["dtype of embeddings", "float16, as draft_embed gives it"],
    ),
    "v1 with a head of its own": (
        manifest_document,
        put("drafter", "vocab_size", value=20),
        ["drafter.vocab_size", "target.vocab_size, which is 32"],
    ),
    "v1 from the anchor": (
        manifest_document,
        put("drafter", "samples_from_anchor", value=True),
        ["drafter.samples_from_anchor", "dflash-v1 doesn't"],
    ),
    "v1 with a selector": (
        lambda: {**dflash2_document(), "drafter": manifest_document()["drafter"]},
        lambda document: None,
        ["graphs.select", "kind dflash-v1"],
    ),
    "v2 without candidates": (
        dflash2_document,
        put("drafter", "selector_top_k", value=None),
        ["drafter.selector_top_k", "candidates for kind dflash-v2"],
    ),
    "more candidates than tokens": (
        dflash2_document,
        put("drafter", "selector_top_k", value=33),
        ["drafter.selector_top_k", "at most drafter.vocab_size, which is 32"],
    ),
    "another number of candidates": (
        dflash2_document,
        put("drafter", "selector_top_k", value=4),
        ["graphs.select.outputs[1] (candidates).shape", "[batch, rows, 4]"],
    ),
    "v2 without a selector": (
        dflash2_document,
        put("graphs", "select", value=DELETE),
        ["graphs.select", "no such graph", "select"],
    ),
}


@pytest.mark.parametrize("case", KIND_CASES)
def test_what_fits_no_kind_of_drafter_is_refused(case: str) -> None:
    make, change, words = KIND_CASES[case]
    document = make()
    change(document)
    with pytest.raises(ManifestError) as caught:
        read(document)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("value", [1, -0.1, 100.1, True, None, "1.0"])
def test_sampling_defaults_are_numbers_in_their_range(value: object) -> None:
    document = manifest_document()
    document["generation"]["sampling"]["temperature"] = value
    with pytest.raises(ManifestError) as caught:
        read(document)
    assert "generation.sampling.temperature" in str(caught.value)
    assert "a number from 0 to 100" in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    document = manifest_document()
    document["name"] = 7
    document["extra"] = None
    del document["target"]["head_dim"]
    document["drafter"]["feature_layers"][0] = "x"
    with pytest.raises(ManifestError) as caught:
        read(document)
    message = str(caught.value)
    assert "4 problems" in message
    for path in ("name", "extra", "target.head_dim", "drafter.feature_layers[0]"):
        assert f"\n  {path}: found " in message


def test_rules_between_fields_are_reported_together_too() -> None:
    document = manifest_document()
    document["drafter"]["mask_token_id"] = 99
    document["generation"]["num_draft_tokens"] = 8
    del document["files"]["draft.onnx"]
    with pytest.raises(ManifestError, match="3 problems"):
        read(document)


def test_many_problems_are_counted_and_not_all_printed() -> None:
    document = manifest_document()
    document.update({f"extra{i}": i for i in range(500)})
    with pytest.raises(ManifestError) as caught:
        read(document)
    message = str(caught.value)
    assert "500 problems" in message
    assert "and 480 more" in message
    assert message.count("\n") < 30


# --- docs/reference/bundle.md ---


def annotation_text(annotation: Any) -> str:
    """An annotation in the words of docs/reference/bundle.md."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return annotation_text(args[0])
    if origin is typing.Literal:
        return "string"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(annotation_text(arg) for arg in args)
    if origin is tuple:
        return f"list of {annotation_text(args[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object of {annotation_text(args[1])}"
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return names.get(annotation) or f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def limits(annotation: Any) -> list[str]:
    """What docs/reference/bundle.md must say about the values of an annotation."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [f"`{value}`" for value in args]
    if origin is typing.Annotated:
        checks = args[1:]
        bounds = [f"{check.low} to {check.high}" for check in checks if hasattr(check, "low")]
        return bounds + [
            f"`{value}`" for check in checks if hasattr(check, "values") for value in check.values
        ]
    return [text for arg in args if arg is not Ellipsis for text in limits(arg)]


def documented_tables() -> dict[str, list[list[str]]]:
    """Class name -> rows of the table under the heading of that name."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in DOC.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
        elif line.startswith("| `"):
            tables.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


CLASSES: list[Any] = [
    item
    for name in manifest_module.__all__
    if dataclasses.is_dataclass(item := getattr(manifest_module, name))
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: str(cls.__name__))
def test_the_spec_documents_every_field_type_and_limit(cls: type) -> None:
    rows = documented_tables()[cls.__name__]
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    assert [row[0] for row in rows] == [f"`{name}`" for name in names]
    for name, (_, kind, meaning) in zip(names, rows, strict=True):
        assert kind == annotation_text(hints[name]), name
        for limit in limits(hints[name]):
            assert limit in meaning, (name, limit)


def test_the_spec_documents_nothing_else() -> None:
    assert set(documented_tables()) == {cls.__name__ for cls in CLASSES}
