"""Graphs of a few nodes, which are written instead of traced: embeddings, heads, changes of logits, steps.

A head may share its bytes with the embedding, which needs the rows as they are: so it is a ``Gemm`` with the
matrix as the checkpoint has it, ``[vocab, hidden]``.

``accept`` and ``draft_check`` are what a step does besides running the two models: as graphs, so that a step
never has to leave a device.

``accept`` ends a step. b is ``batch``, r is ``rows``, V is the vocabulary:

==============  =====================  ==========================================================
input           type                   meaning
==============  =====================  ==========================================================
``block``       int64 ``[b, r]``       ids of the verify pass: the anchor, then the drafts
``token_ids``   int64 ``[b, r]``       the target's own choice after each row
``logits``      float32 ``[b, r, V]``  those that the choices were made from
``start``       int64 ``[b]``          position of the anchor
==============  =====================  ==========================================================

Outputs, each int64 ``[b]``: ``accepted`` drafts, as :func:`dflash_rt.sampling.greedy.accept_greedy` counts
them; ``anchors`` and ``start.out`` of the next step; ``finite``, 1 if every logit is finite and 0 if not.

``draft_check`` has input ``logits`` ``[b, r, Vd]`` of the head that drafts, and ``finite`` alone as output: a
drafter whose caches hold a NaN would draft nonsense for ever, and no token would show it.

The block itself is put together by copies, and needs no graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dflash_export.graphs.graph import GraphTensor, Nodes, TracedGraph
from dflash_rt.bundle.graph_names import output_name

__all__ = ["accept_graph", "draft_check_graph", "embed_graph", "head_graph", "logits_graph", "step_graphs"]

_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT64
_IDS = GraphTensor("token_ids", _INT, ("batch", "rows"))
# A logit times this, summed over any number of rows and tokens, doesn't overflow.
_SMALL, _LARGE = 2.0**-64, 1e38


def embed_graph(
    vocab_size: int, hidden_size: int, dtype: ir.DataType, parameter: str = "weight"
) -> TracedGraph:
    """``input_ids [batch, rows]`` to rows of the weight ``[vocab, hidden]``, which is ``parameter``."""
    graph = Nodes([GraphTensor("input_ids", _INT, ("batch", "rows"))])
    rows = graph.op(
        "Gather",
        graph.weight("weight", dtype, (vocab_size, hidden_size), parameter),
        graph.inputs["input_ids"],
    )
    return graph.finish("embed", [(GraphTensor("embeddings", dtype, ("batch", "rows", hidden_size)), rows)])


def head_graph(
    vocab_size: int,
    hidden_size: int,
    dtype: ir.DataType,
    parameter: str = "weight",
    *,
    maps_ids: bool = False,
) -> TracedGraph:
    """``hidden [batch, rows, hidden]`` to float32 ``logits [batch, rows, vocab]`` and the best ``token_ids``.

    The weight ``[vocab, hidden]`` is ``parameter``. With ``maps_ids`` there is a parameter ``target_ids``,
    too, int64 ``[vocab]``: the id that each token of this head has in the target.
    """
    graph = Nodes([GraphTensor("hidden", dtype, ("batch", "rows", hidden_size))])
    hidden = graph.inputs["hidden"]
    flat = graph.op("Reshape", hidden, graph.axis(-1, hidden_size))
    product = graph.op(
        "Gemm", flat, graph.weight("weight", dtype, (vocab_size, hidden_size), parameter), transB=1
    )
    shape = graph.op("Concat", graph.op("Shape", hidden, start=0, end=2), graph.axis(vocab_size), axis=0)
    logits = graph.op("Reshape", product, shape)
    if dtype != _FLOAT:
        logits = graph.cast(logits)
    token_ids = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    if maps_ids:
        token_ids = graph.op("Gather", graph.weight("target_ids", _INT, (vocab_size,)), token_ids)
    return graph.finish("head", [(_logits("logits", vocab_size), logits), (_IDS, token_ids)])


def logits_graph(vocab_size: int, multiplier: float, softcap: float | None) -> TracedGraph:
    """Multiply logits, then softcap them (reference ``compute_logits``); their best ``token_ids``."""
    graph = Nodes([_logits("logits", vocab_size)])
    logits = graph.op("Mul", graph.inputs["logits"], graph.constant(multiplier))
    if softcap is not None:
        cap = graph.constant(softcap)
        logits = graph.op("Mul", graph.op("Tanh", graph.op("Div", logits, cap)), cap)
    token_ids = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    return graph.finish(
        "draft_logits", [(_logits(output_name("logits"), vocab_size), logits), (_IDS, token_ids)]
    )


def _logits(name: str, vocab_size: int) -> GraphTensor:
    return GraphTensor(name, _FLOAT, ("batch", "rows", vocab_size))


def step_graphs(vocab_size: int, draft_vocab_size: int) -> dict[str, TracedGraph]:
    """Both graphs. They have no weights and depend on the vocabularies alone."""
    return {"accept": accept_graph(vocab_size), "draft_check": draft_check_graph(draft_vocab_size)}


def accept_graph(vocab_size: int) -> TracedGraph:
    """The graph ``accept``. No axis is ever empty, also in a plain step of one row."""
    graph = Nodes(
        [
            GraphTensor("block", _INT, ("batch", "rows")),
            GraphTensor("token_ids", _INT, ("batch", "rows")),
            GraphTensor("logits", _FLOAT, ("batch", "rows", vocab_size)),
            GraphTensor("start", _INT, ("batch",)),
        ]
    )
    block, token_ids, logits, start = graph.inputs.values()
    # Row j of the block stands if it is the choice after row j - 1, and all rows before it stand. The anchor
    # is put before the choices, so that it stands.
    anchor = graph.op("Slice", block, graph.axis(0), graph.axis(1), graph.axis(1))
    shifted = graph.op("Concat", anchor, token_ids, axis=1)
    chosen = graph.op("Slice", shifted, graph.axis(0), graph.axis(-1), graph.axis(1))
    differs = graph.cast(graph.op("Not", graph.op("Equal", block, chosen)), ir.DataType.INT32)
    misses = graph.op("CumSum", graph.cast(differs), graph.constant(1, np.int64))
    stands = graph.cast(graph.op("Less", misses, graph.constant(0.5)), _INT)
    count = graph.sum(stands, 1)  # [b, 1]: the anchor and the accepted drafts
    accepted = graph.op("Sub", count, graph.axis(1))
    bonus = graph.op("GatherElements", token_ids, accepted, axis=1)
    outputs = {
        "accepted": graph.op("Squeeze", accepted, graph.axis(1)),
        "anchors": graph.op("Squeeze", bonus, graph.axis(1)),
        "start.out": graph.op("Add", start, graph.op("Squeeze", count, graph.axis(1))),
        "finite": _finite(graph, logits),
    }
    return graph.finish("accept", [(_per_slot(name), value) for name, value in outputs.items()])


def draft_check_graph(vocab_size: int) -> TracedGraph:
    """The graph ``draft_check`` for a drafting head of ``vocab_size`` rows."""
    graph = Nodes([GraphTensor("logits", _FLOAT, ("batch", "rows", vocab_size))])
    return graph.finish("draft_check", [(_per_slot("finite"), _finite(graph, graph.inputs["logits"]))])


def _per_slot(name: str) -> GraphTensor:
    return GraphTensor(name, _INT, ("batch",))


def _finite(graph: Nodes, logits: ir.Value) -> ir.Value:
    """1 where a slot's logits are all finite: their sum is, only if every term is; NaN is below nothing."""
    total = graph.sum(graph.op("Mul", logits, graph.constant(_SMALL)), 1, 2, keep=False)
    return graph.cast(graph.op("Less", graph.op("Abs", total), graph.constant(_LARGE)), _INT)
