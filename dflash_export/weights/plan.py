"""Which weights of a pair go into which data file of its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dflash_export.drafters.config import DrafterConfig
from dflash_export.graphs.graph import TracedGraph
from dflash_export.pairing.read import Pair
from dflash_export.progress import Progress
from dflash_export.quantize.calibrate import Quantized
from dflash_export.quantize.calibration import Folding
from dflash_export.sources.weights import Weights
from dflash_export.targets.config import TargetFacts
from dflash_export.weights.data_file import DataFile, LoadParameter

__all__ = ["write_weights"]

_Files = dict[str, list[tuple[str, LoadParameter]]]


def write_weights(
    folder: Path, quantized: Quantized, pair: Pair, target: Weights, drafter: Weights, progress: Progress
) -> None:
    """Stream the weights of all graphs to their files. Matrices that graphs share are in one file, once."""
    graphs = quantized.graphs
    files = {
        **_target_files(pair.facts, graphs, target, quantized.folded),
        **_drafter_files(pair.drafter_config, drafter),
    }
    layers = {} if quantized.calibration is None else quantized.calibration.layers
    costs = {name: layer.rounding_cost for name, layer in layers.items()}
    # A weight that two graphs share is written once.
    distinct = {
        (file_name, weight)
        for file_name, contents in files.items()
        for graph, _ in contents
        for weight in graphs[graph].weights.values()
    }
    total = sum(weight.nbytes for _, weight in distinct)
    with progress.stage("writing weights", total=total) as stage:
        for file_name, contents in files.items():
            with DataFile(folder / file_name) as file:
                for graph, load in contents:
                    file.fill(graphs[graph], load, stage.advance, costs)


def _target_files(
    facts: TargetFacts, graphs: Mapping[str, TracedGraph], target: Weights, folded: Folding
) -> _Files:
    def body(parameter: str, dtype: torch.dtype) -> torch.Tensor:
        name = parameter.replace("decoder.", "model.", 1)
        if parameter not in folded.rows and parameter not in folded.columns:
            return target.load(name, dtype)
        return folded.apply(parameter, target.load(name, torch.float32)).to(dtype)

    tied = facts.tie_word_embeddings
    embedding = _one(target, "model.embed_tokens.weight")
    head = embedding if tied else _one(target, "lm_head.weight")
    # A quantised head has bytes of its own.
    if tied and not any(weight.form for weight in graphs["lm_head"].weights.values()):
        vocabulary: _Files = {"vocabulary.data": [("embed", embedding), ("lm_head", embedding)]}
    else:
        vocabulary = {"embedding.data": [("embed", embedding)], "lm_head.data": [("lm_head", head)]}
    return {"target.data": [("target", body)], **vocabulary}


def _drafter_files(config: DrafterConfig, drafter: Weights) -> _Files:
    def load(parameter: str, dtype: torch.dtype) -> torch.Tensor:
        return config.kind.load(config, drafter, parameter.removeprefix("drafter."), dtype)

    own: _Files = {f"{name}.data": [(name, load)] for name in config.kind.graph_names}
    return {"drafter.data": [("inject", load), ("draft", load)], **own}


def _one(weights: Weights, name: str) -> LoadParameter:
    def load(_: str, dtype: torch.dtype) -> torch.Tensor:
        return weights.load(name, dtype)

    return load
