"""Pure decisions of a parity run: what an error of logits says about tokens.

docs/guide/verify.md explains why it is done this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dflash_export.errors import VerifyError
from dflash_export.parity.error_stats import ErrorStats

__all__ = [
    "Limits",
    "Verdict",
    "classify",
    "compare_steps",
    "equal_prefix",
    "first_difference",
    "logit_gaps",
    "make_limits",
]

Array: TypeAlias = npt.NDArray[Any]
Verdict: TypeAlias = Literal["equal", "near tie", "bug"]

# How much larger than PyTorch's own noise our error may be. Right graphs came out at 0.8 to 1.2 times; a
# worst row is one sample of a long tail.
_MEDIAN_FACTOR = 4.0
_WORST_FACTOR = 10.0
# Below these nothing is called wrong: PyTorch's noise may be zero on a short run. In units of the roundoff of
# fp32; right graphs came out at 10 to 50 (median row) and 30 to 220 (worst row).
_FP32_ROUNDOFF = 2.0**-24
_MEDIAN_FLOOR = 100 * _FP32_ROUNDOFF
_WORST_FLOOR = 1000 * _FP32_ROUNDOFF
# Above these PyTorch in fp32 is no yardstick; it came out a thousand times below them.
_MEDIAN_REPEATED = 1e-3
_WORST_REPEATED = 1e-2
# Spacing of floats of a precision in units of fp32's: logits are computed in it and then widened.
_SPACING = {"fp32": 1.0, "fp16": 2.0**13, "bf16": 2.0**16}


@dataclass(frozen=True)
class Limits:
    """What may be called a near tie, and how wrong logits may be.

    Attributes:
        near_tie: a token whose logit in PyTorch is at most this far below PyTorch's best.
        own_tie: the same for the bundle's own logits, one row at a time.
        median_row: largest allowed error of the median row, in units of the logits' standard deviation.
        worst_row: the same of the worst row.
        mixture: the target has experts. At a router's near tie another expert answers, and a few rows jump,
            in PyTorch as in ours; so "worst" means 99 % of the rows.
    """

    near_tie: float
    own_tie: float
    median_row: float
    worst_row: float
    mixture: bool = False

    def allow(self, stats: ErrorStats) -> bool:
        """Whether logits are as right as those of PyTorch."""
        median, worst = _row_errors(stats, self.mixture)
        return median <= self.median_row and worst <= self.worst_row


def make_limits(
    *,
    errors: Iterable[ErrorStats],
    shapes: Iterable[ErrorStats],
    repeated: ErrorStats,
    noise: ErrorStats,
    precision: str,
    mixture: bool = False,
) -> Limits:
    """The limits of one parity run, from what was measured in it.

    Args:
        errors: our logits against PyTorch's, one for each pass shape.
        shapes: our logits against our own in another pass shape.
        repeated: PyTorch against itself: ``generate`` with a cache against one pass without.
        noise: what this precision costs PyTorch itself: ``repeated`` in fp32; in 16 bits, PyTorch in 16 bits
            against PyTorch in fp32.
        precision: of the bundle.
        mixture: whether the target has experts.

    Raises:
        VerifyError: PyTorch differs from itself by more than rounding, so that nothing can be judged by it.

    Two logits that are each off by at most e can change places only if they are at most 2e apart. That alone
    would let broken graphs excuse themselves with their own error, so the error itself has a limit, which
    comes from PyTorch's noise and never from ours; above it, our error doesn't count for the bound either.
    """
    _require_consistent(repeated, mixture)
    errors, shapes = tuple(errors), tuple(shapes)
    median, worst = _row_errors(noise, mixture)
    limits = Limits(
        near_tie=2 * max([repeated.max_abs, *(stats.max_abs for stats in errors)]),
        own_tie=2 * max([0.0, *(stats.max_abs for stats in shapes)]),
        median_row=max(_MEDIAN_FACTOR * median, _MEDIAN_FLOOR),
        worst_row=max(_WORST_FACTOR * worst, _WORST_FLOOR),
        mixture=mixture,
    )
    if not all(limits.allow(stats) for stats in errors):
        limits = replace(limits, near_tie=2 * max(repeated.max_abs, noise.max_abs))
    # Logits can't be told apart below the spacing of floats, however equal two pass shapes came out.
    largest = max((stats.largest for stats in errors), default=0.0)
    spacing = float(np.spacing(np.float32(largest))) * _SPACING[precision]
    return replace(limits, own_tie=max(limits.own_tie, 2 * spacing))


def _row_errors(stats: ErrorStats, mixture: bool) -> tuple[float, float]:
    """Errors of the median and of the worst row, in units of the standard deviation."""
    worst = stats.row_99 if mixture else stats.worst_row
    return stats.relative(stats.median_row), stats.relative(worst)


def _require_consistent(repeated: ErrorStats, mixture: bool) -> None:
    median, worst = _row_errors(repeated, mixture)
    if median > _MEDIAN_REPEATED or worst > _WORST_REPEATED:
        raise VerifyError(
            "PyTorch's generate and PyTorch's one pass over the same tokens disagree",
            found=f"logits off by {median:.1e} of their standard deviation in a median row, {worst:.1e} in"
            " the worst",
            expected=f"rounding: at most {_MEDIAN_REPEATED:.0e} and {_WORST_REPEATED:.0e}",
            remedy="use the versions of torch and transformers that the bundle was built with",
        )


def classify(logit_gap: float, bound: float, *, same: bool = False) -> Verdict:
    """Sort one token: ``same`` as the expected one, excused by a near tie, or a bug.

    ``logit_gap`` is how far its logit is below the best one. What isn't a number is a bug.
    """
    if same:
        return "equal"
    return "near tie" if logit_gap <= bound else "bug"


def logit_gaps(logits: Array, token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """How far each token's logit is below the best of its row: ``logits [tokens, vocab]`` to ``[tokens]``."""
    chosen = logits[np.arange(len(token_ids)), np.asarray(token_ids, np.int64)]
    below: npt.NDArray[np.float64] = (logits.max(axis=1) - chosen).astype(np.float64)
    return below


def equal_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first difference, None for equal sequences. One that ends early differs where it ends."""
    shared = equal_prefix(first, second)
    return None if shared == len(first) == len(second) else shared


def compare_steps(
    tokens: Sequence[int], gained: Sequence[int], other_tokens: Sequence[int], other_gained: Sequence[int]
) -> tuple[int, int]:
    """How many steps began at the same token in two drafted runs, and in how many both gained as many tokens.

    Steps are compared for as long as the tokens agree.
    ``gained`` is tokens per step, bonus included; the first token comes from the prefill. A step that reaches
    the end counts only as far as the end: one loop cuts it there, the other doesn't.
    """
    shared = equal_prefix(tokens, other_tokens)
    first, second = _by_start(gained, shared), _by_start(other_gained, shared)
    common = first.keys() & second.keys()
    return len(common), sum(first[start] == second[start] for start in common)


def _by_start(gained: Sequence[int], end: int) -> dict[int, int]:
    steps, start = {}, 1
    for count in gained:
        if start >= end:
            break
        steps[start] = min(count, end - start)
        start += count
    return steps
