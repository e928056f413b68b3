"""The mapping between a drafter's own, smaller vocabulary and the target's (``d2t`` and ``t2d``)."""

from __future__ import annotations

import torch

from dflash_export.drafters.config import DrafterConfig
from dflash_export.sources.weights import Weights
from dflash_rt.errors import Problem

__all__ = ["MAPPING", "mapping_problems", "target_ids"]

MAPPING = ("d2t", "t2d")
_REMEDY = "use the weights that were published with the drafter"


def target_ids(drafter: DrafterConfig, weights: Weights) -> torch.Tensor:
    """int64 ``[draft_vocab_size]``: the target's id of each token that the drafter can propose.

    ``d2t`` is stored as an offset: token i of the drafter is token ``i + d2t[i]`` of the target.
    """
    assert drafter.draft_vocab_size is not None
    own = torch.arange(drafter.draft_vocab_size)
    if drafter.draft_vocab_size == drafter.vocab_size:
        return own
    return own + weights.rows("d2t", 0, drafter.draft_vocab_size)


def mapping_problems(drafter: DrafterConfig, weights: Weights) -> list[Problem]:
    """Why the mapping can't be used. Missing tensors and wrong shapes are reported elsewhere."""
    own, vocab = drafter.draft_vocab_size, drafter.vocab_size
    if own is not None and own > vocab:
        found, expected = f"draft_vocab_size {own}", f"at most {vocab}"
        return [Problem("the drafter's vocabulary is larger than the target's", found, expected, _REMEDY)]
    if own is None or own == vocab or not _are_whole(drafter, weights):
        return []
    dtypes = {name: weights.dtype(name) for name in MAPPING}
    if dtypes != {"d2t": torch.int64, "t2d": torch.bool}:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        expected = "d2t torch.int64, t2d torch.bool"
        return [Problem("the drafter's vocabulary mapping has other dtypes", found, expected, _REMEDY)]
    return _id_problems(target_ids(drafter, weights), weights.rows("t2d", 0, vocab))


def _are_whole(drafter: DrafterConfig, weights: Weights) -> bool:
    names, shapes = set(weights.names()), drafter.tensor_shapes()
    return all(name in names and weights.shape(name) == shapes[name] for name in MAPPING)


def _id_problems(ids: torch.Tensor, marked_as_drafted: torch.Tensor) -> list[Problem]:
    own, vocab = len(ids), len(marked_as_drafted)
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.numel():
        found = f"{outside.numel()} ids such as {int(outside[0])}"
        expected = f"0 to {vocab - 1}, each as i + d2t[i]"
        return [Problem("the drafter maps to tokens that the target doesn't have", found, expected, _REMEDY)]
    marked = torch.zeros(vocab, dtype=torch.bool)
    marked[ids] = True
    if not torch.equal(marked, marked_as_drafted) or int(marked.sum()) != own:
        found = f"{int(marked.sum())} different tokens behind d2t, others than those that t2d marks"
        expected = f"{own} tokens, the same in both"
        return [Problem("the drafter's vocabulary mappings contradict each other", found, expected, _REMEDY)]
    return []
