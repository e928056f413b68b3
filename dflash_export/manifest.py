"""The manifest of a bundle that has just been written."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

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
    target = _target_info(pair.facts, pair.target)
    drafter = _drafter_info(pair.drafter_config, pair.drafter)
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


def _target_info(facts: TargetFacts, source: Source) -> TargetInfo:
    return TargetInfo(
        source=_source_info(source),
        model_type=facts.model_type,
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        num_key_value_heads=facts.num_key_value_heads,
        head_dim=facts.head_dim,
        max_position_embeddings=facts.max_position_embeddings,
        tie_word_embeddings=facts.tie_word_embeddings,
    )


def _drafter_info(config: DrafterConfig, source: Source) -> DrafterInfo:
    return DrafterInfo(
        source=_source_info(source),
        kind=config.kind.name,
        num_layers=config.num_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        block_size=config.block_size,
        mask_token_id=config.mask_token_id,
        feature_layers=config.feature_layers,
        layer_types=config.layer_types,  # type: ignore[arg-type]  # checked by drafter_config
        layer_is_causal=config.layer_is_causal,
        sliding_window=config.sliding_window,
        vocab_size=config.vocab_size if config.draft_vocab_size is None else config.draft_vocab_size,
        samples_from_anchor=config.samples_from_anchor,
        selector_top_k=config.kind.selector_top_k,
    )


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
