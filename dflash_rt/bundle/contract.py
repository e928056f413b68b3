"""Which graphs a bundle has, and the name, dtype and shape of each of their tensors.

The tables are in docs/reference/bundle.md, "Tensors of each graph". Axes: ``batch`` (slots), ``rows`` (token
positions of one call), ``capacity`` (rows of a cache). A cache is ``key.{i}`` or ``value.{i}`` of a layer,
``[batch, heads, capacity, head_dim]``; its output has ``.out`` behind the name and lies in the same memory.
"""

from __future__ import annotations

from dflash_rt.bundle.graph_names import cache_names, output_name
from dflash_rt.bundle.manifest import DrafterInfo, Manifest, StateSpec, TargetInfo
from dflash_rt.drafters import DRAFTERS, Drafter
from dflash_rt.drafters.base import FLOAT_DTYPES, Link, Shape, Sizes, Tensors

__all__ = [
    "drafter_of",
    "expected_tensors",
    "links",
    "slot_state",
    "state_tensors",
]

_LINKS: tuple[Link, ...] = (
    ("embed", "embeddings", "target", "embeddings"),
    ("embed", "embeddings", "draft", "embeddings"),
    ("target", "hidden", "lm_head", "hidden"),
    ("draft", "hidden", "lm_head", "hidden"),
    ("target", "features", "inject", "features"),
    ("lm_head", "logits", "accept", "logits"),
)

_INT64 = ("int64",)
_FLOAT32 = ("float32",)


def drafter_of(manifest: Manifest) -> Drafter:
    """The drafter of a bundle, which plans its draft steps."""
    kind = DRAFTERS[manifest.drafter.kind]
    return kind(manifest.graphs, samples_from_anchor=manifest.drafter.samples_from_anchor)


def slot_state(target: TargetInfo, drafter: DrafterInfo) -> tuple[StateSpec, ...]:
    """The state that a slot keeps between calls of the graphs, for models of this geometry."""
    windowed = drafter.is_windowed
    return (
        StateSpec(
            name="target",
            kind="kv",
            graphs=("target",),
            tensors=cache_names(target.num_layers),
            window=None,
        ),
        StateSpec(
            name="draft",
            kind="window" if windowed else "kv",
            graphs=("inject", "draft"),
            tensors=cache_names(drafter.num_layers),
            window=drafter.sliding_window if windowed else None,
        ),
    )


def state_tensors(graph: str, state: tuple[StateSpec, ...]) -> dict[str, str]:
    """Inputs of a graph that a slot keeps between calls: tensor name -> name of its state."""
    return {tensor: kept.name for kept in state if graph in kept.graphs for tensor in kept.tensors}


def links(manifest: Manifest) -> tuple[Link, ...]:
    """Buffers that one graph writes and another reads, without the caches."""
    return (*_LINKS, *DRAFTERS[manifest.drafter.kind].links)


def expected_tensors(graph: str, manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Inputs and outputs that a graph must have, for the sizes that the manifest states."""
    target, drafter = manifest.target, manifest.drafter
    rows: Shape = ("batch", "rows")
    hidden_size = target.hidden_size
    embeddings: Tensors = {"embeddings": (FLOAT_DTYPES, (*rows, hidden_size))}
    hidden: Tensors = {"hidden": (FLOAT_DTYPES, (*rows, hidden_size))}
    features = {"features": (FLOAT_DTYPES, (*rows, hidden_size * len(drafter.feature_layers)))}
    token_ids = {"token_ids": (_INT64, rows)}
    logits = (_FLOAT32, (*rows, target.vocab_size))
    start = {"start": (_INT64, ("batch",))}
    per_slot: Tensors = {
        "accepted": start["start"],
        "anchors": start["start"],
        output_name("start"): start["start"],
    }
    finite: Tensors = {"finite": start["start"]}
    place = {**start, "offset": start["start"]} if drafter.is_windowed else start
    caches = _caches(target.num_layers, target.num_key_value_heads, target.head_dim)
    draft_caches = _caches(drafter.num_layers, drafter.num_key_value_heads, drafter.head_dim)
    sizes = Sizes(hidden_size, target.vocab_size, drafter.vocab_size, drafter.selector_top_k or 1)
    table: dict[str, tuple[Tensors, Tensors]] = {
        "embed": ({"input_ids": (_INT64, rows)}, embeddings),
        "target": ({**embeddings, **start, **caches}, {**hidden, **features, **_as_outputs(caches)}),
        "lm_head": (hidden, {"logits": logits, **token_ids}),
        "inject": ({**features, **place, **draft_caches}, _as_outputs(draft_caches)),
        "draft": ({**embeddings, **place, **draft_caches}, {**hidden, **_as_outputs(draft_caches)}),
        "accept": ({"block": (_INT64, rows), **token_ids, "logits": logits, **start}, {**per_slot, **finite}),
        "draft_check": ({"logits": (_FLOAT32, (*rows, drafter.vocab_size))}, finite),
        **DRAFTERS[drafter.kind].tensors(sizes),
    }
    return table[graph]


def _caches(num_layers: int, heads: int, head_dim: int) -> Tensors:
    return dict.fromkeys(cache_names(num_layers), (FLOAT_DTYPES, ("batch", heads, "capacity", head_dim)))


def _as_outputs(caches: Tensors) -> Tensors:
    return {output_name(name): tensor for name, tensor in caches.items()}
