"""Makes small valid manifests and bundle folders for tests; their graphs are ONNX files that hold nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash_rt.bundle.folder import hash_file

HIDDEN, VOCAB, HEADS, HEAD_DIM, BLOCK = 16, 32, 2, 4, 4
FEATURE_LAYERS = [0, 2]
OWN_VOCAB, CANDIDATES = 20, 3
SOURCE = {
    "kind": "hub",
    "id": "someone/model",
    "revision": "0123abc",
    "files": {"config.json": {"size": 12, "sha256": "a" * 64}},
}


def tensor(name: str, dtype: str, *shape: str | int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def rows(name: str, width: int) -> dict[str, Any]:
    return tensor(name, "float32", "batch", "rows", width)


def caches(layers: int, suffix: str = "") -> list[dict[str, Any]]:
    return [
        tensor(f"{kind}.{i}{suffix}", "float32", "batch", HEADS, "capacity", HEAD_DIM)
        for i in range(layers)
        for kind in ("key", "value")
    ]


def graph(path: str, inputs: list[Any], outputs: list[Any], layers: int = 0) -> dict[str, Any]:
    return {
        "path": path,
        "fused": None,
        "inputs": inputs + caches(layers),
        "outputs": outputs + caches(layers, ".out"),
        "aliases": {f"{kind}.{i}.out": f"{kind}.{i}" for i in range(layers) for kind in ("key", "value")},
    }


def state(name: str, graphs: list[str], layers: int, window: int | None = None) -> dict[str, Any]:
    tensors = [f"{kind}.{i}" for i in range(layers) for kind in ("key", "value")]
    kind = "kv" if window is None else "window"
    return {"name": name, "kind": kind, "graphs": graphs, "tensors": tensors, "window": window}


def manifest_document() -> dict[str, Any]:
    """A valid manifest as parsed JSON: 3 target layers, 2 drafter layers (one sliding), with a tokenizer."""
    start = tensor("start", "int64", "batch")
    ids = tensor("token_ids", "int64", "batch", "rows")
    features = rows("features", HIDDEN * len(FEATURE_LAYERS))
    graphs = {
        "embed": graph(
            "embed.onnx", [tensor("input_ids", "int64", "batch", "rows")], [rows("embeddings", HIDDEN)]
        ),
        "target": graph(
            "target.onnx", [rows("embeddings", HIDDEN), start], [rows("hidden", HIDDEN), features], 3
        ),
        "lm_head": graph("lm_head.onnx", [rows("hidden", HIDDEN)], [rows("logits", VOCAB), ids]),
        "inject": graph("inject.onnx", [features, start], [], 2),
        "draft": graph("draft.onnx", [rows("embeddings", HIDDEN), start], [rows("hidden", HIDDEN)], 2),
    }
    files = [f"{name}.onnx" for name in graphs] + [
        "data/weights.bin",
        "tokenizer.json",
        "chat_template.jinja",
    ]
    document = {
        "format": "dflash-bundle",
        "format_version": 3,
        "name": "tiny",
        "precision": "fp32",
        "quantization": None,
        "limits": {"max_seq_len": 64, "prefill_chunk": 8},
        "target": {
            "source": SOURCE,
            "model_type": "llama",
            "num_layers": 3,
            "hidden_size": HIDDEN,
            "vocab_size": VOCAB,
            "num_key_value_heads": HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
        "drafter": {
            "source": {**SOURCE, "kind": "folder", "id": "drafter", "revision": None},
            "kind": "dflash-v1",
            "num_layers": 2,
            "num_key_value_heads": HEADS,
            "head_dim": HEAD_DIM,
            "block_size": BLOCK,
            "mask_token_id": 31,
            "feature_layers": FEATURE_LAYERS,
            "layer_types": ["full_attention", "sliding_attention"],
            "layer_is_causal": [False, True],
            "sliding_window": 16,
            "vocab_size": VOCAB,
            "samples_from_anchor": False,
            "selector_top_k": None,
        },
        "graphs": graphs,
        "state": [state("target", ["target"], 3), state("draft", ["inject", "draft"], 2)],
        "tokenizer": {
            "path": "tokenizer.json",
            "chat_template": "chat_template.jinja",
            "bos_token": None,
            "eos_token": "</s>",
        },
        "generation": {
            "stop_token_ids": [2],
            "num_draft_tokens": 2,
            "chat_template_kwargs": {"enable_thinking": False},
            "sampling": {
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            },
        },
        "provenance": {
            "created": "2026-11-23T12:00:00Z",
            "tool": "dflash-export 0.1.0",
            "packages": {"torch": "2.13.0"},
            "options": {"precision": "fp32", "max_seq_len": 64, "force": False, "ratio": 0.5, "name": None},
        },
        "files": {name: {"size": 0, "sha256": "0" * 64} for name in files},
    }
    return copy.deepcopy(document)  # parts of it appear in more than one place


def with_draft_logits(document: dict[str, Any]) -> dict[str, Any]:
    """The same with the optional graph ``draft_logits``."""
    ids = tensor("token_ids", "int64", "batch", "rows")
    document["graphs"]["draft_logits"] = graph(
        "draft_logits.onnx", [rows("logits", VOCAB)], [rows("logits.out", VOCAB), ids]
    )
    document["files"]["draft_logits.onnx"] = {"size": 0, "sha256": "0" * 64}
    return document


def speculators_document() -> dict[str, Any]:
    """One with a drafter in the speculators format: an embedding and a head of its own."""
    document = manifest_document()
    ids = tensor("token_ids", "int64", "batch", "rows")
    document["drafter"] |= {"kind": "speculators", "vocab_size": OWN_VOCAB, "samples_from_anchor": True}
    document["graphs"] |= {
        "draft_embed": graph(
            "draft_embed.onnx", [tensor("input_ids", "int64", "batch", "rows")], [rows("embeddings", HIDDEN)]
        ),
        "draft_lm_head": graph(
            "draft_lm_head.onnx", [rows("hidden", HIDDEN)], [rows("logits", OWN_VOCAB), ids]
        ),
    }
    return _listed(document, "draft_embed.onnx", "draft_lm_head.onnx")


def dflash2_document() -> dict[str, Any]:
    """One with a DFlash 2 drafter, which chooses among candidates."""
    document = manifest_document()
    document["drafter"] |= {"kind": "dflash-v2", "selector_top_k": CANDIDATES}
    inputs = [
        rows("hidden", HIDDEN),
        rows("logits", VOCAB),
        tensor("anchors", "int64", "batch"),
        tensor("temperature", "float32", "batch"),
        tensor("uniforms", "float32", "batch", "rows"),
    ]
    outputs = [
        tensor("token_ids", "int64", "batch", "rows"),
        tensor("candidates", "int64", "batch", "rows", CANDIDATES),
        rows("probabilities", CANDIDATES),
    ]
    document["graphs"]["select"] = graph("select.onnx", inputs, outputs)
    return _listed(document, "select.onnx")


def _listed(document: dict[str, Any], *names: str) -> dict[str, Any]:
    document["files"] |= {name: {"size": 0, "sha256": "0" * 64} for name in names}
    return copy.deepcopy(document)


def content(name: str, *locations: str) -> bytes:
    """What :func:`write_bundle` puts into a file; a graph is one that takes weights from ``locations``."""
    text = f"content of {name}\n".encode()
    if not name.endswith(".onnx"):
        return text
    tensors = [_field(13, _field(1, b"location") + _field(2, place.encode())) for place in locations]
    graph = b"".join(_field(5, tensor) for tensor in tensors)
    return _field(2, text) + (_field(7, graph) if graph else b"")


def _field(number: int, value: bytes) -> bytes:
    """A protobuf field that has its own length, which is less than 128."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def write_bundle(
    folder: Path, document: dict[str, Any] | None = None, locations: Mapping[str, str] | None = None
) -> Path:
    """Write a bundle folder: every listed file holds its own name; sizes and hashes are filled in.

    ``locations`` are the files that graphs take weights from, by the graph's file.
    """
    document = manifest_document() if document is None else document
    for name in document["files"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        places = [] if locations is None or name not in locations else [locations[name]]
        path.write_bytes(content(name, *places))
        record = hash_file(path)
        document["files"][name] = {"size": record.size, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
