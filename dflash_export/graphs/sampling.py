"""What ``dflash_rt.sampling.sampler`` does for a step, as an ONNX graph: all rows at once.

For a step that stays on a device, as inside a captured CUDA graph: the host sends random numbers and gets
token ids. Opset 24, default operator domain only. There is no sort, so no limit on the vocabulary either
(TensorRT's TopK ends at 3840): a threshold is found by bisection, which only counts and sums.

Names and shapes; b is ``batch``, r is ``rows``, V is ``vocab``, m and g are ``members`` and ``groups``: the
vocabulary is cut into g groups of m tokens, the last one maybe shorter
(``dflash_rt.sampling.distribution.GROUP``):

=====================  =====================  ===================================================
input                  type                   meaning
=====================  =====================  ===================================================
``logits``             float32 ``[b, r, V]``  the target's own, finite
``drafted``            int64 ``[b, r - 1]``   the block behind the anchor
``noise_within``       float32 ``[b, r, m]``  of each row's position: ``Noise.at``, its first m numbers
``noise_between``      float32 ``[b, r, g]``  the others; where g is 1 there are none, and any will do
``temperature``        float32 ``[b]``        0 is greedy
``top_k``              int64 ``[b]``          0 is all
``top_p``, ``min_p``   float32 ``[b]``        1 and 0 are all
``repetition``         float32 ``[b]``        repetition penalty, 1 is none
``presence``           float32 ``[b]``        presence penalty
``frequency``          float32 ``[b]``        frequency penalty
``prompt_mask``        float32 ``[b, V]``     1 where a token is in the prompt
``counts``             float32 ``[b, V]``     how often each token came in the output, anchor included
=====================  =====================  ===================================================

Outputs: ``accepted`` int64 ``[b]``; ``token_ids`` int64 ``[b, r]``, of which the first ``accepted + 1``
count; ``counts.out`` float32 ``[b, V]``, ``counts`` with those added.

It works in float32 throughout, as TensorRT has no float64. So a token may differ from that of
``dflash_rt.sampling.sampler`` where two are within rounding of one another in its race.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from dflash_export.graphs.nodes import OPSET, Nodes, Values

__all__ = ["OPSET", "sampling_graph"]

_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64
_INPUTS: Values = {
    "logits": (_FLOAT, ["batch", "rows", "vocab"]),
    "drafted": (_INT, ["batch", "drafts"]),
    "noise_within": (_FLOAT, ["batch", "rows", "members"]),
    "noise_between": (_FLOAT, ["batch", "rows", "groups"]),
    "temperature": (_FLOAT, ["batch"]),
    "top_k": (_INT, ["batch"]),
    "top_p": (_FLOAT, ["batch"]),
    "min_p": (_FLOAT, ["batch"]),
    "repetition": (_FLOAT, ["batch"]),
    "presence": (_FLOAT, ["batch"]),
    "frequency": (_FLOAT, ["batch"]),
    "prompt_mask": (_FLOAT, ["batch", "vocab"]),
    "counts": (_FLOAT, ["batch", "vocab"]),
}
_OUTPUTS: Values = {
    "accepted": (_INT, ["batch"]),
    "token_ids": (_INT, ["batch", "rows"]),
    "counts.out": (_FLOAT, ["batch", "vocab"]),
}

# exp(-104) is 0 in float32: what lies below has no weight. Halved so often, the interval is 2.4e-8 wide:
# tokens whose logits, divided by the temperature, are closer than that count as equally probable.
_LOWEST, _HALVINGS = -104.0, 32
_STEEPEST = 1e38


def sampling_graph() -> onnx.ModelProto:
    """The graph, checked, with symbolic axes ``batch``, ``rows``, ``drafts`` (``rows - 1``) and ``vocab``."""
    graph = _Nodes()
    scores = _penalised(graph)
    scaled = _scaled(graph, scores)
    weights = _truncated(graph, scaled)
    chosen = _picked(graph, scores, weights)
    _accept(graph, chosen)
    return graph.model("accept_and_sample", _INPUTS, _OUTPUTS)


class _Nodes(Nodes):
    """With what only this graph needs."""

    def one_hot(self, ids: str) -> str:
        """int64 ``[b, n]`` -> float32 ``[b, n, V]``."""
        numbers = self.op("Unsqueeze", self._vocabulary(), self.axis(0, 1))
        return self.floats(self.op("Equal", self.op("Unsqueeze", ids, self.axis(2)), numbers))

    def _vocabulary(self) -> str:
        size = self.op("Squeeze", self.op("Shape", "logits", start=2, end=3), self.axis(0))
        return self.op("Range", self.constant(0, np.int64), size, self.constant(1, np.int64))


def _penalised(graph: _Nodes) -> str:
    """``[b, r, V]``: row j counts the drafts before it, which were accepted whenever row j matters."""
    drafts = graph.op("CumSum", graph.one_hot("drafted"), graph.constant(1, np.int64))
    # A row of zeros for the anchor: the counts hold its token already.
    in_block = graph.op("Pad", drafts, graph.constant([0, 1, 0, 0, 0, 0], np.int64))
    output = graph.op("Add", graph.op("Unsqueeze", "counts", graph.axis(1)), in_block)
    zero, one = graph.constant(0), graph.constant(1)

    seen = graph.op(
        "Greater", graph.op("Add", graph.op("Unsqueeze", "prompt_mask", graph.axis(1)), output), zero
    )
    repetition = graph.per_row("repetition")
    factor = graph.op("Where", graph.op("Less", "logits", zero), repetition, graph.op("Div", one, repetition))
    repeated = graph.op("Where", seen, graph.op("Mul", "logits", factor), "logits")

    present = graph.floats(graph.op("Greater", output, zero))
    presence = graph.op("Mul", present, graph.per_row("presence"))
    frequency = graph.op("Mul", output, graph.per_row("frequency"))
    return graph.op("Sub", repeated, graph.op("Add", presence, frequency))


def _scaled(graph: _Nodes, scores: str) -> str:
    """Logarithms of weights, at most 0, and at least what a float32 weight can tell from 0."""
    peak = graph.op("ReduceMax", scores, graph.axis(2))
    steepness = graph.op(
        "Min", graph.op("Div", graph.constant(1), graph.per_row("temperature")), graph.constant(_STEEPEST)
    )
    steep = graph.op("Mul", graph.op("Sub", scores, peak), steepness)
    return graph.op("Max", steep, graph.constant(_LOWEST))


def _truncated(graph: _Nodes, scaled: str) -> str:
    """Weights, 0 where ``top_k``, ``top_p`` or ``min_p`` cut."""
    zero, one = graph.constant(0), graph.constant(1)
    visible = graph.op("Greater", scaled, graph.constant(_LOWEST))
    weights = graph.op("Where", visible, graph.op("Exp", scaled), zero)

    # The k-th most probable, and all that are as probable. Where k is 0 nothing is below the threshold.
    limit = graph.per_row(graph.floats("top_k"))
    unlimited = graph.op("Equal", limit, zero)
    threshold, _ = _bisected(graph, scaled, graph.floats(visible), limit)
    kept = graph.op("Or", unlimited, graph.op("GreaterOrEqual", scaled, threshold))
    weights = graph.op("Where", kept, weights, zero)

    # The fewest that reach top_p: those above the edge, and of those at the edge the first ones by id.
    top_p = graph.per_row("top_p")
    wanted = graph.op("Mul", top_p, graph.sum(weights, 2))
    low, high = _bisected(graph, scaled, weights, wanted)
    above = graph.op("GreaterOrEqual", scaled, high)
    at_edge = graph.op("And", graph.op("GreaterOrEqual", scaled, low), graph.op("Less", scaled, high))
    edge = graph.op("Where", at_edge, weights, zero)
    before = graph.op("CumSum", edge, graph.constant(2, np.int64), exclusive=1)
    mass = graph.op("Add", graph.sum(graph.op("Where", above, weights, zero), 2), before)
    fits = graph.op("And", at_edge, graph.op("Less", mass, wanted))
    best = graph.op("Equal", scaled, zero)  # top_p of 0 still keeps a token
    first = graph.op("Equal", graph.op("CumSum", graph.floats(best), graph.constant(2, np.int64)), one)
    nucleus = graph.op("Or", graph.op("Or", above, fits), graph.op("And", best, first))
    everything = graph.op("GreaterOrEqual", top_p, one)
    weights = graph.op("Where", graph.op("Or", everything, nucleus), weights, zero)

    enough = graph.op("GreaterOrEqual", weights, graph.per_row("min_p"))
    return graph.op("Where", enough, weights, zero)


def _bisected(graph: _Nodes, values: str, amounts: str, wanted: str) -> tuple[str, str]:
    """``low`` and ``high``, ``[b, r, 1]``, next to each other: amounts at or above ``low`` reach ``wanted``.

    Those at or above ``high`` don't. Values are from _LOWEST to 0; where all of them together don't reach
    ``wanted``, ``low`` stays _LOWEST.
    """
    shape = graph.op("Mul", graph.op("ReduceMax", values, graph.axis(2)), graph.constant(0))
    low = graph.op("Add", shape, graph.constant(_LOWEST))
    high = graph.op("Add", shape, graph.constant(1e-6))
    for _ in range(_HALVINGS):
        middle = graph.op("Mul", graph.op("Add", low, high), graph.constant(0.5))
        counted = graph.op("Where", graph.op("GreaterOrEqual", values, middle), amounts, graph.constant(0))
        reached = graph.op("GreaterOrEqual", graph.sum(counted, 2), wanted)
        low = graph.op("Where", reached, middle, low)
        high = graph.op("Where", reached, high, middle)
    return low, high


def _picked(graph: _Nodes, scores: str, weights: str) -> str:
    """int64 ``[b, r]``: the winner of a race of groups, and then of the winning group's tokens."""
    groups = graph.op("Shape", "noise_between", start=2, end=3)
    members = graph.op("Shape", "noise_within", start=2, end=3)
    one = graph.axis(1)
    missing = graph.op(
        "Sub", graph.op("Mul", groups, members), graph.op("Shape", "logits", start=2, end=3)
    )  # the last group's, without weight
    padding = graph.op("Concat", graph.axis(0), missing, axis=0)
    whole = graph.op("Pad", weights, padding, "", graph.axis(2))
    # 0 keeps the batch and the rows as they are.
    by_group = graph.op(
        "Reshape", whole, graph.op("Concat", graph.constant([0, 0], np.int64), groups, members, axis=0)
    )
    group = _winner(graph, graph.sum(by_group, 3, keep=False), "noise_between", keep=True)
    places = graph.op(
        "Expand",
        graph.op("Unsqueeze", group, graph.axis(3)),
        graph.op("Concat", one, one, one, members, axis=0),
    )
    inside = graph.op("Squeeze", graph.op("GatherElements", by_group, places, axis=2), graph.axis(2))
    member = _winner(graph, inside, "noise_within", keep=False)
    before = graph.op("Mul", graph.op("Squeeze", group, graph.axis(2)), members)
    sampled = graph.op("Add", before, member)
    best = graph.op("ArgMax", scores, axis=2, keepdims=0)
    greedy = graph.op("Equal", graph.op("Unsqueeze", "temperature", graph.axis(1)), graph.constant(0))
    return graph.op("Where", greedy, best, sampled, output="token_ids")


