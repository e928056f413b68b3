"""From a traced graph to the one that is stored.

Traced initializers have names and shapes but no data. The passes here clean the graph, decide how each
weight is laid out on disk (:class:`StoredWeight`), and never need the data to do so.

ONNX Runtime's CPU kernels run a layer of a small model in tens of microseconds, so that every node around the
products counts. What was tried and is not done: grouped query heads folded into the rows of their key head,
so that a key row is read once for all of them. Alone the operator is then a third faster; inside the graph,
where the caches come from memory and two threads share three heads instead of nine, it is a quarter slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.tape
import onnxscript.optimizer
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from dflash_export.graphs.graph import (
    OPSET,
    GraphTensor,
    StoredWeight,
    TracedGraph,
    add_placeholder,
    int64_constant,
    only_reader,
)

__all__ = ["finish_graph"]

_HEADS_FIRST = (0, 2, 1, 3)  # [batch, rows, heads, head_dim] <-> [batch, heads, rows, head_dim]


def finish_graph(
    model: ir.Model,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    constants: Mapping[str, np.ndarray],
) -> TracedGraph:
    """Optimise ``model`` and settle the layout of its weights.

    Args:
        model: as traced; changed in place.
        inputs: the contract, for names of axes.
        outputs: the contract, for names of axes.
        constants: data of initializers that are no weights, such as rotary frequencies.
    """
    graph = model.graph
    pending = _initializers_to_inputs(graph, constants)
    onnxscript.optimizer.optimize(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    weights = {
        name: StoredWeight((name,), False, value.dtype, _fixed_shape(value))
        for name, value in pending.items()
        if value.dtype is not None
    }
    _fold_transposes(graph, weights)
    _join_matmuls(graph, weights)
    _share_head_layout(graph)
    _inputs_to_initializers(graph, pending, weights)
    RemoveUnusedNodesPass()(model)
    _name_axes(graph, inputs, outputs)
    model.producer_name, model.producer_version = "dflash-export", None
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()  # the tracer's stack traces: machine paths, and most of the file
        node.version = None
    return TracedGraph(model, weights)


def _initializers_to_inputs(graph: ir.Graph, constants: Mapping[str, np.ndarray]) -> dict[str, ir.Value]:
    """Turn weights into inputs so that no optimiser looks for their data; give constants theirs."""
    pending: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if name in constants:
            value.const_value = ir.tensor(constants[name], name=name)
            continue
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
        pending[name] = value
    return pending


def _fixed_shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(d for d in value.shape if isinstance(d, int))


def _inputs_to_initializers(
    graph: ir.Graph, pending: Mapping[str, ir.Value], weights: dict[str, StoredWeight]
) -> None:
    for name, value in pending.items():
        graph.inputs.remove(value)
        if not value.uses():
            weights.pop(name, None)
    for name in list(weights):
        if name in pending:
            add_placeholder(graph, pending[name], weights[name])


def _transposed_weight(node: ir.Node, weights: Mapping[str, StoredWeight]) -> str | None:
    """The weight behind ``MatMul(x, Transpose(weight))``, if that is what ``node`` is."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    name = transpose.inputs[0].name
    perm = transpose.attributes.get("perm")
    if name not in weights or perm is None or list(perm.as_ints()) != [1, 0]:
        return None
    return name


def _fold_transposes(graph: ir.Graph, weights: dict[str, StoredWeight]) -> None:
    for node in graph:
        name = _transposed_weight(node, weights)
        if name is None:
            continue
        value = node.inputs[1].producer().inputs[0]  # type: ignore[union-attr]
        assert value is not None
        stored = weights[name]
        if not stored.transpose:
            weights[name] = StoredWeight(stored.parameters, True, stored.dtype, stored.shape[::-1])
        node.replace_input_with(1, value)


def _join_matmuls(graph: ir.Graph, weights: dict[str, StoredWeight]) -> None:
    """``x·A + a, x·B + b`` become ``Split(x·[A B] + [a b])``: fewer, larger products, fewer barriers."""
    readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].name in weights:
            assert node.inputs[0] is not None
            readers[node.inputs[0]].append(node)
    for source, nodes in readers.items():
        if len(nodes) > 1:
            _join(graph, source, nodes, weights)


