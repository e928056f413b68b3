"""The graph ``target`` once more, in the operators that ONNX Runtime's kernels are fastest with.

A decoder layer of a small model takes tens of microseconds on a CPU, so that every node counts. What lies
between two products there is a dozen nodes in plain ONNX, and two in ONNX Runtime's own operators:

- ``GroupQueryAttention`` cuts joined projections into heads, rotates them, writes the caches in place, and
  attends. It reads the rows that are valid, where ``Attention`` reads the whole buffer.
- ``SkipSimplifiedLayerNormalization`` is ``Add`` and ``RMSNormalization``.

In 16 bits the same form is for ONNX Runtime's CUDA kernels, whose ``Attention`` computes scores and products
one after the other when it has a mask.

Inputs, outputs, weights and meaning are those of the graph that it is made from, which stays the one that
counts: engines are built from it, and every other backend runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.tape
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from dflash_export.graphs.graph import TracedGraph, int64_constant, only_reader

__all__ = ["fuse_target"]


_DOMAIN = "com.microsoft"
_HEAD_DIMS = 16  # GroupQueryAttention rotates heads of a multiple of so many only
_TABLE_ROWS = 512  # of one run that makes a table: it takes that many rows of embeddings


@dataclass(frozen=True)
class _Layer:
    """What ``GroupQueryAttention`` replaces, from the joined projections to the rows of their result.

    ``norms`` are those of queries and keys in front of the rotation, where there are some.
    """

    projections: ir.Value
    norms: tuple[ir.Node, ir.Node] | None
    rotary: tuple[ir.Value, ir.Value]  # cos and sin
    scatters: tuple[ir.Node, ir.Node]
    attention: ir.Node
    result: ir.Value
    heads: tuple[int, int]  # of queries, and of keys
    head_dim: int


def fuse_target(target: TracedGraph, rows: int) -> ir.Model | None:
    """A copy of the graph in fused operators, or None where they can't say what it says.

    They can for layers that see all rows before their own, whose q, k and v are joined, and whose heads
    have a multiple of 16 numbers. The sines and cosines of ``rows`` positions become
    constants of the copy, and no run may go beyond them. The initializers of ``target`` must point at their
    data. Without onnxruntime, which computes those constants, there is no copy, and the log says so.
    """
    model = target.model.clone()
    graph = model.graph
    try:
        layers = [_layer(node) for node in graph if node.op_type == "Attention"]
        _require(len({layer.rotary for layer in layers}) == 1)
        tables = _tables(model, layers[0].rotary, rows)
    except _OtherFormError:
        return None
    constants = []
    dtype = layers[0].scatters[0].outputs[0].dtype
    assert dtype is not None
    for name, numbers in zip(("rotary.cos", "rotary.sin"), tables, strict=True):
        tensor = ir.tensor(numbers.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.initializers[name] = value
        constants.append(value)
    lengths = _lengths(graph, layers[0].scatters[0].inputs[0], by_capacity=dtype != ir.DataType.FLOAT)
    for layer in layers:
        _fuse_attention(graph, layer, lengths, constants)
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _fuse_norm(graph, node)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    model.opset_imports[_DOMAIN] = 1
    return model


def _layer(attention: ir.Node) -> _Layer:
    """What is around ``attention``. Raises _OtherFormError where it is anything else."""
    query, key, value, mask = attention.inputs
    _producer(mask, "LessOrEqual")  # Visibility's rule for all rows before
    scatters = _producer(key, "TensorScatter"), _producer(value, "TensorScatter")
    turned = _producer(query, "RotaryEmbedding"), _producer(scatters[0].inputs[1], "RotaryEmbedding")
    norms, unturned = _norms(*(node.inputs[0] for node in turned))
    split = _producer(unturned[0], "Split")
    reshape = _producer(_producer(split.inputs[0], "Transpose").inputs[0], "Reshape")
    joined = _consumer(_consumer(attention, "Transpose"), "Reshape")
    counts = _producer(split.inputs[1], "Constant").attributes["value"].as_tensor().numpy().tolist()
    cos, sin = turned[0].inputs[1:]
    projections, cache = reshape.inputs[0], scatters[0].inputs[0]
    _require(tuple(split.outputs) == (*unturned, scatters[1].inputs[1]))
    _require(turned[1].inputs[1:] == (cos, sin) and counts[1] == counts[2])
    assert projections is not None
    assert cos is not None
    assert sin is not None
    assert cache is not None
    assert cache.shape is not None
    head_dim = cache.shape[3]
    assert isinstance(head_dim, int)
    _require(head_dim % _HEAD_DIMS == 0)
    heads = counts[0], counts[1]
    return _Layer(projections, norms, (cos, sin), scatters, attention, joined.outputs[0], heads, head_dim)


def _norms(
    query: ir.Value | None, key: ir.Value | None
) -> tuple[tuple[ir.Node, ir.Node] | None, tuple[ir.Value | None, ir.Value | None]]:
    """The norms that made queries and keys, of each head alone, and what they were before; or no norms."""
    try:
        norms = _producer(query, "RMSNormalization"), _producer(key, "RMSNormalization")
    except _OtherFormError:
        return None, (query, key)
    _require(all(norm.attributes["axis"].as_int() == -1 for norm in norms))
    return norms, (norms[0].inputs[0], norms[1].inputs[0])


class _OtherFormError(Exception):
    """A graph isn't of the form that can be fused."""


def _require(condition: bool) -> None:
    if not condition:
        raise _OtherFormError


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise _OtherFormError
    return node


def _consumer(node: ir.Node, op_type: str) -> ir.Node:
    reader = only_reader(node.outputs[0])
    if reader is None or reader.op_type != op_type:
        raise _OtherFormError
    return reader