def _winner(graph: _Nodes, weights: str, noise: str, *, keep: bool) -> str:
    """``dflash_rt.sampling.distribution.race`` on axis 2, ``[b, r, 1]`` or ``[b, r]``."""
    runs = graph.op("Greater", weights, graph.constant(0))
    arrivals = graph.op("Where", runs, graph.op("Div", noise, weights), graph.constant(np.inf))
    return graph.op("ArgMin", arrivals, axis=2, keepdims=int(keep))


def _accept(graph: _Nodes, chosen: str) -> None:
    """Count the drafts before the first that isn't the token, and count the tokens that stand."""
    before_last = graph.op(
        "Slice", chosen, graph.constant([0], np.int64), graph.constant([-1], np.int64), graph.axis(1)
    )
    differs = graph.op("Cast", graph.op("Not", graph.op("Equal", "drafted", before_last)), to=_INT)
    # Differences in the rows before each row: 0 as long as every draft stood.
    misses = graph.op(
        "Pad",
        graph.op("CumSum", differs, graph.constant(1, np.int64)),
        graph.constant([0, 1, 0, 0], np.int64),
    )
    stands = graph.op("Equal", misses, graph.constant(0, np.int64))
    tokens = graph.sum(graph.op("Cast", stands, to=_INT), 1, keep=False)
    graph.op("Sub", tokens, graph.constant(1, np.int64), output="accepted")
    added = graph.op("Mul", graph.one_hot(chosen), graph.op("Unsqueeze", graph.floats(stands), graph.axis(2)))
    graph.op("Add", "counts", graph.sum(added, 1, keep=False), output="counts.out")