def _join(
    graph: ir.Graph, source: ir.Value, nodes: Sequence[ir.Node], weights: dict[str, StoredWeight]
) -> None:
    matrices = [node.inputs[1] for node in nodes]
    sizes = [weights[str(value.name)].shape[1] for value in matrices if value is not None]
    ends = list(nodes)  # the nodes whose outputs the parts replace
    tape = ir.tape.Tape()
    product = tape.op("MatMul", [source, _joined_weight(graph, matrices, weights, transpose=True)])
    biases = [_bias(node, weights) for node in nodes]
    if None not in biases:
        bias = _joined_weight(graph, [found[1] for found in biases if found], weights, transpose=False)
        product = tape.op("Add", [product, bias])
        ends = [found[0] for found in biases if found]
    split = [product, int64_constant(tape, sizes)]
    outputs = tape.op_multi_out("Split", split, {"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(nodes[0], tape.nodes)
    for node, output in zip(ends, outputs, strict=True):
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        old.replace_all_uses_with(output)
    graph.remove(dict.fromkeys([*ends, *nodes]), safe=True)


def _bias(node: ir.Node, weights: Mapping[str, StoredWeight]) -> tuple[ir.Node, ir.Value] | None:
    """The only reader of a product, if it adds a weight, and that weight."""
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    return (add, other) if other is not None and other.name in weights else None


def _joined_weight(
    graph: ir.Graph, values: Sequence[ir.Value | None], weights: dict[str, StoredWeight], *, transpose: bool
) -> ir.Value:
    """One initializer of several weights side by side; ``weights`` has it in their place."""
    names = [str(value.name) for value in values if value is not None]
    parts = [weights.pop(name) for name in names]
    joined = StoredWeight(
        tuple(p for part in parts for p in part.parameters),
        transpose,
        parts[0].dtype,
        (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)),
    )
    # "a.q_proj.weight", "a.k_proj.weight" -> "a.q_proj+k_proj.weight"
    stem, _, leaf = names[0].rpartition(".")
    owner = stem.rpartition(".")[0]
    name = f"{owner}.{'+'.join(n.rpartition('.')[0].rpartition('.')[2] for n in names)}.{leaf}"
    value = ir.Value(name=name, shape=ir.Shape(joined.shape), type=ir.TensorType(joined.dtype))
    weights[name] = joined
    add_placeholder(graph, value, joined)
    return value


def _name_axes(graph: ir.Graph, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> None:
    """Give inputs and outputs the contract's names and axes; drop the tracer's inner shapes."""
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for value, item in zip(graph.inputs, inputs, strict=True):
        value.name, value.shape = item.name, ir.Shape(item.shape)
    for position, (value, wanted) in enumerate(zip(graph.outputs, outputs, strict=True)):
        if value.producer() is None:
            raise AssertionError(f"output {wanted.name} is an input")
        value.name, value.shape = wanted.name, ir.Shape(wanted.shape)
        value.type = ir.TensorType(wanted.dtype)
        graph.outputs[position] = value


@dataclass(frozen=True)
class _Branch:
    """One part of a joined projection on its way to heads: ``Reshape``, perhaps a norm, ``Transpose``."""

    reshape: ir.Node
    norm: ir.Node | None
    transpose: ir.Node
    head_dim: int


def _share_head_layout(graph: ir.Graph) -> None:
    """``Split`` into q, k, v and then a Reshape and a Transpose of each: one of each, then the ``Split``.

    A norm over ``head_dim`` doesn't care where the axis of the heads is, so it moves behind the Transpose.
    """
    for split in list(graph):
        if split.op_type != "Split" or len(split.outputs) < 2:
            continue
        branches = [_branch(output) for output in split.outputs]
        head_dims = {branch.head_dim for branch in branches if branch is not None}
        if None in branches or len(head_dims) != 1:
            continue
        _share(graph, split, [branch for branch in branches if branch is not None], head_dims.pop())


def _branch(value: ir.Value) -> _Branch | None:
    reshape = only_reader(value)
    if reshape is None or reshape.op_type != "Reshape":
        return None
    norm, transpose = None, only_reader(reshape.outputs[0])
    if transpose is not None and transpose.op_type == "RMSNormalization":
        if transpose.attributes["axis"].as_int() != -1:
            return None
        norm, transpose = transpose, only_reader(transpose.outputs[0])
    if transpose is None or transpose.op_type != "Transpose":
        return None
    if tuple(transpose.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    shape = transpose.outputs[0].shape
    head_dim = None if shape is None or len(shape) != 4 else shape[3]
    return _Branch(reshape, norm, transpose, head_dim) if isinstance(head_dim, int) else None


def _share(graph: ir.Graph, split: ir.Node, branches: Sequence[_Branch], head_dim: int) -> None:
    product, sizes = split.inputs[0], split.inputs[1]
    assert product is not None
    assert sizes is not None
    constant = sizes.producer()
    assert constant is not None
    heads = [size // head_dim for size in constant.attributes["value"].as_tensor().numpy().tolist()]
    tape = ir.tape.Tape()
    rows = tape.op("Reshape", [product, int64_constant(tape, [0, 0, sum(heads), head_dim])])
    by_head = tape.op("Transpose", [rows], {"perm": list(_HEADS_FIRST)})
    shared = [by_head, int64_constant(tape, heads)]
    outputs = tape.op_multi_out("Split", shared, {"axis": 1}, num_outputs=len(branches))
    graph.insert_before(split, tape.nodes)
    for branch, output in zip(branches, outputs, strict=True):
        old = branch.transpose.outputs[0]
        output.shape, output.type = old.shape, old.type
        new = output
        if branch.norm is not None:
            branch.norm.replace_input_with(0, output)
            new = branch.norm.outputs[0]
            new.shape = old.shape
        old.replace_all_uses_with(new)
    graph.remove([split, *(node for b in branches for node in (b.reshape, b.transpose))], safe=True)
