"""Which cases of a parametrised test run in `make test`: the others are slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """``cases`` for parametrize: all but ``fast`` are marked slow."""
    cases = list(cases)
    assert all(case in cases for case in fast), "a fast case that is none"
    return [case if case in fast else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
