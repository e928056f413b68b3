"""Rules between the fields of a manifest, checked once every field is readable by itself."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import chain

from dflash_rt.bundle.contract import expected_tensors, links, slot_state, state_tensors
from dflash_rt.bundle.graph_names import REQUIRED_GRAPHS, STEP_GRAPHS, output_name
from dflash_rt.bundle.manifest import (
    ENGINES_FOLDER,
    MANIFEST_NAME,
    REPORTS_FOLDER,
    GraphSpec,
    Manifest,
    StateSpec,
    TensorSpec,
)
from dflash_rt.bundle.schema import Broken, child, shown
from dflash_rt.drafters import DRAFTERS
from dflash_rt.drafters.base import Tensors

__all__ = ["broken_rules"]

_BLOCK_SIZES = (16, 32, 64, 128, 256)


def broken_rules(manifest: Manifest) -> Iterator[Broken]:
    """Every broken rule of docs/reference/bundle.md."""
    checks = (
        _check_drafter,
        _check_drafter_kind,
        _check_generation,
        _check_quantization,
        _check_provenance,
        _check_files,
        _check_graph_names,
        _check_state,
    )
    yield from chain.from_iterable(check(manifest) for check in checks)
    possible = [name for name in manifest.graphs if name in _possible_graphs(manifest)]
    broken = [each for name in possible for each in _check_graph(name, manifest)]
    yield from broken or _check_links(manifest)


def _check_drafter(manifest: Manifest) -> Iterator[Broken]:
    drafter, num_target_layers = manifest.drafter, manifest.target.num_layers
    if not drafter.feature_layers:
        yield "drafter.feature_layers", "an empty list", "at least one layer"
    for i, layer in enumerate(drafter.feature_layers):
        if layer >= num_target_layers:
            expected = f"a target layer from 0 to {num_target_layers - 1}"
            yield f"drafter.feature_layers[{i}]", str(layer), expected
    yield from _check_unique("drafter.feature_layers", drafter.feature_layers)
    for name, values in (("layer_types", drafter.layer_types), ("layer_is_causal", drafter.layer_is_causal)):
        if len(values) != drafter.num_layers:
            expected = f"one for each of the {drafter.num_layers} drafter layers"
            yield f"drafter.{name}", f"{len(values)} entries", expected
    if "sliding_attention" in drafter.layer_types and drafter.sliding_window is None:
        yield "drafter.sliding_window", "null", "a window, since a layer has sliding_attention"
    yield from _check_token_id("drafter.mask_token_id", drafter.mask_token_id, manifest)


def _check_drafter_kind(manifest: Manifest) -> Iterator[Broken]:
    """Fields that only some kinds of drafter have."""
    drafter, vocab_size = manifest.drafter, manifest.target.vocab_size
    own_vocabulary = DRAFTERS[drafter.kind].has_own_vocabulary
    if drafter.vocab_size > vocab_size or (drafter.vocab_size < vocab_size and not own_vocabulary):
        expected = f"{'at most ' if own_vocabulary else ''}target.vocab_size, which is {vocab_size}"
        yield "drafter.vocab_size", str(drafter.vocab_size), expected
    if drafter.samples_from_anchor and not own_vocabulary:
        expected = f"false: a drafter of kind {drafter.kind} doesn't"
        yield "drafter.samples_from_anchor", "true", expected
    top_k = drafter.selector_top_k
    if (top_k is None) is DRAFTERS[drafter.kind].samples:
        choosing = ", ".join(kind for kind, each in DRAFTERS.items() if each.samples)
        expected = f"candidates for kind {choosing}, and null for the others"
        yield "drafter.selector_top_k", "null" if top_k is None else str(top_k), expected
    elif top_k is not None and top_k > drafter.vocab_size:
        expected = f"at most drafter.vocab_size, which is {drafter.vocab_size}"
        yield "drafter.selector_top_k", str(top_k), expected


def _check_graph_names(manifest: Manifest) -> Iterator[Broken]:
    required = (*REQUIRED_GRAPHS, *DRAFTERS[manifest.drafter.kind].required_graphs)
    for name in required:
        if name not in manifest.graphs:
            yield f"graphs.{name}", "no such graph", "all of " + ", ".join(required)
    for name in manifest.graphs:
        if name not in _possible_graphs(manifest):
            expected = f"none of that name with a drafter of kind {manifest.drafter.kind}"
            yield f"graphs.{name}", "a graph", expected


def _possible_graphs(manifest: Manifest) -> tuple[str, ...]:
    kind = DRAFTERS[manifest.drafter.kind]
    return (*REQUIRED_GRAPHS, *kind.required_graphs, *kind.optional_graphs, *STEP_GRAPHS)


def _check_state(manifest: Manifest) -> Iterator[Broken]:
    """It follows from the models' geometry."""
    expected = slot_state(manifest.target, manifest.drafter)
    if len(manifest.state) != len(expected):
        names = ", ".join(state.name for state in expected)
        yield "state", f"{len(manifest.state)} entries", f"{len(expected)}: {names}"
        return
    for i, (found, wanted) in enumerate(zip(manifest.state, expected, strict=True)):
        for field in fields(StateSpec):
            value, right = getattr(found, field.name), getattr(wanted, field.name)
            if value != right:
                yield f"state[{i}].{field.name}", _listing(value), _listing(right)


