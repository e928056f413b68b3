"""The graphs of a target: inputs, outputs, and the module behind them (docs/reference/bundle.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dflash_export.graphs.graph import PRECISIONS, GraphTensor, TracedGraph, torch_dtype
from dflash_export.graphs.operators import ATTENTION, GraphCache, Visibility, interleave, positions
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

__all__ = ["Target", "trace_target"]


class Target(nn.Module):
    """The decoder of a causal LM: hidden states after the final norm, tapped features, caches.

    ``feature_layers`` are 0-based layers whose output is tapped; as in the reference, that is
    ``hidden_states[layer + 1]`` of transformers (which for the last layer is after the norm).
    """

    def __init__(self, decoder: nn.Module, feature_layers: Sequence[int]) -> None:
        super().__init__()
        self.decoder = decoder
        self.feature_layers = tuple(feature_layers)

    def forward(
        self, embeddings: torch.Tensor, start: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states, features, then keys and values per layer."""
        places = positions(start, embeddings)
        cache = GraphCache(start, caches[0::2], caches[1::2])
        out = self.decoder(
            inputs_embeds=embeddings,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
            visibility=Visibility(places, caches[0].shape[2]),
        )
        features = torch.cat([out.hidden_states[layer + 1] for layer in self.feature_layers], dim=-1)
        return out.last_hidden_state, features, *interleave(cache.keys, cache.values)


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
