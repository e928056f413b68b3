"""Names of graphs and of their tensors; contract.py has the inputs and outputs of each graph."""

from __future__ import annotations

from dflash_rt.drafters import DRAFTERS

__all__ = [
    "GRAPH_NAMES",
    "REQUIRED_GRAPHS",
    "STEP_GRAPHS",
    "cache_names",
    "key_name",
    "output_name",
    "value_name",
]

REQUIRED_GRAPHS = ("embed", "target", "lm_head", "inject", "draft")
# A step that stays on a device needs them. A bundle without them runs on the CPU only.
STEP_GRAPHS = ("accept", "draft_check")
_OF_DRAFTERS = (
    name for drafter in DRAFTERS.values() for name in (*drafter.optional_graphs, *drafter.required_graphs)
)
GRAPH_NAMES = (*REQUIRED_GRAPHS, *dict.fromkeys(_OF_DRAFTERS), *STEP_GRAPHS)


def key_name(layer: int) -> str:
    """Input name of a layer's key cache."""
    return f"key.{layer}"


def value_name(layer: int) -> str:
    """Input name of a layer's value cache."""
    return f"value.{layer}"


def output_name(name: str) -> str:
    """Name of the output that is the changed form of an input: of a cache, ``logits`` or ``start``."""
    return f"{name}.out"


def cache_names(num_layers: int) -> tuple[str, ...]:
    """Input names of all caches of a model with ``num_layers`` layers: keys and values layer by layer."""
    return tuple(name for layer in range(num_layers) for name in (key_name(layer), value_name(layer)))
