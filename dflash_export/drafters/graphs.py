"""The graphs of a drafter: what goes in, what comes out, and the modules behind them (docs/bundle.md)."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.layers import Draft, DrafterLayers, Inject, WindowedDraft, WindowedInject
from dflash_export.graphs.graph import PRECISIONS, GraphTensor, TracedGraph, torch_dtype
from dflash_export.graphs.simple import logits_graph
from dflash_export.graphs.trace import (
    OFFSET,
    START,
    cache_inputs,
    cache_outputs,
    fake_mode,
    rotary_constants,
    rows,
    trace,
)

__all__ = ["trace_drafter"]


def trace_drafter(
    config: DrafterConfig,
    precision: str,
    vocab_size: int,
    traced: Callable[[str], object] = str,
) -> dict[str, TracedGraph]:
    """Graphs ``inject`` and ``draft`` of a drafter, and its own ones (:attr:`DrafterConfig.own_graphs`).

    Parameters are named as in the checkpoint, below ``drafter.``. ``traced(name)`` is called after each
    graph.
    """
    dtype = PRECISIONS[precision]
    # Sums of features overflow fp16 (real ones reach 2e4), so `fc` and its norm never run in it.
    feature_dtype = ir.DataType.FLOAT if precision == "fp16" else dtype
    with fake_mode():
        drafter = DrafterLayers(config, torch_dtype(dtype), torch_dtype(feature_dtype)).eval()
    hidden = config.hidden_size
    caches = cache_inputs(config.num_layers, config.num_key_value_heads, config.head_dim, dtype)
    constants = rotary_constants("drafter.rotary_emb", drafter.rotary_emb)
    place = (START, OFFSET) if config.is_windowed else (START,)
    graphs = {}
    graphs["inject"] = trace(
        (WindowedInject if config.is_windowed else Inject)(drafter),
        [GraphTensor("features", dtype, rows(len(config.feature_layers) * hidden)), *place, *caches],
        cache_outputs(caches),
        constants,
    )
    traced("inject")
    graphs["draft"] = trace(
        (WindowedDraft if config.is_windowed else Draft)(drafter, config.input_embedding_scale),
        [GraphTensor("embeddings", dtype, rows(hidden)), *place, *caches],
        [GraphTensor("hidden", dtype, rows(hidden)), *cache_outputs(caches)],
        constants,
    )
    traced("draft")
    for name, graph in config.kind.graphs(config, drafter, dtype):
        graphs[name] = graph
        traced(name)
    if config.has_logit_transform:
        change = config.output_multiplier, config.final_logit_softcapping
        graphs["draft_logits"] = logits_graph(vocab_size, *change)
        traced("draft_logits")
    return graphs
