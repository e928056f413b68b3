"""Operators that are emitted instead of traced, because their decomposed form would lose what they mean.

``Attention`` and ``TensorScatter`` (opset 24), which backends turn into fused attention over caches that are
updated in place, and ``RotaryEmbedding``/``RMSNormalization`` (opset 23), which save hundreds of small nodes.
The last two replace functions of transformers while a trace runs, each after a check that the replaced
function computes what the operator computes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from dflash_export.errors import UnsupportedModelError
from dflash_export.graphs.graph import OPSET

__all__ = [
    "ATTENTION",
    "GraphCache",
    "Visibility",
    "attention",
    "emit_operators",
    "interleave",
    "positions",
    "rms_norm",
    "rotary",
    "scatter",
]

# transformers looks for a flash kernel behind any name that contains "flash".
ATTENTION = "onnx_attention"


def positions(start: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int64 ``[batch, rows]``: cache row and rotary position of each row of ``rows [batch, rows, …]``."""
    return start[:, None] + torch.arange(rows.shape[1])[None]


def interleave(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Keys and values of each layer in turn, as a graph returns them."""
    return [tensor for pair in zip(keys, values, strict=True) for tensor in pair]


class Visibility:
    """Boolean attention masks ``[batch, 1, rows, capacity]``, one per distinct rule, made once per graph.

    ``positions`` is int64 ``[batch, rows]``: the cache row that each query row is written to.
    """

    def __init__(self, positions: torch.Tensor, capacity: int) -> None:
        self._query = positions[:, None, :, None]
        self._key = torch.arange(capacity)[None, None, None, :]
        self._first = positions[:, 0][:, None, None, None]
        self._last = positions[:, -1][:, None, None, None]
        self._masks: dict[tuple[bool, int | None, bool], torch.Tensor] = {}

    def mask(
        self, *, causal: bool = True, window: int | None = None, from_first: bool = False
    ) -> torch.Tensor:
        """True where a key may be seen. Same rule as ``_attention_mask`` of PyPI dflash 0.1.0.

        ``causal=False`` sees every row written so far, this call's own block included. ``window``
        counts rows with the query's own: distance ``< window``, both ways if not causal. ``from_first``
        counts it before the call's first row instead, the same for all rows: ``create_anchor_block_mask_mod``
        of speculators (commit c05b95b).
        """
        rule = (causal, window, from_first)
        if rule not in self._masks:
            visible = self._key <= self._query
            if not causal:
                # A superset of the causal rows. "Or" also spreads the rule over all rows without an Expand,
                # which TensorRT-RTX 1.7 fails to compile in front of fused attention.
                visible = visible | (self._key <= self._last)
            if window is not None and from_first:
                visible = visible & (self._first - self._key <= window)
            elif window is not None:
                visible = visible & (self._query - self._key < window)
                if not causal:
                    visible = visible & (self._key - self._query < window)
            self._masks[rule] = visible
        return self._masks[rule]


def _emitted(kind: str, version: int, inputs: Sequence[torch.Tensor], **attributes: Any) -> torch.Tensor:
    """The output of an operator of opset ``version``, which is like its first input."""
    like = inputs[0]
    return torch.onnx.ops.symbolic(
        kind, inputs, attributes, dtype=like.dtype, shape=tuple(like.shape), version=version
    )


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """``Attention`` (opset 24): query ``[batch, heads, rows, head_dim]`` over whole caches.

    Caches are ``[batch, kv_heads, capacity, head_dim]``; ``mask`` is boolean ``[batch, 1, rows, capacity]``.
    """
    return _emitted("Attention", OPSET, [query, key, value, mask], scale=float(scale))


def scatter(cache: torch.Tensor, rows: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """``TensorScatter`` (opset 24): write ``rows [batch, kv_heads, rows, head_dim]`` at ``start``."""
    return _emitted("TensorScatter", OPSET, [cache, rows, start], axis=2)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``RMSNormalization`` (opset 23) over the last axis, computed in fp32 whatever the dtype."""
    return _emitted("RMSNormalization", 23, [hidden, weight], axis=-1, epsilon=float(epsilon), stash_type=1)


def rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``RotaryEmbedding`` (opset 23) of ``states [batch, heads, rows, head_dim]``.

    ``cos`` and ``sin`` are ``[batch, rows, head_dim / 2]``.
    """
    return _emitted("RotaryEmbedding", 23, [states, cos, sin], interleaved=0)


class GraphCache(Cache):
    """A transformers cache whose ``update`` emits ``TensorScatter`` at ``start [batch]``."""

    def __init__(
        self, start: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> None:
        # Not calling super().__init__: it would build layers of its own, and every method that a forward
        # pass uses is replaced here.
        self.layers: list[Any] = []
        self.start = start
        self.keys = list(keys)
        self.values = list(values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new rows and return the whole caches ``[batch, kv_heads, capacity, head_dim]``."""
        self.keys[layer_idx] = scatter(self.keys[layer_idx], key_states, self.start)
        self.values[layer_idx] = scatter(self.values[layer_idx], value_states, self.start)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are given to the model, so it never has to ask where it stands."""
        return 0


def _attention_interface(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    visibility: Visibility,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    mask = visibility.mask(causal=True, window=sliding_window)
    return attention(query, key, value, mask, scaling).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Masks come from :class:`Visibility`; transformers must not build its own."""


AttentionInterface.register(ATTENTION, _attention_interface)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _reference_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What the ONNX operator computes, written from its specification."""
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _check_rotary(function: Callable[..., Any], where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 3, 8, generator=generator) for _ in range(2))
    cos, sin = (torch.randn(1, 3, 4, generator=generator) for _ in range(2))
    found = function(query, key, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    if not all(
        torch.allclose(got, _reference_rotary(states, cos, sin), atol=1e-6)
        for got, states in zip(found, (query, key), strict=True)
    ):
        raise UnsupportedModelError(
            f"{where}.apply_rotary_pos_emb is not the rotation of the ONNX operator RotaryEmbedding",
            expected="rotation of the two halves of a head",
            remedy="export with a supported version of transformers (see docs/reference/limits.md)",
        )


def _check_norm(module: nn.Module) -> None:
    # A fresh real module: the one in the model has no data.
    norm: Any = type(module)(6, eps=0.5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, generator=generator)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator))
        expected = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
        if not torch.allclose(norm(hidden), expected, atol=1e-6):
            raise UnsupportedModelError(
                f"{type(module).__name__} is not the norm of the ONNX operator RMSNormalization",
                expected="x / sqrt(mean(x^2) + eps) * weight",
                remedy="export with a supported version of transformers (see docs/reference/limits.md)",
            )


@contextlib.contextmanager
def emit_operators(model: nn.Module) -> Iterator[None]:
    """While open, RMS norms and rotary embeddings of ``model`` are emitted as one operator each.

    Raises:
        UnsupportedModelError: a function that would be replaced computes something else.
    """
    with contextlib.ExitStack() as undo:
        checked: set[object] = set()
        for module in model.modules():
            if _is_rms_norm(module):
                if type(module) not in checked:
                    checked.add(type(module))
                    _check_norm(module)
                module.forward = _norm_forward(module)
                undo.callback(module.__dict__.pop, "forward")
            namespace = sys.modules[type(module).__module__]
            original = getattr(namespace, "apply_rotary_pos_emb", None)
            if original is not None and original is not _emit_rotary:
                _check_rotary(original, namespace.__name__)
                setattr(namespace, "apply_rotary_pos_emb", _emit_rotary)  # noqa: B010 (mypy)
                undo.callback(setattr, namespace, "apply_rotary_pos_emb", original)
        yield


def _norm_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        weight, epsilon = module.weight, module.variance_epsilon
        assert isinstance(weight, torch.Tensor)
        assert isinstance(epsilon, float)
        return rms_norm(hidden_states, weight, epsilon)

    return forward


def _emit_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    # transformers repeats the table for both halves of a head; the operator wants it once.
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return rotary(q, cos, sin), rotary(k, cos, sin)
