"""The graphs of a drafter: inputs, outputs, and the modules behind them (docs/reference/bundle.md).

The modules follow the DFlash reference (PyPI dflash 0.1.0, ``dflash/model.py``; arXiv 2602.06036, section 4),
cut in two so that context rows and block rows can be written by separate graphs: ``inject`` and ``draft``
hold the same layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from dflash_export.drafters.config import DrafterConfig
from dflash_export.graphs.graph import PRECISIONS, GraphTensor, TracedGraph, torch_dtype
from dflash_export.graphs.operators import Visibility, attention, interleave, positions, rotary, scatter
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
        drafter = _DrafterLayers(config, torch_dtype(dtype), torch_dtype(feature_dtype)).eval()
    hidden = config.hidden_size
    caches = cache_inputs(config.num_layers, config.num_key_value_heads, config.head_dim, dtype)
    constants = rotary_constants("drafter.rotary_emb", drafter.rotary_emb)
    place = (START, OFFSET) if config.is_windowed else (START,)
    graphs = {}
    graphs["inject"] = trace(
        _Inject(drafter),
        [GraphTensor("features", dtype, rows(len(config.feature_layers) * hidden)), *place, *caches],
        cache_outputs(caches),
        constants,
    )
    traced("inject")
    graphs["draft"] = trace(
        _Draft(drafter, config.input_embedding_scale),
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


class _Attention(nn.Module):
    """Projections of one draft layer; parameter names are the checkpoint's."""

    def __init__(self, config: DrafterConfig, layer: int) -> None:
        super().__init__()
        bias = config.attention_bias
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.causal = config.layer_is_causal[layer]
        self.window = config.layer_windows[layer]
        self.window_from_anchor = config.window_from_anchor
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """``[batch, rows, heads · head_dim]`` to ``[batch, rows, heads, head_dim]``."""
        return states.view(*states.shape[:-1], -1, self.head_dim)

    def key_value(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache rows ``[batch, kv_heads, rows, head_dim]`` of ``hidden [batch, rows, hidden]``."""
        key = rotary(self.k_norm(self.heads(self.k_proj(hidden))).transpose(1, 2), cos, sin)
        return key, self.heads(self.v_proj(hidden)).transpose(1, 2)


class _Layer(nn.Module):
    def __init__(self, config: DrafterConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, layer)
        self.mlp = Qwen3MLP(config.to_qwen3_config())  # type: ignore[no-untyped-call]
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for name, module in config.kind.layer_modules(config).items():
            self.add_module(name, module)


class _DrafterLayers(nn.Module):
    """Every parameter of a drafter, but a vocabulary of its own, under its name in the checkpoint.

    ``fc`` and ``hidden_norm`` have ``feature_dtype``: real features reach 2e4, and their sum overflows fp16.
    """

    def __init__(self, config: DrafterConfig, dtype: torch.dtype, feature_dtype: torch.dtype) -> None:
        super().__init__()
        with _default_dtype(feature_dtype):
            self.fc = nn.Linear(
                len(config.feature_layers) * config.hidden_size, config.hidden_size, bias=False
            )
            self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        with _default_dtype(dtype):
            self.layers = nn.ModuleList([_Layer(config, i) for i in range(config.num_layers)])
            self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            for name, module in config.kind.modules(config).items():
                self.add_module(name, module)
        self.rotary_emb = Qwen3RotaryEmbedding(config.to_qwen3_config())
        self.is_windowed = config.is_windowed

    def rotary_table(self, hidden: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[batch, rows, head_dim / 2]``."""
        cos, sin = self.rotary_emb(hidden, places)
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]


class _Graph(nn.Module):
    """What ``inject`` and ``draft`` share. Their caches are keys and values of each layer in turn.

    Where caches hold a window only, the position ``offset [batch]`` of their row 0 comes before them.
    """

    def __init__(self, drafter: _DrafterLayers) -> None:
        super().__init__()
        self.drafter = drafter

    def places(
        self, states: torch.Tensor, start: torch.Tensor, rest: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Rotary positions ``[batch, rows]`` of ``states``, whose rows go to the caches from ``start`` on.

        Also the caches of keys, and those of values.
        """
        if self.drafter.is_windowed:
            start, rest = start + rest[0], rest[1:]
        return positions(start, states), list(rest[0::2]), list(rest[1::2])


class _Inject(_Graph):
    """Write context rows into the draft caches: ``fc → hidden_norm →`` keys and values of every layer."""

    def forward(
        self, features: torch.Tensor, start: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values per draft layer."""
        drafter = self.drafter
        places, keys, values = self.places(features, start, rest)
        context = drafter.hidden_norm(drafter.fc(features.to(drafter.fc.weight.dtype))).to(keys[0].dtype)
        cos, sin = drafter.rotary_table(context, places)
        for i, layer in enumerate(drafter.layers):
            assert isinstance(layer, _Layer)
            key, value = layer.self_attn.key_value(context, cos, sin)
            keys[i], values[i] = scatter(keys[i], key, start), scatter(values[i], value, start)
        return tuple(interleave(keys, values))


class _Draft(_Graph):
    """One pass over a block ``[anchor, mask, …]`` on top of the injected context."""

    def __init__(self, drafter: _DrafterLayers, embedding_scale: float) -> None:
        super().__init__(drafter)
        self.embedding_scale = embedding_scale

    def forward(
        self, embeddings: torch.Tensor, start: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states after the final norm, then keys and values per draft layer."""
        drafter = self.drafter
        places, keys, values = self.places(embeddings, start, rest)
        hidden = embeddings if self.embedding_scale == 1.0 else embeddings * self.embedding_scale
        visibility = Visibility(positions(start, embeddings), keys[0].shape[2])
        cos, sin = drafter.rotary_table(hidden, places)
        for i, layer in enumerate(drafter.layers):
            assert isinstance(layer, _Layer)
            at = layer.self_attn
            normed, finish = _wrapped(layer, "attention_conv", layer.input_layernorm(hidden))
            query = rotary(at.q_norm(at.heads(at.q_proj(normed))).transpose(1, 2), cos, sin)
            key, value = at.key_value(normed, cos, sin)
            keys[i], values[i] = scatter(keys[i], key, start), scatter(values[i], value, start)
            mask = visibility.mask(causal=at.causal, window=at.window, from_first=at.window_from_anchor)
            attended = attention(query, keys[i], values[i], mask, at.scale)
            hidden = hidden + finish(at.o_proj(attended.transpose(1, 2).flatten(2)))
            normed, finish = _wrapped(layer, "mlp_conv", layer.post_attention_layernorm(hidden))
            hidden = hidden + finish(layer.mlp(normed))
        return drafter.norm(hidden), *interleave(keys, values)


def _wrapped(
    layer: nn.Module, name: str, states: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A sublayer's input, and what to do to its output: both as they are unless the kind wraps sublayers."""
    wrapper: Any = getattr(layer, name, None)
    if wrapper is None:
        return states, lambda output: output
    prepared, kept = wrapper.prepare(states)
    return prepared, lambda output: wrapper.finish(output, kept)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside have ``dtype``. (``Module.to`` can't replace parameters that have no data.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
