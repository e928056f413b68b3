"""From a Hugging Face pair to a bundle."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import read_drafter_config
from dflash_export.errors import ExportError, RecipeError
from dflash_export.graphs.drafter import trace_drafter
from dflash_export.graphs.fuse_ort import fuse_target
from dflash_export.graphs.graph import PRECISIONS, TracedGraph
from dflash_export.graphs.step import step_graphs
from dflash_export.graphs.target import trace_target
from dflash_export.options import check_options
from dflash_export.pairing.pair import require_pair
from dflash_export.progress import SILENT, Progress
from dflash_export.publish import check_output, new_folder
from dflash_export.quantize.calibrate import calibrate_target, check_calibration
from dflash_export.quantize.calibration import CALIBRATION_FILE, Folding
from dflash_export.quantize.cost import QUALITY_TOKENS, measure_cost, quality_prompts
from dflash_export.quantize.plan import make_plan
from dflash_export.sources.config_reader import Findings, raise_together
from dflash_export.sources.open import open_weights
from dflash_export.sources.resolve import Source, resolve_drafter, resolve_target
from dflash_export.sources.tokenizer import TokenizerFiles, export_tokenizer
from dflash_export.sources.weights import Weights
from dflash_export.targets.config import (
    TargetFacts,
    load_target_config,
    sampling_defaults,
    stop_token_ids,
    target_facts,
)
from dflash_export.weights.plan import write_weights
from dflash_rt import Bundle
from dflash_rt.bundle.folder import hash_file
from dflash_rt.bundle.graph_names import output_name
from dflash_rt.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DrafterInfo,
    FileRecord,
    GenerationDefaults,
    GraphSpec,
    Limits,
    Manifest,
    Provenance,
    SourceInfo,
    TargetInfo,
    TensorSpec,
    TokenizerSpec,
)
from dflash_rt.bundle.read import manifest_json
from dflash_rt.errors import OutputError
from dflash_rt.files import utc_now
from dflash_rt.text.prompts import PromptEncoder
from dflash_rt.text.tokenizer import Tokenizer
from dflash_rt.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["build"]

_PACKAGES = ("gguf", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers", "torch", "transformers")
# What makes the fused target, if one of them is installed. Both fill the same folder.
_OPTIONAL_PACKAGES = ("onnxruntime", "onnxruntime-gpu")

# Rows of one prefill pass. A mixture of experts gathers the weights of every (row, expert) pair.
_PREFILL_CHUNK, _PREFILL_CHUNK_MOE = 256, 16


def build(
    target: str | os.PathLike[str],
    drafter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    max_seq_len: int | None = None,
    prefill_chunk: int | None = None,
    draft_width: int | None = None,
    fused: bool = True,
    quantize: str | None = None,
    quantize_block: int | None = None,
    quantize_head: bool | str | None = None,
    quantize_drafter: bool | None = None,
    calib: str | os.PathLike[str] | None = None,
    calib_limit: int | None = None,
    calib_tokens: int | None = None,
    measure_quantization: bool | None = None,
    measure_tokens: int | None = None,
    target_revision: str | None = None,
    drafter_revision: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a target and its DFlash drafter to a bundle.

    The models are never loaded whole: graphs are traced without weights, then each tensor is streamed from
    the checkpoint to its place in the bundle. The output appears when everything is on disk, or not at all.

    Args:
        target: hub id, folder with config.json and safetensors, or a ``.gguf`` file.
        drafter: hub id or folder of a DFlash or DFlash 2 drafter in z-lab's format, or of a DFlash drafter in
            the speculators format.
        output: folder to make; its parents are made too.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``: dtype of weights, activations and caches.
        max_seq_len: most tokens of prompt and output; default: what both models were made for.
        prefill_chunk: rows of one prefill pass at most, up to ``max_seq_len``; default 256, or 16 for a
            mixture of experts, or ``max_seq_len`` where that is less.
        draft_width: rows of a verify pass at most unless a user says otherwise, anchor included; default
            ``block_size``.
        fused: hold the target once more in operators of ONNX Runtime, for its CPU backend, where they can
            say what the target does (docs/reference/bundle.md); no target gets another form because of it.
        quantize: ``"int4"``, ``"int8"``, ``"fp8"``, ``"int8-weight-only"`` or ``"int4-rtn"``: how the
            target's linear layers are computed (docs/guide/quantize.md).
        quantize_block: inputs that share a scale; default: what fits.
        quantize_head: store the LM head in ``"int8"`` (or True) or ``"int4"`` blocks as well; default: no.
        quantize_drafter: store the drafter's linear layers but ``fc`` in int8; default: no.
        calib: file of prompts that the target answers to be calibrated; default: built-in ones.
        calib_limit: prompts that are answered at most; default 32.
        calib_tokens: tokens of an answer at most; default 48.
        measure_quantization: load the target in PyTorch and measure what quantisation changed; default: yes.
        measure_tokens: length of each of the eight answers that this is measured over, at most; default 32.
        target_revision: branch, tag or commit of a hub id. Refused for local files.
        drafter_revision: the same for the drafter.
        chat_template_kwargs: defaults for the chat template, such as ``{"enable_thinking": False}``.
        name: the bundle's name; default: the name of ``output``.
        force: replace an existing bundle.
        progress: where stages are reported; default: nowhere.

    Raises:
        OutputError: the output exists, can't be written, or the disk is full.
        SourceError, CheckpointError: a model can't be found or read.
        UnsupportedModelError: a model would not be exported faithfully.
        PairError: target and drafter don't belong together; lists every problem.
        RecipeError: an option is out of range, or what calibrates isn't installed.
        PromptError: ``calib`` can't be used.
    """
    progress = progress or SILENT
    check_options(
        target=target,
        drafter=drafter,
        output=output,
        name=name,
        precision=precision,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        draft_width=draft_width,
        fused=fused,
        quantize=quantize,
        quantize_block=quantize_block,
        quantize_head=quantize_head,
        quantize_drafter=quantize_drafter,
        calib=calib,
        calib_limit=calib_limit,
        calib_tokens=calib_tokens,
        measure_quantization=measure_quantization,
        measure_tokens=measure_tokens,
        target_revision=target_revision,
        drafter_revision=drafter_revision,
        chat_template_kwargs=chat_template_kwargs,
    )
    plan = make_plan(
        quantize,
        quantize_block,
        head=quantize_head,
        drafter=quantize_drafter,
        measure=measure_quantization,
        measure_tokens=measure_tokens,
        calib=None if calib is None else os.fspath(calib),
        calib_limit=calib_limit,
        calib_tokens=calib_tokens,
    )
    if plan is not None:
        check_calibration(plan)
    output = Path(os.path.abspath(output))
    check_output(output, force=force)
    with progress.stage("checking the pair"):
        target_source = resolve_target(target, revision=target_revision)
        drafter_source = resolve_drafter(drafter, revision=drafter_revision)
        config, drafter_config, findings = _read_configs(target_source, drafter_source)
        facts = target_facts(config)
        limits = _limits(facts, drafter_config, config, max_seq_len, prefill_chunk)
        measured_tokens = _measured_tokens(measure_tokens, limits)
        stop_ids = stop_token_ids(target_source, config)
        width = _draft_width(draft_width, drafter_config.block_size, findings)
    with (
        open_weights(target_source, config) as target_weights,
        open_weights(drafter_source) as drafter_weights,
        new_folder(output, force=force) as folder,
    ):
        with progress.stage("reading the tokenizer"):
            tokenizer = export_tokenizer(target_source, folder)
        with progress.stage("checking the weights"):
            require_pair(
                config,
                target_weights,
                drafter_config,
                drafter_weights,
                tokenizer_size=tokenizer.size if tokenizer else None,
                chat_template=tokenizer.chat_template if tokenizer else None,
                chat_template_kwargs=chat_template_kwargs,
                max_seq_len=limits.max_seq_len,
                findings=findings,
            )
            _check_disk(folder, target_weights, drafter_weights, precision)
        with progress.stage("tracing graphs", total=5 + len(drafter_config.own_graphs)) as stage:
            graphs = {
                **trace_target(config, drafter_config.feature_layers, precision, lambda _: stage.advance()),
                **trace_drafter(drafter_config, precision, facts.vocab_size, lambda _: stage.advance()),
            }
        unquantised, calibrated, folded = graphs, None, Folding()
        if plan is not None:
            encoder = _encoder(folder, tokenizer, chat_template_kwargs)
            repeats = facts.num_attention_heads != facts.num_key_value_heads
            plan.apply(graphs, None, repeats_values=repeats)  # refuses now what can't be quantised
            calibrated = calibrate_target(
                plan,
                plan.target_form(graphs),
                target_source,
                encoder,
                facts.vocab_size,
                limits.max_seq_len,
                stop_ids,
                progress,
            )
            if calibrated is not None:
                calibrated.layers.save(folder / CALIBRATION_FILE)
            layers = None if calibrated is None else calibrated.layers
            graphs, folded = plan.apply(graphs, layers, repeats_values=repeats)
        write_weights(
            folder,
            graphs,
            facts,
            drafter_config,
            target_weights,
            drafter_weights,
            progress,
            folded=folded,
            calibration=None if calibrated is None else calibrated.layers,
        )
        graphs = graphs | step_graphs(facts.vocab_size, drafter_config.draft_vocab_size or facts.vocab_size)
        max_rows = limits.max_seq_len + drafter_config.block_size
        specs = _write_graphs(folder, graphs, max_rows, fused=fused)
        text = None if calibrated is None else calibrated.text
        quantization = None if plan is None else plan.info(unquantised, graphs, text)
        if plan is not None and quantization is not None and plan.measure:
            room = max(1, limits.max_seq_len - measured_tokens)
            cost = measure_cost(
                folder,
                target_source,
                drafter_source,
                quality_prompts(encoder, facts.vocab_size, room),
                quantization=quantization,
                width=width,
                new_tokens=measured_tokens,
                stop_token_ids=stop_ids,
                progress=progress,
            )
            quantization = replace(quantization, cost=cost)
        with progress.stage("hashing files"):
            manifest = Manifest(
                format="dflash-bundle",
                format_version=FORMAT_VERSION,
                name=name or output.name,
                precision=precision,  # type: ignore[arg-type]  # checked above
                quantization=quantization,
                limits=limits,
                target=_target_info(facts, target_source),
                drafter=_drafter_info(drafter_config, drafter_source),
                graphs=specs,
                tokenizer=_tokenizer_spec(tokenizer),
                generation=GenerationDefaults(
                    stop_token_ids=stop_ids,
                    num_draft_tokens=width - 1,
                    chat_template_kwargs=dict(chat_template_kwargs or {}),
                    sampling=sampling_defaults(target_source),
                ),
                provenance=_provenance(
                    precision=precision,
                    max_seq_len=max_seq_len,
                    prefill_chunk=prefill_chunk,
                    draft_width=draft_width,
                    fused=fused,
                    quantize=quantize,
                    quantize_block=quantize_block,
                    quantize_head=quantize_head,
                    quantize_drafter=quantize_drafter,
                    calib=None if calib is None else Path(calib).name,
                    calib_limit=calib_limit,
                    calib_tokens=calib_tokens,
                    measure_quantization=measure_quantization,
                    measure_tokens=measure_tokens,
                    target_revision=target_revision,
                    drafter_revision=drafter_revision,
                ),
                files=_records(folder),
            )
        _write_text(folder / MANIFEST_NAME, manifest_json(manifest))
    return Bundle.open(output)


