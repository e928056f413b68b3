"""Outcomes without a run, and a bundle with graphs: what the benchmark's tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from dflash_bench.systems.base import Outcome
from dflash_rt import Bundle
from tests.rt.bundle_maker import manifest_document, write_bundle


class Other:
    """Another project's system: takes its answer from a list, and keeps a diary."""

    def __init__(
        self,
        name: str,
        answer: Sequence[int],
        *,
        num_draft_tokens: int | None = None,
        diary: list[Any] | None = None,
    ) -> None:
        self.name = name
        self.num_draft_tokens = num_draft_tokens
        self.answer = tuple(answer)
        self.diary = [] if diary is None else diary
        self.closed = False

    def decode(self, prompt: Sequence[int], max_new_tokens: int) -> Outcome:
        self.diary.append((self.name, tuple(prompt), max_new_tokens))
        tokens = self.answer[:max_new_tokens]
        return Outcome(tokens, prefill_seconds=0.5, decode_seconds=2.0, steps=len(tokens) - 1)

    def close(self) -> None:
        self.closed = True


def answers(*tokens: tuple[int, ...]) -> dict[tuple[int, int], Outcome]:
    return {(0, i): Outcome(ids, 1.0, 1.0, max(len(ids) - 1, 0)) for i, ids in enumerate(tokens)}


def write_graph(path: Path) -> int:
    """An ONNX file with one tensor inside and two outside; returns their bytes."""
    inside = numpy_helper.from_array(np.arange(10, dtype=np.float32), "inside")
    outside = []
    for name, offset, length in (("big", 0, 4096), ("other", 4096, 800)):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[length // 4])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "x.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        outside.append(tensor)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [10])
    nodes = [helper.make_node("Identity", ["inside"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [output], initializer=[*outside, inside])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return 4096 + 800 + 40


def bundle_with_graphs(folder: Path, **target: Any) -> Bundle:
    """A bundle without a tokenizer whose five graphs have 4,936 bytes of weights each."""
    document = manifest_document()
    document["target"] |= target
    document["tokenizer"] = None
    write_bundle(folder, document)
    manifest = json.loads((folder / "manifest.json").read_text())
    for graph in manifest["graphs"].values():
        write_graph(folder / graph["path"])
        manifest["files"][graph["path"]]["size"] = (folder / graph["path"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)
