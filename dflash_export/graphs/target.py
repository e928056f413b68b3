"""The graphs of a bundle: inputs, outputs, and the module behind each (docs/reference/bundle.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dflash_export.drafters.modules import DraftLmHead, Select
from dflash_export.graphs.finish import GraphOutput, TracedGraph, finish_graph
from dflash_export.graphs.modules import (
    Draft,
    DrafterLayers,
    DraftLogits,
    Embed,
    Inject,
    LmHead,
    Target,
    WindowedDraft,
    WindowedInject,
)
from dflash_export.graphs.step import accept_graph, draft_check_graph
from dflash_export.graphs.trace import ATTENTION, GraphInput, emit_operators, fake_mode, trace
from dflash_export.targets.config import target_facts
from dflash_rt.bundle.graph_names import cache_names, output_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dflash_export.drafters.config import DrafterConfig

__all__ = ["PRECISIONS", "step_graphs", "trace_drafter", "trace_target"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
}


def trace_target(
    config: PreTrainedConfig,
    feature_layers: Sequence[int],
    precision: str,
    traced: Callable[[str], object] = str,
) -> dict[str, TracedGraph]:
    """Graphs ``embed``, ``target`` and ``lm_head`` of a supported target.

    Parameters are named as in the transformers model, with ``decoder.`` for ``model.``; the vocabulary
    matrix of ``embed`` and ``lm_head`` is called ``weight``. ``traced(name)`` is called after each graph.
    """
    dtype = PRECISIONS[precision]
    config._attn_implementation = ATTENTION
    if hasattr(config, "num_experts"):
        # The default loops over the experts that were hit: not a graph. This one gathers them.
        config._experts_implementation = "batched_mm"
    with fake_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    facts = target_facts(config)
    hidden, vocab = facts.hidden_size, facts.vocab_size
    caches = _cache_inputs(facts.num_layers, facts.num_key_value_heads, facts.head_dim, dtype)
    graphs = {}
    graphs["embed"] = _trace(
        Embed(model.get_input_embeddings().weight),
        [GraphInput("input_ids", torch.int64, ("batch", "rows"))],
        [_out("embeddings", dtype, *_rows(hidden))],
        keep_layout=True,
    )
    traced("embed")
    graphs["target"] = _trace(
        Target(model.model, feature_layers),
        [GraphInput("embeddings", dtype, _rows(hidden)), _START, *caches],
        [
            _out("hidden", dtype, *_rows(hidden)),
            _out("features", dtype, *_rows(len(feature_layers) * hidden)),
            *_cache_outputs(caches),
        ],
        _rotary_constants("decoder.rotary_emb", model.model.rotary_emb),
    )
    traced("target")
    graphs["lm_head"] = _trace(
        LmHead(model.lm_head.weight, model.lm_head.bias),
        [GraphInput("hidden", dtype, _rows(hidden))],
        [_out("logits", torch.float32, *_rows(vocab)), _out("token_ids", torch.int64, "batch", "rows")],
        keep_layout=True,
    )
    traced("lm_head")
    return graphs


def trace_drafter(
    config: DrafterConfig,
    precision: str,
    vocab_size: int,
    traced: Callable[[str], object] = str,
) -> dict[str, TracedGraph]:
    """Graphs ``inject`` and ``draft`` of a drafter, and its own ones (:attr:`DrafterConfig.own_graphs`).

    Parameters are named as in the checkpoint, below ``drafter.``.
    """
    dtype = PRECISIONS[precision]
    # Sums of features overflow fp16 (real ones reach 2e4), so `fc` and its norm never run in it.
    feature_dtype = torch.float32 if precision == "fp16" else dtype
    with fake_mode():
        drafter = DrafterLayers(config, dtype, feature_dtype).eval()
    hidden = config.hidden_size
    caches = _cache_inputs(config.num_layers, config.num_key_value_heads, config.head_dim, dtype)
    constants = _rotary_constants("drafter.rotary_emb", drafter.rotary_emb)
    place = (_START, _OFFSET) if config.is_windowed else (_START,)
    graphs = {}
    graphs["inject"] = _trace(
        (WindowedInject if config.is_windowed else Inject)(drafter),
        [GraphInput("features", dtype, _rows(len(config.feature_layers) * hidden)), *place, *caches],
        _cache_outputs(caches),
        constants,
    )
    traced("inject")
    graphs["draft"] = _trace(
        (WindowedDraft if config.is_windowed else Draft)(drafter, config.input_embedding_scale),
        [GraphInput("embeddings", dtype, _rows(hidden)), *place, *caches],
        [_out("hidden", dtype, *_rows(hidden)), *_cache_outputs(caches)],
        constants,
    )
    traced("draft")
    if config.draft_vocab_size is not None:
        graphs |= _own_vocabulary(config, config.draft_vocab_size, dtype, traced)
    if config.has_logit_transform:
        logits = torch.float32, "batch", "rows", vocab_size
        graphs["draft_logits"] = _trace(
            DraftLogits(config.output_multiplier, config.final_logit_softcapping),
            [GraphInput("logits", torch.float32, _rows(vocab_size))],
            [_out(output_name("logits"), *logits), _out("token_ids", torch.int64, "batch", "rows")],
        )
        traced("draft_logits")
    if config.selector is not None:
        graphs["select"] = _select(drafter, config, config.selector.top_k, dtype)
        traced("select")
    return graphs


def step_graphs(vocab_size: int, draft_vocab_size: int) -> dict[str, TracedGraph]:
    """Graphs ``accept`` and ``draft_check``, which have no weights and depend on the vocabularies alone."""
    models = {"accept": accept_graph(vocab_size), "draft_check": draft_check_graph(draft_vocab_size)}
    return {name: TracedGraph(ir.serde.deserialize_model(model)) for name, model in models.items()}


def _select(drafter: DrafterLayers, config: DrafterConfig, top_k: int, dtype: torch.dtype) -> TracedGraph:
    float32, int64, rows = torch.float32, torch.int64, ("batch", "rows")
    return _trace(
        Select(drafter.candidate_selector, top_k, config.block_size - 1),
        [
            GraphInput("hidden", dtype, _rows(config.hidden_size)),
            GraphInput("logits", float32, _rows(config.vocab_size)),
            GraphInput("anchors", int64, ("batch",)),
            GraphInput("temperature", float32, ("batch",)),
            GraphInput("uniforms", float32, rows),
        ],
        [
            _out("token_ids", int64, *rows),
            _out("candidates", int64, *_rows(top_k)),
            _out("probabilities", float32, *_rows(top_k)),
        ],
    )


def _own_vocabulary(
    config: DrafterConfig, size: int, dtype: torch.dtype, traced: Callable[[str], object]
) -> dict[str, TracedGraph]:
    """Graphs ``draft_embed``, ``draft_lm_head``. Parameters: ``weight``, and ``target_ids`` of a mapping."""
    hidden = config.hidden_size
    maps = size != config.vocab_size
    with fake_mode():
        embedding = nn.Parameter(torch.empty(config.vocab_size, hidden, dtype=dtype))
        head = nn.Parameter(torch.empty(size, hidden, dtype=dtype))
        ids = nn.Parameter(torch.empty(size, dtype=torch.int64), requires_grad=False) if maps else None
    token_ids = _out("token_ids", torch.int64, "batch", "rows")
    graphs = {}
    graphs["draft_embed"] = _trace(
        Embed(embedding),
        [GraphInput("input_ids", torch.int64, ("batch", "rows"))],
        [_out("embeddings", dtype, *_rows(hidden))],
        keep_layout=True,
    )
    traced("draft_embed")
    graphs["draft_lm_head"] = _trace(
        DraftLmHead(head, ids),
        [GraphInput("hidden", dtype, _rows(hidden))],
        [_out("logits", torch.float32, *_rows(size)), token_ids],
        keep_layout=True,
    )
    traced("draft_lm_head")
    return graphs


_START = GraphInput("start", torch.int64, ("batch",))
_OFFSET = GraphInput("offset", torch.int64, ("batch",))


def _rows(width: int) -> tuple[str | int, ...]:
    return ("batch", "rows", width)


def _out(name: str, dtype: torch.dtype, *shape: str | int) -> GraphOutput:
    return GraphOutput(name, _IR_DTYPES[dtype], shape)


def _cache_inputs(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[GraphInput]:
    return [
        GraphInput(name, dtype, ("batch", kv_heads, "capacity", head_dim)) for name in cache_names(layers)
    ]


def _cache_outputs(caches: Sequence[GraphInput]) -> list[GraphOutput]:
    return [_out(output_name(cache.name), cache.dtype, *cache.shape) for cache in caches]


def _trace(
    module: nn.Module,
    inputs: Sequence[GraphInput],
    outputs: Sequence[GraphOutput],
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    keep_layout: bool = False,
) -> TracedGraph:
    module.eval()
    with emit_operators(module):
        model = trace(module, inputs, [item.name for item in outputs])
    return finish_graph(model, inputs, outputs, constants or {}, keep_layout=keep_layout)


def _rotary_constants(prefix: str, module: nn.Module) -> dict[str, np.ndarray]:
    """Rotary frequencies: the traced module has none, so a real one is made from the same config."""
    real = type(module)(module.config)
    return {f"{prefix}.{name}": buffer.numpy() for name, buffer in real.named_buffers()}