def _read_configs(target: Source, drafter: Source) -> tuple[PreTrainedConfig, DrafterConfig, Findings]:
    """Both configs. What is wrong with the drafter's is reported with what is wrong with the pair; there is
    nothing to compare only where one of the two is of no use at all.
    """
    drafter_config, findings = read_drafter_config(drafter)
    try:
        config = load_target_config(target)
    except ExportError as error:
        raise_together([error, *findings.errors])
        raise
    if drafter_config is None:
        raise_together(findings.errors)
    assert drafter_config is not None
    return config, drafter_config, findings


def _limits(
    facts: TargetFacts,
    drafter: DrafterConfig,
    config: PreTrainedConfig,
    max_seq_len: int | None,
    prefill_chunk: int | None,
) -> Limits:
    is_moe = getattr(config, "num_experts", None) is not None
    if max_seq_len is None:
        max_seq_len = min(facts.max_position_embeddings, drafter.max_position_embeddings)
    if prefill_chunk is None:
        prefill_chunk = min(_PREFILL_CHUNK_MOE if is_moe else _PREFILL_CHUNK, max_seq_len)
    elif prefill_chunk > max_seq_len:
        raise RecipeError(
            "prefill_chunk is out of range",
            found=prefill_chunk,
            expected=f"at most max_seq_len, {max_seq_len}",
            remedy="choose a smaller one, or leave it out",
        )
    return Limits(max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)


