"""Streaming of weights into the data files that the graphs of a bundle point into.

One tensor at a time goes from the checkpoint to its place on disk, so an export needs memory for a few
tensors, not for a model. A tensor that several graphs use is written once: they store the same offset.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from dflash_export.drafters.config import DrafterConfig
from dflash_export.graphs.graph import StoredWeight, TracedGraph, torch_dtype
from dflash_export.pairing.read import Pair
from dflash_export.progress import Progress
from dflash_export.publish import writing
from dflash_export.quantize.calibration import Folding
from dflash_export.quantize.formats import pack_int4, quantize
from dflash_export.quantize.graph_pass import CODES
from dflash_export.quantize.plan import Quantized
from dflash_export.sources.weights import Weights
from dflash_export.targets.config import TargetFacts

__all__ = ["DataFile", "LoadParameter", "write_weights"]

LoadParameter = Callable[[str, torch.dtype], torch.Tensor]

# Large tensors start on a page, so that a runtime can map them; small ones need only SIMD alignment.
_PAGE, _SMALL, _LARGE_BYTES = 4096, 64, 1 << 20


class DataFile:
    """A data file being written. Not safe for use after an error: the whole export is discarded then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[StoredWeight, tuple[int, int]] = {}
        self._scales: dict[StoredWeight, torch.Tensor] = {}  # of codes that were just written
        with writing(path):
            self._file = path.open("xb")

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # of the same full disk, and the first error says more
                self._file.close()
            return
        with writing(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def fill(
        self,
        graph: TracedGraph,
        load: LoadParameter,
        advance: Callable[[int], None],
        costs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the weights of ``graph`` that aren't here yet, and point its initializers at them.

        ``load(parameter, dtype)`` gives the data of a parameter of the traced module. ``advance`` is told the
        bytes written. ``costs`` say by name of a quantised weight what a squared error costs, ``[in]``.
        """
        for name, weight in graph.weights.items():
            if weight not in self._places:
                self._places[weight] = self._append(self._tensor(name, weight, graph, load, costs or {}))
                advance(self._places[weight][1])
            offset, length = self._places[weight]
            graph.model.graph.initializers[name].const_value = ir.ExternalTensor(
                self.path.name, offset, length, weight.dtype, shape=ir.Shape(weight.shape), name=name
            )

    def _tensor(
        self,
        name: str,
        weight: StoredWeight,
        graph: TracedGraph,
        load: LoadParameter,
        costs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        if weight.form is None:
            tensor = _joined(weight.parameters, torch_dtype(weight.dtype), load)
            return _checked(tensor.T if weight.transpose else tensor, weight)
        if weight.is_scale:
            return self._scales.pop(weight)
        # Codes are chosen for their scales: both come from one pass, and the scales are written next.
        (scale,) = (w for w in graph.weights.values() if w.is_scale and w.parameters == weight.parameters)
        codes, scales = quantize(
            _joined(weight.parameters, torch.float32, load),
            weight.form,
            torch_dtype(scale.dtype),
            costs.get(name.removesuffix(CODES)),
        )
        self._scales[scale] = _checked(scales.t(), scale)
        codes = _checked(codes.T, weight)
        return pack_int4(codes) if weight.dtype == ir.DataType.INT4 else codes

    def _append(self, tensor: torch.Tensor) -> tuple[int, int]:
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        boundary = _PAGE if data.nbytes >= _LARGE_BYTES else _SMALL
        with writing(self.path):
            offset = -(-self._file.tell() // boundary) * boundary
            self._file.seek(offset)
            self._file.write(data.data)
        return offset, data.nbytes


def _joined(parameters: Sequence[str], dtype: torch.dtype, load: LoadParameter) -> torch.Tensor:
    parts = [load(name, dtype) for name in parameters]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _checked(tensor: torch.Tensor, weight: StoredWeight) -> torch.Tensor:
    if tuple(tensor.shape) != weight.shape:
        raise AssertionError(f"{weight.parameters}: loaded {tuple(tensor.shape)}, traced {weight.shape}")
    return tensor


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
    layers = quantized.calibration.layers
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
