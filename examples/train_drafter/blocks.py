"""The training forward: many blocks of one sequence in one pass, and their loss.

::

    keys:     [ features 0 … rows-1 | block 0 | block 1 | … ]
    queries:                        [ block 0 | block 1 | … ]

A block's rows are ``[anchor, mask, mask, …]`` at the positions from its anchor on. They see the features of
the positions strictly before the anchor, and their own block in both directions; no other block. That is what
the reference's loop gives the drafter at inference: the anchor's own features aren't known yet (paper, arXiv
2602.06036, section 4.2, and ``dflash_generate`` of PyPI ``dflash``).

The layers are the reference's own modules. Only the order of things is written out here, since its
``forward`` chooses the attention function by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from dflash.model import DFlashDraftModel, apply_rotary_pos_emb
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Attend",
    "block_hidden",
    "block_labels",
    "block_loss",
    "dense_attention",
    "flex_attention_for",
    "position_weights",
]

Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Visible: TypeAlias = Callable[[Any, Any, Any, Any], torch.Tensor]

_ROWS_AT_ONCE = 8192  # rows of logits; 49,152 tokens in fp32 make that 1.6 GB


def visibility(anchors: torch.Tensor, rows: int, block_size: int) -> Visible:
    """The rule of the mask, as FlexAttention takes it: ``(batch, head, query, key) -> bool``.

    ``anchors`` int64 ``[batch, blocks]``. Keys below ``rows`` are features, and an anchor is never above it.
    """

    def visible(batch: Any, _: Any, query: Any, key: Any) -> torch.Tensor:
        block = query // block_size
        before_anchor = key < anchors[batch, block]
        own_block = (key >= rows) & ((key - rows) // block_size == block)
        seen: torch.Tensor = before_anchor | own_block
        return seen

    return visible


def dense_attention(anchors: torch.Tensor, rows: int, block_size: int) -> Attend:
    """Attention with the mask written out, ``[batch, 1, queries, keys]``: any device, any size."""
    batch, blocks = anchors.shape
    queries, device = blocks * block_size, anchors.device
    mask = visibility(anchors, rows, block_size)(
        torch.arange(batch, device=device)[:, None, None, None],
        None,
        torch.arange(queries, device=device)[:, None],
        torch.arange(rows + queries, device=device),
    )

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    return attend


def flex_attention_for(anchors: torch.Tensor, rows: int, block_size: int, *, compiled: bool = True) -> Attend:
    """FlexAttention with a block-sparse mask: tiles that no query of theirs sees are never computed.

    ``compiled=False`` is slow and keeps all scores: for checking without a GPU.
    """
    batch, blocks = anchors.shape
    queries = blocks * block_size
    mask = create_block_mask(
        visibility(anchors, rows, block_size),
        batch,
        None,
        queries,
        rows + queries,
        device=str(anchors.device),
        _compile=compiled,
    )
    function: Any = _compiled(flex_attention) if compiled else flex_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = function(query, key, value, block_mask=mask, enable_gqa=True)
        return attended

    return attend


def block_hidden(
    model: DFlashDraftModel,
    features: torch.Tensor,
    embeddings: torch.Tensor,
    anchors: torch.Tensor,
    attend: Attend,
    *,
    compiled: bool = False,
) -> torch.Tensor:
    """Hidden states of all blocks after the final norm, ``[batch, blocks, block_size, hidden]``.

    ``features`` ``[batch, rows, taps * hidden]`` of the whole sequences; ``embeddings`` ``[batch, blocks,
    block_size, hidden]`` of ``[anchor, mask, …]``; ``anchors`` int64 ``[batch, blocks]``. ``compiled`` runs
    what lies between the attention calls through torch.compile.
    """
    batch, blocks, block_size, width = embeddings.shape
    rows = features.shape[1]
    offsets = torch.arange(block_size, device=anchors.device)
    in_blocks = (anchors[:, :, None] + offsets).flatten(1)
    in_context = torch.arange(rows, device=anchors.device).expand(batch, rows)
    hidden = embeddings.flatten(1, 2)
    cos, sin = model.rotary_emb(hidden, torch.cat([in_context, in_blocks], dim=1))
    context = model.hidden_norm(model.fc(features))
    project, finish = (_compiled(_project), _compiled(_finish)) if compiled else (_project, _finish)
    for layer in model.layers:
        attended = attend(*project(layer, hidden, context, cos, sin))
        hidden = finish(layer, hidden, attended)
    normed: torch.Tensor = model.norm(hidden)
    return normed.view(batch, blocks, block_size, width)


def _project(
    layer: Any, hidden: torch.Tensor, context: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of the blocks, keys and values of context and blocks, ``[batch, heads, rows, head_dim]``."""
    module = layer.self_attn
    normed = layer.input_layernorm(hidden)

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(*rows.shape[:-1], -1, module.head_dim)

    query = module.q_norm(heads(module.q_proj(normed))).transpose(1, 2)
    # The context passes no input norm: hidden_norm was its norm.
    key = module.k_norm(heads(torch.cat([module.k_proj(context), module.k_proj(normed)], dim=1)))
    value = heads(torch.cat([module.v_proj(context), module.v_proj(normed)], dim=1)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key.transpose(1, 2), cos, sin)
    # Norms and rotary tables are float32, also under autocast.
    return query.to(value.dtype), key.to(value.dtype), value


def _finish(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    result: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return result


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def block_labels(
    ids: torch.Tensor, lengths: torch.Tensor, anchors: torch.Tensor, real: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each drafted row has to say, int64 ``[batch, blocks, block_size - 1]``, and whether it counts.

    Row k of a block says the token k places after the anchor; rows past the end of the answer don't count.
    """
    places = anchors[:, :, None] + torch.arange(1, block_size, device=anchors.device)
    counts = real[:, :, None] & (places < lengths[:, None, None])
    inside = places.clamp(max=ids.shape[1] - 1)
    return ids.gather(1, inside.flatten(1)).view_as(places), counts


def position_weights(block_size: int, gamma: float) -> torch.Tensor:
    """Weight of each drafted row's loss, float32 ``[block_size - 1]``: ``exp(-(k - 1) / gamma)`` for row k.

    Equation 4 of the paper: a draft only counts if all before it in the block were right.
    """
    return torch.exp(-torch.arange(block_size - 1) / gamma)


def block_loss(
    model: DFlashDraftModel,
    head: Any,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of the cross entropy, and the argmax of every row.

    ``hidden`` ``[n, hidden]``, ``labels`` int64 ``[n]``, ``weights`` float32 ``[n]``. ``head`` is the
    target's. More than some thousand rows are done in pieces whose logits are computed again in the backward
    pass.
    """
    piece = _compiled(_piece) if compiled else _piece
    parts = list(zip(*(torch.split(t, _ROWS_AT_ONCE) for t in (hidden, labels, weights)), strict=True))
    if len(parts) == 1:
        total, drafted = piece(model, head, *parts[0])
    else:
        results = [checkpoint(piece, model, head, *part, use_reentrant=False) for part in parts]
        total = torch.stack([result[0] for result in results]).sum()
        drafted = torch.cat([result[1] for result in results])
    return total / weights.sum().clamp(min=1e-6), drafted


def _piece(
    model: DFlashDraftModel, head: Any, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model.compute_logits(hidden, head).float()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum(), logits.detach().argmax(-1)