def _draft_width(draft_width: int | None, block_size: int, findings: Findings) -> int:
    if draft_width is None or "block_size" in findings.wrong:  # the export won't go on then
        return block_size
    if draft_width > block_size:
        raise RecipeError(
            "draft_width is out of range",
            found=draft_width,
            expected=f"1 (no drafting) to the drafter's block_size, {block_size}",
            remedy="choose a width in that range; a drafter can't draft wider than it was trained for",
        )
    return draft_width


def _measured_tokens(wanted: int | None, limits: Limits) -> int:
    """Tokens of an answer that quantisation is measured over; at least one row is left for the prompt."""
    if wanted is None:
        return max(1, min(QUALITY_TOKENS, limits.max_seq_len - 1))
    if wanted >= limits.max_seq_len:
        raise RecipeError(
            "measure_tokens is out of range",
            found=wanted,
            expected=f"less than max_seq_len, {limits.max_seq_len}: the prompt needs room, too",
            remedy="choose a smaller number",
        )
    return wanted


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
    folder: Path, graphs: Mapping[str, TracedGraph], max_rows: int, *, fused: bool
) -> dict[str, GraphSpec]:
    """Write every graph, and with ``fused`` that form of the target; no pass goes beyond ``max_rows``."""
    specs = {}
    for name, graph in graphs.items():
        path, fused_path = folder / f"{name}.onnx", folder / f"{name}.fused.onnx"
        _save(path, graph.model)
        model = fuse_target(graph, max_rows) if fused and name == "target" else None
        if model is not None:
            _save(fused_path, model)
        specs[name] = _graph_spec(path.name, None if model is None else fused_path.name, graph)
    return specs


