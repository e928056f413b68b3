"""What an engine is refused for. Each of these builds without a word and computes something else."""

from __future__ import annotations

from typing import Any

from dflash_export.engines.network import Network
from dflash_export.engines.vendor import has_lengths
from dflash_export.errors import EngineBuildError
from dflash_rt.bundle.manifest import GraphSpec, TensorSpec

__all__ = ["check_network", "check_parsed_whole"]

_REMEDY = "build the bundle again with this version of dflash-export; if it is refused again, report it"


def check_network(
    network: Network,
    graph: str,
    spec: GraphSpec,
    shapes: dict[str, tuple[str | int, ...]],
    *,
    fused: bool,
) -> None:
    """Refuse a network that isn't what ``spec`` and ``shapes`` say, or that hides one of TensorRT's traps.

    Call it after every edit. ``fused``: attention must have kernels of its own.

    Raises:
        EngineBuildError: names the graph and what is wrong with it.
    """
    for kind, tensors, wanted in (
        ("input", network.inputs, spec.inputs),
        ("output", network.outputs, spec.outputs),
    ):
        found = {tensor.name: tensor for tensor in tensors}
        names = [tensor.name for tensor in wanted]
        if set(found) != set(names):
            raise _refuse(graph, f"its {kind}s differ", ", ".join(sorted(found)), ", ".join(sorted(names)))
        for tensor in wanted:
            _check_tensor(network, graph, found[tensor.name], tensor, shapes[tensor.name])
    _check_caches(network, graph, spec)
    _check_attention(network, graph, fused=fused)


def _refuse(graph: str, what: str, found: object, expected: str) -> EngineBuildError:
    return EngineBuildError(f"no engine for {graph}: {what}", found=found, expected=expected, remedy=_REMEDY)


def _check_tensor(
    network: Network, graph: str, tensor: Any, wanted: TensorSpec, shape: tuple[str | int, ...]
) -> None:
    if tensor.dtype != getattr(network.trt, wanted.dtype):
        raise _refuse(graph, f"{tensor.name} has another dtype", tensor.dtype, wanted.dtype)
    fixed = tuple(-1 if isinstance(axis, str) else axis for axis in shape)
    # An output's symbolic axis may be deduced to a number, never the other way round.
    found = tuple(tensor.shape)
    if len(found) != len(fixed) or any(a != b for a, b in zip(found, fixed, strict=True) if b != -1):
        raise _refuse(graph, f"{tensor.name} has another shape", found, str(fixed))


def check_parsed_whole(network: Network, graph: str) -> None:
    """Refuse a graph of which the parser ignored a part: every input and every layer must reach an output.

    The parser drops what it doesn't know, such as ``nonpad_kv_seqlen`` of ``Attention``, and what computed it
    is left over. Call it before any edit: edits leave layers over as well.

    Raises:
        EngineBuildError: names what was ignored.
    """
    reached = _reached(network)
    unused = [tensor.name for tensor in network.inputs if tensor.name not in reached]
    if unused:
        raise _refuse(graph, "an input is used by no output", ", ".join(unused), "every input to be used")
    idle = [
        layer.name
        for layer in network.layers
        if not any(layer.get_output(i).name in reached for i in range(layer.num_outputs))
    ]
    if idle:
        raise _refuse(
            graph, "the parser ignored what a node computes", ", ".join(idle), "all of it to be used"
        )


def _reached(network: Network) -> set[str]:
    """Names of the tensors that an output depends on."""
    reached: set[str] = set()
    waiting = list(network.outputs)
    while waiting:
        tensor = waiting.pop()
        if tensor.name in reached:
            continue
        reached.add(tensor.name)
        layer = network.producer(tensor)
        if layer is not None:
            inputs = (layer.get_input(i) for i in range(layer.num_inputs))
            waiting.extend(each for each in inputs if each is not None)
    return reached


def _check_caches(network: Network, graph: str, spec: GraphSpec) -> None:
    """Every cache output is its input, updated in place; and nothing else updates a cache."""
    updates = {layer.get_output(0).name: layer for layer in network.layers_of("KV_CACHE_UPDATE")}
    outputs = {tensor.name for tensor in network.outputs}
    for output, source in spec.aliases.items():
        layer = updates.get(output)
        if layer is None:
            raise _refuse(graph, f"{output} isn't an updated cache", "another layer", "KVCacheUpdate")
        cache = layer.get_input(0)
        if network.producer(cache) is not None or cache.name != source:
            raise _refuse(graph, f"{output} doesn't share the memory of {source}", cache.name, source)
    strangers = sorted(set(updates) - set(spec.aliases))
    if strangers or not set(updates) <= outputs:
        found = ", ".join(strangers or sorted(set(updates) - outputs))
        raise _refuse(graph, "a cache that the manifest doesn't list is updated", found, "listed caches only")


def _check_attention(network: Network, graph: str, *, fused: bool) -> None:
    none = network.trt.CausalMaskKind.NONE if hasattr(network.trt, "CausalMaskKind") else None
    for attention in network.attentions():
        kind = getattr(attention, "causal_kind", none)
        if attention.causal or kind != none:
            # It would be aligned to the first row of the cache: wrong whenever `start` isn't 0.
            raise _refuse(
                graph, "an attention is causal by itself", kind, "the mask of the graph alone to decide"
            )
        if attention.mask is None:
            raise _refuse(graph, "an attention has no mask", "none", "a mask computed in the graph")
        if attention.mask.dtype != network.trt.bool:
            raise _refuse(graph, "a mask is added to scores", attention.mask.dtype, "a boolean mask")
        if has_lengths(network.trt) and attention.key_value_lengths is None:
            raise _refuse(graph, "an attention reads its whole cache", "no lengths", "key_value_lengths")
        for index, name in ((1, "keys"), (2, "values")):
            layer = network.producer(attention.get_input(index))
            if not network.is_kind(layer, "KV_CACHE_UPDATE"):
                found = "the input" if layer is None else str(layer.type)
                raise _refuse(graph, f"an attention reads a copy of its {name}", found, "the cache itself")
        if fused and attention.decomposable:
            raise _refuse(graph, "an attention may be unfused", "decomposable", "fused kernels in 16 bits")
