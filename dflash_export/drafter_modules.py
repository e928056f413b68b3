"""The torch modules that only some kinds of drafter have."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DraftLmHead"]


class DraftLmHead(nn.Module):
    """A drafter's own head: ``hidden [batch, rows, hidden]`` to fp32 logits over its own vocabulary.

    ``target_ids`` is int64 ``[draft_vocab]``, the target's id of each of its tokens; ``None`` where both are
    the same.
    """

    def __init__(self, weight: nn.Parameter, target_ids: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.target_ids = target_ids

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[batch, rows, draft_vocab]`` and the target's ids ``[batch, rows]`` of the best tokens."""
        logits = nn.functional.linear(hidden, self.weight).float()
        best = logits.argmax(-1)
        return logits, best if self.target_ids is None else self.target_ids[best]
