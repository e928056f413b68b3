"""Sampling as an ONNX graph, all rows at once: for drafts that are sampled inside a step on a device.

The host sends random numbers and gets token ids. Opset 24, default operator domain only. There is no sort,
so no limit on the vocabulary either (TensorRT's TopK ends at 3840): a threshold is found by bisection, which
only counts and sums.

Names and shapes; b is ``batch``, r is ``rows``, V is ``vocab``, m and g are ``members`` and ``groups``: the
vocabulary is cut into g groups of m tokens, the last one maybe shorter
(``dflash_rt.sampling.distribution.GROUP``):

=====================  =====================  ===================================================
input                  type                   meaning
=====================  =====================  ===================================================
``logits``             float32 ``[b, r, V]``  finite
``noise_within``       float32 ``[b, r, m]``  of each row's position: ``Noise.at``, its first m numbers
``noise_between``      float32 ``[b, r, g]``  the others; where g is 1 there are none, and any will do
``temperature``        float32 ``[b]``        0 is greedy
``top_k``              int64 ``[b]``          0 is all
``top_p``              float32 ``[b]``        1 is all
=====================  =====================  ===================================================

Output: ``token_ids`` int64 ``[b, r]``.

It works in float32 throughout, as TensorRT has no float64. So a token may differ from that of
``dflash_rt.sampling.distribution`` where two are within rounding of one another in its race.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dflash_export.graphs.graph import GraphTensor, Nodes, TracedGraph

__all__ = ["sample_graph"]

_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT64
# exp(-104) is 0 in float32: what lies below has no weight. Halved so often, the interval is 2.4e-8 wide:
# tokens whose logits, divided by the temperature, are closer than that count as equally probable.
_LOWEST, _HALVINGS = -104.0, 32
_STEEPEST = 1e38


def sample_graph() -> TracedGraph:
    """The graph, with symbolic axes ``batch``, ``rows``, ``vocab``, ``members`` and ``groups``."""
    graph = Nodes(
        [
            GraphTensor("logits", _FLOAT, ("batch", "rows", "vocab")),
            GraphTensor("noise_within", _FLOAT, ("batch", "rows", "members")),
            GraphTensor("noise_between", _FLOAT, ("batch", "rows", "groups")),
            GraphTensor("temperature", _FLOAT, ("batch",)),
            GraphTensor("top_k", _INT, ("batch",)),
            GraphTensor("top_p", _FLOAT, ("batch",)),
        ]
    )
    token_ids = _picked(graph, _truncated(graph, _scaled(graph)))
    return graph.finish("sample", [(GraphTensor("token_ids", _INT, ("batch", "rows")), token_ids)])


def _scaled(graph: Nodes) -> ir.Value:
    """Logarithms of weights, at most 0, and at least what a float32 weight can tell from 0."""
    logits, temperature = graph.inputs["logits"], graph.per_row(graph.inputs["temperature"])
    peak = graph.op("ReduceMax", logits, graph.axis(2))
    slope = graph.op("Min", graph.op("Div", graph.constant(1), temperature), graph.constant(_STEEPEST))
    return graph.op("Max", graph.op("Mul", graph.op("Sub", logits, peak), slope), graph.constant(_LOWEST))


def _truncated(graph: Nodes, scaled: ir.Value) -> ir.Value:
    """Weights, 0 where ``top_k`` or ``top_p`` cut."""
    zero, one = graph.constant(0), graph.constant(1)
    visible = graph.op("Greater", scaled, graph.constant(_LOWEST))
    weights = graph.op("Where", visible, graph.op("Exp", scaled), zero)

    # The k-th most probable, and all that are as probable. Where k is 0 nothing is below the threshold.
    limit = graph.per_row(graph.cast(graph.inputs["top_k"]))
    unlimited = graph.op("Equal", limit, zero)
    threshold, _ = _bisected(graph, scaled, graph.cast(visible), limit)
    kept = graph.op("Or", unlimited, graph.op("GreaterOrEqual", scaled, threshold))
    weights = graph.op("Where", kept, weights, zero)

    # The fewest that reach top_p: those above the edge, and of those at the edge the first ones by id.
    top_p = graph.per_row(graph.inputs["top_p"])
    wanted = graph.op("Mul", top_p, graph.sum(weights, 2))
    low, high = _bisected(graph, scaled, weights, wanted)
    above = graph.op("GreaterOrEqual", scaled, high)
    at_edge = graph.op("And", graph.op("GreaterOrEqual", scaled, low), graph.op("Less", scaled, high))
    edge = graph.op("Where", at_edge, weights, zero)
    before = graph.op("CumSum", edge, graph.constant(2, np.int64), exclusive=1)
    mass = graph.op("Add", graph.sum(graph.op("Where", above, weights, zero), 2), before)
    fits = graph.op("And", at_edge, graph.op("Less", mass, wanted))
    best = graph.op("Equal", scaled, zero)  # top_p of 0 still keeps a token
    first = graph.op("Equal", graph.op("CumSum", graph.cast(best), graph.constant(2, np.int64)), one)
    nucleus = graph.op("Or", graph.op("Or", above, fits), graph.op("And", best, first))
    everything = graph.op("GreaterOrEqual", top_p, one)
    return graph.op("Where", graph.op("Or", everything, nucleus), weights, zero)


def _bisected(
    graph: Nodes, values: ir.Value, amounts: ir.Value, wanted: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """``low`` and ``high``, ``[b, r, 1]``, next to each other: amounts at or above ``low`` reach ``wanted``.

    Those at or above ``high`` don't. Values are from _LOWEST to 0; where all of them together don't reach
    ``wanted``, ``low`` stays _LOWEST.
    """
    zero, half = graph.constant(0), graph.constant(0.5)
    zeros = graph.op("Mul", graph.op("ReduceMax", values, graph.axis(2)), zero)
    low = graph.op("Add", zeros, graph.constant(_LOWEST))
    high = graph.op("Add", zeros, graph.constant(1e-6))
    for _ in range(_HALVINGS):
        middle = graph.op("Mul", graph.op("Add", low, high), half)
        counted = graph.op("Where", graph.op("GreaterOrEqual", values, middle), amounts, zero)
        reached = graph.op("GreaterOrEqual", graph.sum(counted, 2), wanted)
        low = graph.op("Where", reached, middle, low)
        high = graph.op("Where", reached, high, middle)
    return low, high


def _picked(graph: Nodes, weights: ir.Value) -> ir.Value:
    """int64 ``[b, r]``: the winner of a race of groups, and then of the winning group's tokens."""
    logits, noise_within, noise_between, temperature, *_ = graph.inputs.values()
    groups = graph.op("Shape", noise_between, start=2, end=3)
    members = graph.op("Shape", noise_within, start=2, end=3)
    one = graph.axis(1)
    # The last group is filled up with tokens that have no weight.
    missing = graph.op("Sub", graph.op("Mul", groups, members), graph.op("Shape", logits, start=2, end=3))
    padding = graph.op("Concat", graph.axis(0), missing, axis=0)
    whole = graph.op("Pad", weights, padding, None, graph.axis(2))
    # 0 keeps the batch and the rows as they are.
    by_group = graph.op("Reshape", whole, graph.op("Concat", graph.axis(0, 0), groups, members, axis=0))
    group = _winner(graph, graph.sum(by_group, 3, keep=False), noise_between, keep=True)
    places = graph.op(
        "Expand",
        graph.op("Unsqueeze", group, graph.axis(3)),
        graph.op("Concat", one, one, one, members, axis=0),
    )
    inside = graph.op("Squeeze", graph.op("GatherElements", by_group, places, axis=2), graph.axis(2))
    member = _winner(graph, inside, noise_within, keep=False)
    before = graph.op("Mul", graph.op("Squeeze", group, graph.axis(2)), members)
    best = graph.op("ArgMax", logits, axis=2, keepdims=0)
    greedy = graph.op("Equal", graph.op("Unsqueeze", temperature, one), graph.constant(0))
    return graph.op("Where", greedy, best, graph.op("Add", before, member))


def _winner(graph: Nodes, weights: ir.Value, noise: ir.Value, *, keep: bool) -> ir.Value:
    """``dflash_rt.sampling.distribution.race`` on axis 2, ``[b, r, 1]`` or ``[b, r]``."""
    runs = graph.op("Greater", weights, graph.constant(0))
    arrivals = graph.op("Where", runs, graph.op("Div", noise, weights), graph.constant(np.inf))
    return graph.op("ArgMin", arrivals, axis=2, keepdims=int(keep))
