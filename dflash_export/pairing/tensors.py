"""Whether a checkpoint holds the tensors that its config asks for: names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from dflash_export.sources.weights import Weights, empty_model
from dflash_rt.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["EMBEDDING", "target_tensor_problems", "target_tensor_shapes", "tensor_problems"]

EMBEDDING = "model.embed_tokens.weight"

_HEAD = "lm_head.weight"
_LISTED = 6  # names in one message; a wrong size is wrong in every layer
_COMPARED_ROWS = 4096


def target_tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the target's module, the tied head included. Allocates no weights."""
    return {name: tuple(value.shape) for name, value in empty_model(config).state_dict().items()}


def target_tensor_problems(config: PreTrainedConfig, weights: Weights) -> Iterator[Problem]:
    """Tensors that a target lacks, has too many, or has in another shape than its config says."""
    expected = target_tensor_shapes(config)
    names = set(weights.names())
    tied = bool(config.tie_word_embeddings)
    if tied and _HEAD not in names:
        del expected[_HEAD]
    problems = list(tensor_problems("target", expected, weights))
    yield from problems
    if tied and not problems and _HEAD in names and not _same_rows(weights, EMBEDDING, _HEAD):
        yield Problem(
            "the target says that its head is tied to the embedding, but stores another head",
            f"{_HEAD} differs from {EMBEDDING}",
            "equal tensors, or tie_word_embeddings false",
            "set tie_word_embeddings to false in the target's config.json",
        )


def tensor_problems(
    owner: str, expected: Mapping[str, tuple[int, ...]], weights: Weights, no_floats: Collection[str] = ()
) -> Iterator[Problem]:
    """``no_floats`` names tensors that aren't numbers to compute with, whose dtype is checked elsewhere."""
    names = set(weights.names())
    missing, unexpected = sorted(set(expected) - names), sorted(names - set(expected))
    shared = sorted(names & set(expected))
    wrong = [
        f"{name} {list(weights.shape(name))}, not {list(expected[name])}"
        for name in shared
        if weights.shape(name) != expected[name]
    ]
    not_floats = [
        f"{name} {weights.dtype(name)}"
        for name in shared
        if name not in no_floats
        and (not weights.dtype(name).is_floating_point or weights.dtype(name).itemsize < 2)
    ]
    remedy = f"use the config.json and the weights of one revision of the {owner}"
    if missing or unexpected:
        named = (("missing", missing), ("unexpected", unexpected))
        yield Problem(
            f"the {owner}'s checkpoint doesn't hold the tensors that its config asks for",
            "; ".join(f"{how}: {_some(tensors)}" for how, tensors in named if tensors),
            f"exactly {len(expected)} tensors",
            remedy,
        )
    if wrong:
        what = f"tensors of the {owner} have other shapes than its config asks for"
        yield Problem(what, _some(wrong), "the shapes that follow from the config", remedy)
    if not_floats:
        yield Problem(
            f"tensors of the {owner} are not stored in floating point",
            _some(not_floats),
            "float32, float16 or bfloat16",
            "use the checkpoint that was not quantised",
        )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _same_rows(weights: Weights, first: str, second: str) -> bool:
    rows = weights.shape(first)[0]
    steps = range(0, rows, _COMPARED_ROWS)
    pairs = ((start, min(start + _COMPARED_ROWS, rows)) for start in steps)
    return all(
        torch.equal(weights.rows(first, start, stop), weights.rows(second, start, stop))
        for start, stop in pairs
    )