def _listing(value: object) -> str:
    return _listed(value) if isinstance(value, tuple) else shown(value)


def _check_generation(manifest: Manifest) -> Iterator[Broken]:
    defaults, block_size = manifest.generation, manifest.drafter.block_size
    for i, token_id in enumerate(defaults.stop_token_ids):
        yield from _check_token_id(f"generation.stop_token_ids[{i}]", token_id, manifest)
    yield from _check_unique("generation.stop_token_ids", defaults.stop_token_ids)
    if defaults.num_draft_tokens >= block_size:
        expected = f"from 0 to drafter.block_size - 1, which is {block_size - 1}"
        yield "generation.num_draft_tokens", str(defaults.num_draft_tokens), expected


def _check_quantization(manifest: Manifest) -> Iterator[Broken]:
    quantization = manifest.quantization
    if quantization is None:
        return
    size, kind = quantization.block_size, quantization.activations
    if size is not None and size not in _BLOCK_SIZES:
        expected = ", ".join(map(str, _BLOCK_SIZES))
        yield "quantization.block_size", str(size), f"one of {expected}"
    if (size is None) is (kind is None):
        expected = "null with activations that are quantised, and a number otherwise"
        yield "quantization.block_size", "null" if size is None else str(size), expected
    if kind is not None and kind != quantization.weights:
        yield "quantization.activations", kind, f"those of the weights, {quantization.weights}, or null"
    if (quantization.calibration is None) is not (quantization.method == "rtn"):
        expected = "null with the method rtn, and what was calibrated on otherwise"
        yield "quantization.calibration", "something else", expected


def _check_token_id(path: str, token_id: int, manifest: Manifest) -> Iterator[Broken]:
    if token_id >= manifest.target.vocab_size:
        expected = f"a token id below target.vocab_size, which is {manifest.target.vocab_size}"
        yield path, str(token_id), expected


def _check_unique(path: str, values: Sequence[object]) -> Iterator[Broken]:
    seen: set[object] = set()
    for i, value in enumerate(values):
        if value in seen:
            yield f"{path}[{i}]", f"{shown(value)} again", "no value twice"
        seen.add(value)


def _check_provenance(manifest: Manifest) -> Iterator[Broken]:
    created = manifest.provenance.created
    try:
        dt.datetime.fromisoformat(created)
    except ValueError:
        yield "provenance.created", shown(created), "a date and time that exist"


