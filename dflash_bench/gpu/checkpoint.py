"""Random checkpoints of a given shape, written as fast as the disk takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dflash_bench.gpu.shapes import PairShape, drafter_tensors, target_tensors

__all__ = ["checkpoint_bytes", "write_pair"]

# Drawing billions of normal numbers takes minutes on a CPU. Each tensor instead repeats one block of them,
# from a place of its own, so that no two tensors and no two products are alike.
_BLOCK = 1 << 24
_SHARD_BYTES = 1 << 31
_PRIME = 7919  # step between the places at which tensors begin


def checkpoint_bytes(shape: PairShape, dtype: torch.dtype) -> int:
    """Bytes of both checkpoints."""
    shapes = [*target_tensors(shape).values(), *drafter_tensors(shape).values()]
    return sum(torch.Size(size).numel() for size in shapes) * dtype.itemsize


def write_pair(shape: PairShape, folder: Path, dtype: torch.dtype, *, seed: int = 0) -> tuple[Path, Path]:
    """Write ``folder/target`` and ``folder/drafter``, config.json and weights; returns both.

    Norms are near 1, matrices have the standard deviation ``shape.spread``.
    """
    target, drafter = folder / "target", folder / "drafter"
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
    _write(target, shape.target_config(), target_tensors(shape), block, shape.spread, dtype)
    _write(drafter, shape.drafter_config(), drafter_tensors(shape), block.flip(0), shape.spread, dtype)
    return target, drafter


def _write(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    block: torch.Tensor,
    spread: float,
    dtype: torch.dtype,
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    matrices, norms = (block * spread).to(dtype), (1 + 0.2 * block).to(dtype)
    shards = list(_shards(shapes, dtype.itemsize))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: _repeat(norms if len(shapes[name]) == 1 else matrices, shapes[name], len(places) + place)
            for place, name in enumerate(names)
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]], item_bytes: int) -> Iterator[list[str]]:
    """Names in groups of some 2 GB, so that only that much is in memory at once."""
    group: list[str] = []
    size = 0
    for name in sorted(shapes):
        group.append(name)
        size += torch.Size(shapes[name]).numel() * item_bytes
        if size >= _SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _repeat(block: torch.Tensor, shape: tuple[int, ...], number: int) -> torch.Tensor:
    numbers = torch.Size(shape).numel()
    first = number * _PRIME % _BLOCK
    whole = torch.empty(numbers, dtype=block.dtype)
    done = min(numbers, _BLOCK - first)
    whole[:done] = block[first : first + done]
    while done < numbers:
        more = min(numbers - done, _BLOCK)
        whole[done : done + more] = block[:more]
        done += more
    return whole.view(shape)
