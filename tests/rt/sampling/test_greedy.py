from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_rt.sampling.greedy import accept_greedy


@pytest.mark.parametrize(
    ("drafted", "verified", "accepted"),
    [
        ([7, 8, 9], [7, 8, 9, 3], 3),
        ([7, 8, 9], [7, 8, 5, 3], 2),
        ([7, 8, 9], [7, 5, 9, 3], 1),  # agreement after a rejection counts for nothing
        ([7, 8, 9], [5, 8, 9, 3], 0),
        ([7, 7, 7], [7, 7, 7, 7], 3),
        ([0], [0, 0], 1),
        ([0], [1, 0], 0),
        ([], [4], 0),  # plain decoding: nothing was drafted
    ],
)
def test_table(drafted: list[int], verified: list[int], accepted: int) -> None:
    result = accept_greedy(np.array([drafted], dtype=np.int64), np.array([verified], dtype=np.int64))
    assert result.dtype == np.int64
    assert result.tolist() == [accepted]


def naive(drafted: list[int], verified: list[int]) -> int:
    for position, token in enumerate(drafted):
        if token != verified[position]:
            return position
    return len(drafted)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    token = st.integers(0, 2)  # a tiny vocabulary, so that every count turns up
    drafted = draw(st.lists(token, min_size=batch * (width - 1), max_size=batch * (width - 1)))
    verified = draw(st.lists(token, min_size=batch * width, max_size=batch * width))
    return (
        np.array(drafted, dtype=np.int64).reshape(batch, width - 1),
        np.array(verified, dtype=np.int64).reshape(batch, width),
    )


@settings(deadline=None)
@given(blocks())
def test_equals_a_naive_loop(block: tuple[np.ndarray, np.ndarray]) -> None:
    drafted, verified = block
    before = drafted.copy(), verified.copy()
    expected = [naive(d, v) for d, v in zip(drafted.tolist(), verified.tolist(), strict=True)]
    assert accept_greedy(drafted, verified).tolist() == expected
    np.testing.assert_array_equal(drafted, before[0])
    np.testing.assert_array_equal(verified, before[1])