def _check_files(manifest: Manifest) -> Iterator[Broken]:
    for path in manifest.files:
        if path == MANIFEST_NAME or path.split("/")[0] in (ENGINES_FOLDER, REPORTS_FOLDER):
            expected = (
                f"neither {MANIFEST_NAME} nor anything in {REPORTS_FOLDER}/ or {ENGINES_FOLDER}/, "
                "which change after the build"
            )
            yield child("files", path), "a listed file", expected
    graph_paths = [path for graph in manifest.graphs.values() for path in (graph.path, graph.fused) if path]
    yield from _check_unique("the paths of graphs", graph_paths)
    for where, path in _used_paths(manifest):
        if path not in manifest.files:
            yield where, shown(path), "a file that is listed in files"


def _used_paths(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, graph in manifest.graphs.items():
        yield f"graphs.{name}.path", graph.path
        if graph.fused is not None:
            yield f"graphs.{name}.fused", graph.fused
    if manifest.tokenizer is not None:
        yield "tokenizer.path", manifest.tokenizer.path
        if manifest.tokenizer.chat_template is not None:
            yield "tokenizer.chat_template", manifest.tokenizer.chat_template


def _check_graph(name: str, manifest: Manifest) -> Iterator[Broken]:
    graph = manifest.graphs[name]
    if graph.fused is not None and name != "target":
        yield f"graphs.{name}.fused", shown(graph.fused), "null: only the target has a fused form"
    inputs, outputs = expected_tensors(name, manifest)
    yield from _check_tensors(f"graphs.{name}.inputs", graph.inputs, inputs)
    yield from _check_tensors(f"graphs.{name}.outputs", graph.outputs, outputs)
    kept = state_tensors(name, slot_state(manifest.target, manifest.drafter))
    yield from _check_aliases(f"graphs.{name}.aliases", graph, kept)


def _check_tensors(path: str, tensors: Sequence[TensorSpec], expected: Tensors) -> Iterator[Broken]:
    names = [tensor.name for tensor in tensors]
    yield from _check_unique(path, names)
    known = set(names)
    missing = [name for name in expected if name not in known]
    if missing:
        yield path, f"no {_listed(missing)}", f"{len(expected)} tensors, one of each"
    wanted = f"one of {_listed(expected)}"
    for i, tensor in enumerate(tensors):
        if tensor.name not in expected:
            yield f"{path}[{i}].name", shown(tensor.name), wanted
            continue
        dtypes, shape = expected[tensor.name]
        where = f"{path}[{i}] ({tensor.name})"
        if tensor.dtype not in dtypes:
            yield f"{where}.dtype", tensor.dtype, " or ".join(dtypes)
        if tensor.shape != shape:
            yield f"{where}.shape", _shape(tensor.shape), _shape(shape)


def _check_aliases(path: str, graph: GraphSpec, kept: Iterable[str]) -> Iterator[Broken]:
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    wanted = {output_name(name): name for name in kept}
    missing = [name for name in wanted if name not in graph.aliases]
    if missing:
        yield path, f"no {_listed(missing)}", "every cache output to share its input's memory"
    for output, source in graph.aliases.items():
        where = child(path, output)
        if output not in outputs or source not in inputs:
            yield where, shown(source), "an output and an input that the graph has"
        elif wanted.get(output) != source:
            yield where, shown(source), "an alias from a cache output to its own input"
        elif (outputs[output].dtype, outputs[output].shape) != (inputs[source].dtype, inputs[source].shape):
            yield where, "another dtype or shape", "those of the input whose memory is shared"


def _check_links(manifest: Manifest) -> Iterator[Broken]:
    """A buffer is handed from graph to graph as it is: the dtypes on both sides must be the same."""
    pairs = list(links(manifest))
    inject = manifest.graphs.get("inject")
    for tensor in inject.outputs if inject is not None else ():
        pairs.append(("inject", tensor.name, "draft", tensor.name.removesuffix(".out")))
    for source, output, destination, name in pairs:
        if source not in manifest.graphs or destination not in manifest.graphs:
            continue
        given = manifest.graphs[source].tensor(output).dtype
        taken = manifest.graphs[destination].tensor(name).dtype
        if given != taken:
            yield f"graphs.{destination}: dtype of {name}", taken, f"{given}, as {source} gives it"


def _shape(shape: Iterable[str | int]) -> str:
    return "[" + ", ".join(str(axis) for axis in shape) + "]"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
