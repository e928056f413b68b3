"""How far logits and features are apart, gathered over many passes without keeping them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dflash_rt.errors import NumericalError

__all__ = ["ErrorCollector", "ErrorStats", "FeatureError", "FeatureErrorCollector"]

Array: TypeAlias = npt.NDArray[Any]

_TINY = 1e-30  # logits that are all alike have no deviation


@dataclass(frozen=True)
class ErrorStats:
    """How far logits are from the ones they should be.

    Attributes:
        rows: positions compared.
        values: single logits compared.
        max_abs: largest absolute difference.
        rms: root mean square of all differences.
        median_row: root mean square of one row, the median of all rows.
        row_99: the same; 99 % of the rows are at most this.
        worst_row: the same, the largest.
        std: standard deviation of the right logits within a row; the unit of the relative errors.
        largest: largest magnitude of a right logit.
    """

    rows: int
    values: int
    max_abs: float
    rms: float
    median_row: float
    row_99: float
    worst_row: float
    std: float
    largest: float

    def relative(self, error: float) -> float:
        """One of the errors above in units of ``std``."""
        return error / max(self.std, _TINY)


class ErrorCollector:
    """Gathers :class:`ErrorStats` over many calls, without keeping logits."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = 0
        self._max = self._largest = self._variance_sum = 0.0
        self._row_squares: list[float] = []

    def add(self, found: Array, right: Array) -> None:
        """Compare float32 ``[rows, vocab]`` each. Raises NumericalError for what isn't finite."""
        if not found.size:
            return
        difference = np.abs(found - right)
        if not np.isfinite(difference).all():
            raise NumericalError(
                f"logits of {self._name} are not finite",
                found=f"{int((~np.isfinite(difference)).sum())} of {difference.size} values",
                expected="finite logits",
                remedy="build the bundle with precision bf16 or fp32, and check the checkpoint",
            )
        self._row_squares += np.square(difference, dtype=np.float64).mean(axis=1).tolist()
        self._values += difference.size
        self._max = max(self._max, float(difference.max()))
        self._largest = max(self._largest, float(np.abs(right).max()))
        self._variance_sum += float(right.var(axis=1, dtype=np.float64).sum())

    def result(self) -> ErrorStats:
        """What was gathered so far; all zeros before the first call."""
        squares = np.array(self._row_squares or [0.0])
        median, row_99, worst = np.sqrt(np.quantile(squares, [0.5, 0.99, 1.0], method="inverted_cdf"))
        return ErrorStats(
            rows=len(self._row_squares),
            values=self._values,
            max_abs=self._max,
            rms=math.sqrt(squares.mean()),
            median_row=float(median),
            row_99=float(row_99),
            worst_row=float(worst),
            std=math.sqrt(self._variance_sum / squares.size),
            largest=self._largest,
        )


@dataclass(frozen=True)
class FeatureError:
    """Error of one tapped layer, as a share of each row's norm: root mean square and worst over rows."""

    layer: int
    rms: float
    worst: float


class FeatureErrorCollector:
    """Gathers :class:`FeatureError` for each tap."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._squares = np.zeros(len(layers))
        self._worst = np.zeros(len(layers))
        self._rows = 0

    def add(self, found: Array, right: Array) -> None:
        """Compare features, float32 ``[rows, taps, hidden]``.

        Row by row, because the first row of real models is a thousand times larger than the others and would
        be all that a common norm sees.
        """
        norm = np.maximum(np.linalg.norm(right, axis=-1), np.finfo(np.float32).tiny)
        relative = np.linalg.norm(found - right, axis=-1) / norm
        self._squares += np.square(relative, dtype=np.float64).sum(axis=0)
        self._worst = np.maximum(self._worst, relative.max(axis=0))
        self._rows += found.shape[0]

    def result(self) -> tuple[FeatureError, ...]:
        """One entry per tap, in order."""
        rms = np.sqrt(self._squares / max(self._rows, 1))
        return tuple(
            FeatureError(layer, float(r), float(w))
            for layer, r, w in zip(self._layers, rms, self._worst, strict=True)
        )
