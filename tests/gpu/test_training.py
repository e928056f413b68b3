"""The recipe's compiled training pass on a GPU: FlexAttention and compiled layers, beside the dense mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.train_drafter.blocks import block_hidden, dense_attention, flex_attention_for
from tests.pairs import TargetSpec, drafter_config, make_drafter, reference_drafter

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees"),
    pytest.mark.filterwarnings("ignore"),  # of torch.compile, about the machine
]

SPEC = TargetSpec("qwen3", hidden=64, heads=4, kv_heads=2, head_dim=16)
BATCH, ROWS, BLOCKS, BLOCK = 3, 256, 40, 8


def hidden_and_gradients(
    model: Any, features: torch.Tensor, embedded: torch.Tensor, anchors: torch.Tensor, *, compiled: bool
) -> list[torch.Tensor]:
    attention = flex_attention_for if compiled else dense_attention
    attend = attention(anchors, ROWS, BLOCK)
    model.zero_grad()
    hidden = block_hidden(model, features, embedded, anchors, attend, compiled=compiled)
    torch.sin(hidden).sum().backward()  # type: ignore[no-untyped-call]
    return [hidden.detach(), *(parameter.grad for parameter in model.parameters())]


def test_compiled_training_is_the_eager_one(tmp_path: Path) -> None:
    make_drafter(tmp_path / "drafter", drafter_config(SPEC, layers=2, block_size=BLOCK, head_dim=16))
    model: Any = reference_drafter(tmp_path / "drafter").cuda().train()
    draw = torch.Generator().manual_seed(1)
    anchors = torch.stack([torch.randperm(ROWS, generator=draw)[:BLOCKS].sort().values for _ in range(BATCH)])
    features = torch.randn(BATCH, ROWS, model.fc.in_features, generator=draw).cuda()
    embedded = torch.randn(BATCH, BLOCKS, BLOCK, SPEC.hidden, generator=draw).cuda()
    wanted = hidden_and_gradients(model, features, embedded, anchors.cuda(), compiled=False)
    found = hidden_and_gradients(model, features, embedded, anchors.cuda(), compiled=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    # A rule that is off by one row is far outside of that.
    moved = hidden_and_gradients(model, features, embedded, (anchors + 1).cuda(), compiled=False)
    assert (moved[0] - wanted[0]).norm() > 1e-2 * wanted[0].norm()
