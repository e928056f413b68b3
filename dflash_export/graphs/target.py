"""The graphs of a target: what goes in, what comes out, and the module behind them (docs/bundle.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM

from dflash_export.graphs.graph import PRECISIONS, GraphTensor, TracedGraph, torch_dtype
from dflash_export.graphs.modules import Target
from dflash_export.graphs.operators import ATTENTION
from dflash_export.graphs.simple import embed_graph, head_graph
from dflash_export.graphs.trace import (
    START,
    cache_inputs,
    cache_outputs,
    fake_mode,
    rotary_constants,
    rows,
    trace,
)
from dflash_export.targets.config import target_facts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["trace_target"]


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
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype)).eval()  # type: ignore[no-untyped-call]
    facts = target_facts(config)
    hidden, vocab = facts.hidden_size, facts.vocab_size
    caches = cache_inputs(facts.num_layers, facts.num_key_value_heads, facts.head_dim, dtype)
    graphs = {"embed": embed_graph(vocab, hidden, dtype)}
    traced("embed")
    graphs["target"] = trace(
        Target(model.model, feature_layers),
        [GraphTensor("embeddings", dtype, rows(hidden)), START, *caches],
        [
            GraphTensor("hidden", dtype, rows(hidden)),
            GraphTensor("features", dtype, rows(len(feature_layers) * hidden)),
            *cache_outputs(caches),
        ],
        rotary_constants("decoder.rotary_emb", model.model.rotary_emb),
    )
    traced("target")
    graphs["lm_head"] = head_graph(vocab, hidden, dtype)
    traced("lm_head")
    return graphs
