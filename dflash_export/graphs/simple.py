"""Graphs of a few nodes, which are written instead of traced: embeddings, heads, changes of logits.

A head may share its bytes with the embedding, which needs the rows as they are: so it is a ``Gemm`` with the
matrix as the checkpoint has it, ``[vocab, hidden]``.
"""

from __future__ import annotations

import onnx_ir as ir

from dflash_export.graphs.graph import GraphTensor, TracedGraph
from dflash_export.graphs.nodes import Nodes
from dflash_rt.bundle.graph_names import output_name

__all__ = ["embed_graph", "head_graph", "logits_graph"]

_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT64
_IDS = GraphTensor("token_ids", _INT, ("batch", "rows"))


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
