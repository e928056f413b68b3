"""Acceptance: how many drafted tokens the target agrees with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dflash_rt.arrays import IntArray

__all__ = ["accept_greedy", "accept_in_order"]


def accept_greedy(drafted: IntArray, verified: IntArray) -> IntArray:
    """Count the drafted tokens before the first one that the target would not have chosen.

    ``drafted`` is int64 ``[batch, drafts]``, ``verified`` is int64 ``[batch, drafts + 1]``. Returns int64
    ``[batch]``, each from 0 to ``drafts``. ``verified[:, j]`` is the target's choice at the position of
    ``drafted[:, j]``, so equal columns are compared, and ``verified[b, accepted[b]]`` is the bonus::

        drafted   7 8 9        accepted = 2: 7 and 8 stand, 9 is rejected
        verified  7 8 5 3      bonus    = 5; the 3 follows a rejected token and means nothing

    The tokens of the step are ``verified[b, : accepted[b] + 1]``. Greedy verification as in DFlash
    (arXiv 2602.06036) and its reference ``dflash.model.dflash_generate``.
    """
    agrees = drafted == verified[:, :-1]
    # A running AND: one disagreement rejects everything after it, even where the two agree again.
    accepted: IntArray = np.logical_and.accumulate(agrees, axis=1).sum(axis=1, dtype=np.int64)
    return accepted


def accept_in_order(drafted: Sequence[int], choose: Callable[[int], int]) -> list[int]:
    """The tokens of a step, chosen one by one: accepted drafts, and the token after them.

    ``choose(j)`` is the target's choice after row j of the block, given that the drafts before it were
    accepted. It is called for rows in order, up to the first draft that differs::

        drafted   7 8 9        choose(0) = 7, choose(1) = 8, choose(2) = 5; choose(3) is not asked
        returns   7 8 5        2 accepted, and the bonus
    """
    tokens: list[int] = []
    for row in range(len(drafted) + 1):
        tokens.append(choose(row))
        if row < len(drafted) and tokens[row] != drafted[row]:
            break
    return tokens
