"""From a Hugging Face pair to a bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from dflash_export.drafters.graphs import trace_drafter
from dflash_export.graphs.fuse_ort import fuse_target
from dflash_export.graphs.graph import PRECISIONS, TracedGraph
from dflash_export.graphs.simple import step_graphs
from dflash_export.graphs.target import trace_target
from dflash_export.manifest import graph_spec, make_manifest
from dflash_export.options import BuildOptions, taking
from dflash_export.pairing.pair import check_pair, require_pair
from dflash_export.pairing.read import Pair, read_pair
from dflash_export.progress import SILENT, Progress
from dflash_export.publish import check_output, new_folder, writing
from dflash_export.quantize.cost import measure_cost
from dflash_export.quantize.plan import Quantized, check_calibration, make_plan, quantize_target
from dflash_export.sources.resolve import open_weights
from dflash_export.sources.tokenizer import TokenizerFiles, export_tokenizer
from dflash_export.sources.weights import Weights
from dflash_export.weights import write_weights
from dflash_rt import Bundle
from dflash_rt.bundle.manifest import MANIFEST_NAME, GraphSpec
from dflash_rt.bundle.read import manifest_json
from dflash_rt.errors import OutputError
from dflash_rt.text.prompts import PromptEncoder

__all__ = ["build"]


@taking(BuildOptions)
def build(options: BuildOptions) -> Bundle:
    """Export a target and its DFlash drafter to a bundle: ``build(target, drafter, output, ...)``.

    The arguments are the fields of :class:`~dflash_export.options.BuildOptions`. The models are never loaded
    whole: graphs are traced without weights, then each tensor is streamed from the checkpoint to its place in
    the bundle. The output appears when everything is on disk, or not at all.

    Raises:
        OutputError: the output exists, can't be written, or the disk is full.
        SourceError, CheckpointError: a model can't be found or read.
        UnsupportedModelError: a model would not be exported faithfully.
        PairError: target and drafter don't belong together; lists every problem.
        RecipeError: an option is wrong, or what calibrates isn't installed.
        PromptError: ``calib`` can't be used.
    """
    progress = options.progress or SILENT
    output = Path(os.path.abspath(options.output))
    plan = make_plan(options)
    if plan is not None:
        check_calibration(plan)
    check_output(output, force=options.force)
    with progress.stage("checking the pair"):
        pair = read_pair(options)
    with (
        open_weights(pair.target, pair.config) as target_weights,
        open_weights(pair.drafter) as drafter_weights,
        new_folder(output, force=options.force) as folder,
    ):
        with progress.stage("reading the tokenizer"):
            tokenizer = export_tokenizer(pair.target, folder)
        with progress.stage("checking the weights"):
            _check_weights(pair, target_weights, drafter_weights, tokenizer, options)
            _check_disk(folder, target_weights, drafter_weights, options.precision)
        quantized = Quantized(_trace(pair, options.precision, progress))
        if plan is not None:
            template_kwargs = options.chat_template_kwargs or {}
            encoder = tokenizer.encoder(folder, template_kwargs) if tokenizer else PromptEncoder()
            quantized = quantize_target(plan, quantized.graphs, pair, encoder, folder, progress)
        write_weights(folder, quantized, pair, target_weights, drafter_weights, progress)
        specs = _write_graphs(folder, quantized.graphs, pair, fused=options.fused)
        quantization = quantized.info
        if plan is not None and plan.measure and quantization is not None:
            cost = measure_cost(folder, pair, encoder, quantization, progress)
            quantization = replace(quantization, cost=cost)
        with progress.stage("hashing files"):
            manifest = make_manifest(options, pair, tokenizer, specs, quantization, folder)
        (folder / MANIFEST_NAME).write_text(manifest_json(manifest), encoding="utf-8", newline="\n")
    return Bundle.open(output)


def _check_weights(
    pair: Pair, target: Weights, drafter: Weights, tokenizer: TokenizerFiles | None, options: BuildOptions
) -> None:
    problems = check_pair(
        pair.config,
        target,
        pair.drafter_config,
        drafter,
        tokenizer_size=tokenizer.size if tokenizer else None,
        chat_template=tokenizer.chat_template if tokenizer else None,
        chat_template_kwargs=options.chat_template_kwargs,
        max_seq_len=pair.limits.max_seq_len,
        findings=pair.findings,
    )
    require_pair(problems, pair.findings)


def _trace(pair: Pair, precision: str, progress: Progress) -> dict[str, TracedGraph]:
    drafter = pair.drafter_config
    with progress.stage("tracing graphs", total=5 + len(drafter.own_graphs)) as stage:
        return {
            **trace_target(pair.config, drafter.feature_layers, precision, lambda _: stage.advance()),
            **trace_drafter(drafter, precision, pair.facts.vocab_size, lambda _: stage.advance()),
        }


def _check_disk(folder: Path, target: Weights, drafter: Weights, precision: str) -> None:
    width = PRECISIONS[precision].itemsize
    numbers = sum(torch.Size(w.shape(n)).numel() for w in (target, drafter) for n in w.names())
    free = shutil.disk_usage(folder).free
    if free < numbers * width:
        raise OutputError(
            "the disk is too full for the bundle",
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{numbers * width / 1e9:.2f} GB",
            remedy="free disk space or choose another output",
        )


def _write_graphs(
    folder: Path, traced: Mapping[str, TracedGraph], pair: Pair, *, fused: bool
) -> dict[str, GraphSpec]:
    """Write every graph, those between the models' as well, and with ``fused`` that form of the target."""
    vocab_size = pair.facts.vocab_size
    graphs = {**traced, **step_graphs(vocab_size, pair.drafter_config.draft_vocab_size or vocab_size)}
    max_rows = pair.limits.max_seq_len + pair.drafter_config.block_size  # no pass goes beyond
    specs = {}
    for name, graph in graphs.items():
        path, fused_path = folder / f"{name}.onnx", folder / f"{name}.fused.onnx"
        _save(path, graph.model)
        model = fuse_target(graph, max_rows) if fused and name == "target" else None
        if model is not None:
            _save(fused_path, model)
        specs[name] = graph_spec(path.name, None if model is None else fused_path.name, graph)
    return specs


def _save(path: Path, model: ir.Model) -> None:
    """Write a graph and check what was written."""
    with writing(path):
        onnx.save(ir.serde.serialize_model(model), path)
    # By path, so that the checker also follows the pointers into the data files.
    onnx.checker.check_model(path, full_check=True)
