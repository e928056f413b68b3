"""The training forward gives what the reference drafter gives at inference, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import extract_context_feature
from torch.nn import functional

from examples.train_drafter.blocks import (
    block_hidden,
    block_labels,
    block_loss,
    dense_attention,
    flex_attention_for,
)
from examples.train_drafter.target import features_of
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target, reference_drafter

SPEC = TargetSpec("qwen3", vocab=40)
BLOCK = 4
ROWS = 21
# Ascending as in training: close enough to overlap, at the start, at the end.
ANCHORS = torch.tensor([[1, 2, 5, 6, 18], [3, 9, 10, 12, 20]])


class Pair:
    def __init__(self, folder: Path) -> None:
        self.target = make_target(folder / "target", SPEC).requires_grad_(False)
        make_drafter(folder / "drafter", drafter_config(SPEC, layers=3, block_size=BLOCK))
        self.drafter: Any = reference_drafter(folder / "drafter").requires_grad_(False)
        draw = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, SPEC.vocab - 1, (2, ROWS), generator=draw)
        self.features = features_of(self.target, self.ids, self.drafter.target_layer_ids)

    def embedded(self, anchors: torch.Tensor) -> torch.Tensor:
        """``[anchor, mask, …]`` of every block."""
        masks = torch.full((*anchors.shape, BLOCK - 1), self.drafter.mask_token_id)
        first = self.ids.gather(1, anchors)[:, :, None]
        return functional.embedding(
            torch.cat([first, masks], dim=2), self.target.get_input_embeddings().weight
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.drafter.compute_logits(hidden, self.target.lm_head)
        return result


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def as_inference(pair: Pair, row: int, anchor: int) -> torch.Tensor:
    """The reference's forward as ``dflash_generate`` calls it: features before the anchor, a block, no mask.

    The target runs over these tokens alone, so nothing of later ones can be in the features.
    """
    seen = pair.ids[row : row + 1, :anchor]
    features = features_of(pair.target, seen, pair.drafter.target_layer_ids)
    hidden = pair.drafter(
        position_ids=torch.arange(anchor + BLOCK)[None],
        noise_embedding=pair.embedded(ANCHORS)[row, ANCHORS[row] == anchor],
        target_hidden=features,
    )
    return pair.logits(hidden)[0]


@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_block_is_as_at_inference(pair: Pair, attention: str) -> None:
    attend = (
        dense_attention(ANCHORS, ROWS, BLOCK)
        if attention == "dense"
        else flex_attention_for(ANCHORS, ROWS, BLOCK, compiled=False)
    )
    hidden = block_hidden(pair.drafter, pair.features, pair.embedded(ANCHORS), ANCHORS, attend)
    trained = pair.logits(hidden)
    for row, anchors in enumerate(ANCHORS.tolist()):
        for block, anchor in enumerate(anchors):
            expected = as_inference(pair, row, anchor)
            assert expected.std() > 0.1
            torch.testing.assert_close(trained[row, block], expected, rtol=1e-4, atol=1e-4)


def test_the_comparison_sees_one_feature_too_many(pair: Pair) -> None:
    """What the test above rests on: the drafter does read the features nearest to the anchor."""
    for shift in (-1, 1):
        attend = dense_attention(ANCHORS + shift, ROWS, BLOCK)
        hidden = block_hidden(pair.drafter, pair.features, pair.embedded(ANCHORS), ANCHORS, attend)
        for row, anchors in enumerate(ANCHORS.tolist()):
            for block, anchor in enumerate(anchors):
                wrong = pair.logits(hidden)[row, block]
                assert (wrong - as_inference(pair, row, anchor)).abs().max() > 1e-3


def test_features_are_what_the_reference_taps(pair: Pair) -> None:
    """Also where a row is padded at its end."""
    layers = [0, 2]
    features = features_of(pair.target, pair.ids, layers)
    short = pair.ids[:, :9]
    hidden = pair.target(short, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features[:, :9], extract_context_feature(hidden, layers))


def test_labels_are_the_tokens_after_the_anchor() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14, 15, 0, 0]])
    anchors, real = torch.tensor([[2, 4, 0]]), torch.tensor([[True, True, False]])
    labels, counts = block_labels(ids, torch.tensor([6]), anchors, real, BLOCK)
    assert labels[0, 0].tolist() == [13, 14, 15]
    assert labels[0, 1, 0] == 15
    assert counts[0].tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_loss_in_pieces_is_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients: the pieces' logits are computed again in the backward pass."""
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(11, SPEC.hidden, generator=draw)
    labels = torch.randint(0, SPEC.vocab, (11,), generator=draw)
    weights = torch.rand(11, generator=draw)
    results = []
    for rows in (100, 4):
        monkeypatch.setattr("examples.train_drafter.blocks._ROWS_AT_ONCE", rows)
        leaf = hidden.clone().requires_grad_()
        loss, drafted = block_loss(pair.drafter, pair.target.lm_head, leaf, labels, weights)
        loss.backward()
        results.append((loss.detach(), drafted, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    logits = pair.logits(hidden)
    expected = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    torch.testing.assert_close(results[0][0], expected)
    assert torch.equal(results[0][1], logits.argmax(-1))