def _save(path: Path, model: ir.Model) -> None:
    """Write a graph and check what was written."""
    try:
        onnx.save(ir.serde.serialize_model(model), path)
    except OSError as error:
        raise OutputError(
            f"can't write {path}",
            found=error.strerror or error,
            expected="a writable folder with room for the bundle",
            remedy="free disk space or choose another output; nothing was left behind",
        ) from error
    # By path, so that the checker also follows the pointers into the data files.
    onnx.checker.check_model(path, full_check=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _records(folder: Path) -> dict[str, FileRecord]:
    return {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _source_info(source: Source) -> SourceInfo:
    files = {name: FileRecord(record.size, record.sha256) for name, record in source.files().items()}
    return SourceInfo(kind=source.kind, id=source.id, revision=source.revision, files=files)


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
        kind=config.kind,
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
        selector_top_k=None if config.selector is None else config.selector.top_k,
    )


def _encoder(
    folder: Path, files: TokenizerFiles | None, template_kwargs: Mapping[str, Any] | None
) -> PromptEncoder:
    if files is None:
        return PromptEncoder()
    return PromptEncoder(
        tokenizer=Tokenizer(folder / files.path),
        chat_template=files.chat_template,
        bos_token=files.bos_token,
        eos_token=files.eos_token,
        template_kwargs=template_kwargs or {},
    )


def _tokenizer_spec(files: TokenizerFiles | None) -> TokenizerSpec | None:
    if files is None:
        return None
    return TokenizerSpec(
        path=files.path,
        chat_template=files.chat_template_path,
        bos_token=files.bos_token,
        eos_token=files.eos_token,
    )


def _graph_spec(path: str, fused: str | None, graph: TracedGraph) -> GraphSpec:
    inputs = tuple(_tensor_spec(value) for value in graph.model.graph.inputs)
    outputs = tuple(_tensor_spec(value) for value in graph.model.graph.outputs)
    names = {tensor.name for tensor in outputs}
    aliases = {
        output_name(tensor.name): tensor.name
        for tensor in inputs
        if "capacity" in tensor.shape and output_name(tensor.name) in names
    }
    return GraphSpec(path=path, fused=fused, inputs=inputs, outputs=outputs, aliases=aliases)


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)  # type: ignore[arg-type]


def _provenance(**options: str | int | None) -> Provenance:
    return Provenance(
        created=utc_now(),
        tool=f"dflash-export {__version__}",
        packages={package: importlib.metadata.version(package) for package in _PACKAGES}
        | {package: version for package in _OPTIONAL_PACKAGES if (version := _version(package))},
        options=options,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
