"""The manifest of a bundle that has just been written."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dflash_export.drafters.config import DrafterConfig
from dflash_export.graphs.graph import TracedGraph
from dflash_export.options import OPTIONS, BuildOptions
from dflash_export.pairing.read import Pair
from dflash_export.sources.resolve import Source
from dflash_export.sources.tokenizer import TokenizerFiles
from dflash_export.targets.config import TargetFacts, sampling_defaults
from dflash_rt.bundle.contract import slot_state, state_tensors
from dflash_rt.bundle.folder import hash_file
from dflash_rt.bundle.graph_names import output_name
from dflash_rt.bundle.manifest import (
    FORMAT_VERSION,
    DrafterInfo,
    GenerationDefaults,
    GraphSpec,
    Manifest,
    Provenance,
    QuantizationInfo,
    SourceInfo,
    TargetInfo,
    TensorSpec,
)
from dflash_rt.files import utc_now
from dflash_rt.version import __version__

__all__ = ["graph_spec", "make_manifest", "provenance"]


def make_manifest(
    options: BuildOptions,
    pair: Pair,
    tokenizer: TokenizerFiles | None,
    graphs: Mapping[str, GraphSpec],
    quantization: QuantizationInfo | None,
    folder: Path,
) -> Manifest:
    """The manifest of the files in ``folder``, which are hashed."""
    config = pair.drafter_config
    target = TargetInfo(source=_source_info(pair.target), **_fields(TargetInfo, pair.facts))
    of_drafter = {
        **_fields(DrafterInfo, config),
        "kind": config.kind.name,
        "vocab_size": config.draft_vocab_size or config.vocab_size,
        "selector_top_k": config.kind.selector_top_k,
    }
    drafter = DrafterInfo(source=_source_info(pair.drafter), **of_drafter)
    state = slot_state(target, drafter)
    return Manifest(
        format="dflash-bundle",
        format_version=FORMAT_VERSION,
        name=options.name or Path(options.output).absolute().name,
        precision=options.precision,
        quantization=quantization,
        limits=pair.limits,
        target=target,
        drafter=drafter,
        # What a slot keeps is given back in the same memory.
        graphs={
            name: replace(graph, aliases={output_name(kept): kept for kept in state_tensors(name, state)})
            for name, graph in graphs.items()
        },
        state=state,
        tokenizer=None if tokenizer is None else tokenizer.spec,
        generation=GenerationDefaults(
            stop_token_ids=pair.stop_token_ids,
            num_draft_tokens=pair.num_draft_tokens,
            chat_template_kwargs=dict(options.chat_template_kwargs or {}),
            sampling=sampling_defaults(pair.target),
        ),
        provenance=provenance(options),
        files={
            path.relative_to(folder).as_posix(): hash_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        },
    )


def _source_info(source: Source) -> SourceInfo:
    return SourceInfo(kind=source.kind, id=source.id, revision=source.revision, files=source.files())


def _fields(kind: type[TargetInfo | DrafterInfo], holder: TargetFacts | DrafterConfig) -> dict[str, Any]:
    """What ``holder`` has under the names that the manifest uses."""
    names = [field.name for field in fields(kind) if hasattr(holder, field.name)]
    return {name: getattr(holder, name) for name in names}


def graph_spec(path: str, fused: str | None, graph: TracedGraph) -> GraphSpec:
    """What a manifest says of a graph in the file ``path``, and its other form in ``fused``."""
    inputs = tuple(_tensor_spec(value) for value in graph.model.graph.inputs)
    outputs = tuple(_tensor_spec(value) for value in graph.model.graph.outputs)
    return GraphSpec(path=path, fused=fused, inputs=inputs, outputs=outputs, aliases={})


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)  # type: ignore[arg-type]


_PACKAGES = ("gguf", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers", "torch", "transformers")
# What makes the fused target, if one of them is installed. Both fill the same folder.
_OPTIONAL_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
# Recorded elsewhere in the manifest, or not a property of the bundle.
_NOT_RECORDED = ("target", "drafter", "output", "name", "chat_template_kwargs", "force")


def provenance(options: BuildOptions) -> Provenance:
    """When, by what and with which options a bundle is built. Of a path only the file's name is recorded."""
    recorded = {name: getattr(options, name) for name in OPTIONS if name not in _NOT_RECORDED}
    if options.calib is not None:
        recorded["calib"] = os.path.basename(options.calib)
    return Provenance(
        created=utc_now(),
        tool=f"dflash-export {__version__}",
        packages={package: importlib.metadata.version(package) for package in _PACKAGES}
        | {package: version for package in _OPTIONAL_PACKAGES if (version := _version(package))},
        options=recorded,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