def _tables(model: ir.Model, rotary: tuple[ir.Value, ir.Value], rows: int) -> list[np.ndarray]:
    """Cosines and sines, float32 ``[rows, head_dim / 2]``, as the graph itself computes them.

    Raises _OtherFormError if they depend on anything but the position.
    """
    import onnxruntime as ort

    inputs = {value.name: value for value in model.graph.inputs}
    try:
        part = ir.convenience.extract(
            model.graph, [inputs["embeddings"], inputs["start"]], [_in_fp32(v) for v in rotary]
        )
    except ValueError as error:  # another input is read
        raise _OtherFormError from error
    for value in part.inputs:
        if value.name == "embeddings":  # only their number is read, and numpy has no bfloat16
            assert value is not inputs["embeddings"]
            value.type = ir.TensorType(ir.DataType.FLOAT)
    small = ir.Model(part, ir_version=model.ir_version)
    session = ort.InferenceSession(
        ir.serde.serialize_model(small).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shape = inputs["embeddings"].shape
    assert shape is not None
    width = shape[2]
    assert isinstance(width, int)
    embeddings = np.zeros((1, _TABLE_ROWS, width), np.float32)
    parts = [
        session.run(None, {"embeddings": embeddings, "start": np.array([start], np.int64)})
        for start in range(0, rows, _TABLE_ROWS)
    ]
    return [np.concatenate([part[i][0] for part in parts])[:rows] for i in range(2)]


def _in_fp32(table: ir.Value) -> str:
    """Name of what a table was before it was rounded to 16 bits, and its columns chosen."""
    if table.dtype != ir.DataType.FLOAT:
        columns = _producer(table, "Slice")
        rounded = _producer(columns.inputs[0], "Cast")
        exact = ir.node("Slice", [rounded.inputs[0], *columns.inputs[1:]])
        exact.outputs[0].name = f"{table.name}.exact"
        assert columns.graph is not None
        columns.graph.insert_before(columns, exact)
        table = exact.outputs[0]
    assert table.name is not None
    return table.name


def _lengths(graph: ir.Graph, cache: ir.Value | None, *, by_capacity: bool) -> list[ir.Value]:
    """What ``GroupQueryAttention`` is told: the last valid row of each sequence, and the longest's length.

    The second is wanted on the host, for sizes only. ``by_capacity`` says the caches' size instead of it: in
    a step that stays on a GPU the host doesn't know more, and a captured graph must suit every length.
    """
    inputs = {value.name: value for value in graph.inputs}
    start, embeddings = inputs["start"], inputs["embeddings"]
    tape = ir.tape.Tape()
    total = tape.op("Add", [start, tape.op("Shape", [embeddings], {"start": 1, "end": 2})])
    last = tape.op("Sub", [total, int64_constant(tape, [1])])
    if by_capacity:
        longest = tape.op("Squeeze", [tape.op("Shape", [cache], {"start": 2, "end": 3})])
    else:
        longest = tape.op("ReduceMax", [total], {"keepdims": 0})
    lengths = [tape.op("Cast", [length], {"to": ir.DataType.INT32}) for length in (last, longest)]
    graph.insert_before(graph[0], tape.nodes)
    return lengths


def _fuse_attention(graph: ir.Graph, layer: _Layer, lengths: list[ir.Value], tables: list[ir.Value]) -> None:
    caches = [scatter.inputs[0] for scatter in layer.scatters]
    rows = [layer.projections, None, None] if layer.norms is None else _normed(graph, layer, layer.norms)
    fused = ir.node(
        "GroupQueryAttention",
        [*rows, *caches, *lengths, *tables],
        {
            "num_heads": layer.heads[0],
            "kv_num_heads": layer.heads[1],
            "scale": layer.attention.attributes["scale"].as_float(),
            "do_rotary": 1,
            "rotary_interleaved": 0,
        },
        domain=_DOMAIN,
        num_outputs=3,
    )
    graph.insert_before(layer.attention, fused)
    old = [layer.result, *(scatter.outputs[0] for scatter in layer.scatters)]
    for before, after in zip(old, fused.outputs, strict=True):
        _rewire(before, after)


def _normed(graph: ir.Graph, layer: _Layer, norms: tuple[ir.Node, ir.Node]) -> list[ir.Value]:
    """Queries, keys and values, each ``[batch, rows, heads * head_dim]``, the first two normed by heads."""
    (queries, keys), size, tape = layer.heads, layer.head_dim, ir.tape.Tape()
    counts = int64_constant(tape, [queries * size, keys * size, keys * size])
    flat = int64_constant(tape, [0, 0, -1])
    parts = tape.op_multi_out("Split", [layer.projections, counts], {"axis": -1}, num_outputs=3)
    rows = []
    for norm, part, count in zip(norms, parts, layer.heads, strict=False):
        heads = tape.op("Reshape", [part, int64_constant(tape, [0, 0, count, size])])
        normed = tape.op("RMSNormalization", [heads, norm.inputs[1]], dict(norm.attributes))
        rows.append(tape.op("Reshape", [normed, flat]))
    graph.insert_before(layer.attention, tape.nodes)
    return [*rows, parts[2]]


def _fuse_norm(graph: ir.Graph, norm: ir.Node) -> None:
    try:
        add = _producer(norm.inputs[0], "Add")
    except _OtherFormError:
        return
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain=_DOMAIN,
        num_outputs=4,
    )
    graph.insert_before(norm, fused)
    _rewire(norm.outputs[0], fused.outputs[0])
    _rewire(add.outputs[0], fused.outputs[3])


def _rewire(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be read wherever ``old`` is, and leave the graph under its name."""
    new.shape, new.type = old.shape, old.type
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name
