"""The attention masks of exported graphs against the rule written out."""

from __future__ import annotations

import pytest
import torch

from dflash_export.graphs.operators import Visibility


@pytest.mark.parametrize("window", [None, 1, 2, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_masks(causal: bool, window: int | None) -> None:
    positions, capacity = torch.tensor([[3, 4, 5], [0, 1, 2]]), 9
    mask = Visibility(positions, capacity).mask(causal=causal, window=window)
    expected = torch.tensor(
        [
            [
                [
                    [seen(int(row), key, int(rows[-1]), causal, window) for key in range(capacity)]
                    for row in rows
                ]
            ]
            for rows in positions
        ]
    )
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)


def seen(row: int, key: int, last: int, causal: bool, window: int | None) -> bool:
    """Rows up to its own, or up to the block's last; with a window fewer than that many apart."""
    return key <= (row if causal else last) and (window is None or abs(row - key) < window)
