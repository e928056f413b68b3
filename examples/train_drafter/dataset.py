"""Sequences for training: read back from the data files, batched, with anchors drawn at random.

What a step trains on depends on the seed and the step's number alone, so a run that was interrupted goes on
exactly as if it hadn't been.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dflash_export.errors import CheckpointError, SourceError

__all__ = ["Batch", "Sequences", "read_sequences"]

_PAD_TO = 128  # on CUDA: FlexAttention's tiles, and few shapes to compile for


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences with anchors.

    Attributes:
        ids: int64 ``[batch, rows]``, zeros after each end.
        lengths: int64 ``[batch]``, tokens of each sequence.
        anchors: int64 ``[batch, blocks]``, ascending positions inside the answers.
        real: bool ``[batch, blocks]``; False fills up where an answer is short.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    anchors: torch.Tensor
    real: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = (self.ids, self.lengths, self.anchors, self.real)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with their answers, end to end in ``ids``. All tensors are 1-D, on the CPU."""

    ids: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def new_tokens(self, *, skip: int) -> int:
        """Tokens of the answers from sequence ``skip`` on."""
        return int((self.lengths - self.prompt_lengths)[skip:].sum())

    def batch(self, chosen: torch.Tensor, anchors: int, draw: torch.Generator, *, fixed_shape: bool) -> Batch:
        """The sequences ``chosen`` (int64 ``[batch]``), with at most ``anchors`` anchors each.

        Anchors are distinct positions from the answer's first token to its last but one: what an anchor can
        be in the decoding loop. ``fixed_shape`` pads to a length and a number of blocks that are the same for
        all batches.
        """
        ids, lengths = self._padded(chosen, fixed_shape)
        rows = ids.shape[1]
        place = torch.arange(rows)
        allowed = (place >= self.prompt_lengths[chosen][:, None]) & (place < lengths[:, None] - 1)
        scores = torch.rand(allowed.shape, generator=draw).where(allowed, -1.0)
        best, positions = scores.topk(min(anchors, rows), dim=1)
        blocks = best.shape[1] if fixed_shape else int((best >= 0).sum(1).max())
        positions, order = positions[:, :blocks].where(best[:, :blocks] >= 0, rows).sort(dim=1)
        real = best[:, :blocks].gather(1, order) >= 0
        return Batch(ids, lengths, positions.where(real, 0), real)

    def all_anchors(self, chosen: torch.Tensor, at_once: int, *, fixed_shape: bool) -> Iterator[Batch]:
        """The sequences ``chosen`` with every anchor that they can have, ``at_once`` of them after another.

        Side by side, the batches' blocks are the anchors in order, without gaps.
        """
        ids, lengths = self._padded(chosen, fixed_shape)
        first = self.prompt_lengths[chosen].long()
        most = int((lengths - 1 - first).max())
        for start in range(0, most, at_once):
            end = start + at_once if fixed_shape else min(start + at_once, most)
            anchors = first[:, None] + torch.arange(start, end)
            real = anchors < lengths[:, None] - 1
            yield Batch(ids, lengths, anchors.where(real, 0), real)

    def _padded(self, chosen: torch.Tensor, fixed_shape: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids ``[batch, rows]`` and lengths ``[batch]``, both int64."""
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        lengths = self.lengths[chosen].long()
        rows = int((self.lengths if fixed_shape else lengths).max())
        if fixed_shape:
            rows = -(-rows // _PAD_TO) * _PAD_TO
        ids = torch.zeros(len(chosen), rows, dtype=torch.long)
        for row, (start, length) in enumerate(zip(starts[chosen].tolist(), lengths.tolist(), strict=True)):
            ids[row, :length] = self.ids[start : start + length]
        return ids, lengths

    def shuffled(self, step: int, batch: int, seed: int, *, skip: int) -> torch.Tensor:
        """Indices for one step: ``batch`` of those from ``skip`` on, each once in every pass over them."""
        count = len(self) - skip
        places = torch.arange(step * batch, (step + 1) * batch)
        chosen = torch.empty(batch, dtype=torch.long)
        for epoch in sorted(set((places // count).tolist())):
            order = _order(count, seed, epoch)
            mine = places // count == epoch
            chosen[mine] = order[places[mine] % count] + skip
        return chosen


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator(seed, epoch))


def generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of their own for one step or epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def read_sequences(folder: Path) -> Sequences:
    """All data files of a folder; answers too short for a draft are left out.

    In an order that is random, and the same each time: a file holds prompts of similar length, and the first
    sequences are those for validation.

    Raises SourceError when there is nothing to train on and CheckpointError for a damaged file.
    """
    ids, lengths, prompts = [], [], []
    for path in sorted(folder.glob("batch-*.safetensors")):
        try:
            tensors = load_file(path)
            own, prompt = tensors["lengths"].long(), tensors["prompt_lengths"].long()
            pieces = torch.split(tensors["ids"], own.tolist())
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} can't be read",
                found=error,
                expected="a data file as the data command writes it",
                remedy="delete the file and make it again with the same command",
            ) from error
        keep = own - prompt >= 2
        ids += [piece for piece, kept in zip(pieces, keep.tolist(), strict=True) if kept]
        lengths.append(own[keep])
        prompts.append(prompt[keep])
    if not ids:
        raise SourceError(
            "there is nothing to train on",
            found=f"no answers of two tokens or more in {folder}",
            expected="data files",
            remedy="make data first",
        )
    order = torch.randperm(len(ids), generator=generator(0, 0))
    shuffled = torch.cat([ids[index] for index in order.tolist()])
    return Sequences(shuffled, torch.cat(lengths)[order], torch.cat(prompts)[order])
