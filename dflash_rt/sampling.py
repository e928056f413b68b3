"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from dflash_rt.errors import SamplingError

__all__ = ["SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """Greedy decoding: ``temperature`` is 0, and that is the only value of this version.

    Other parameters (top-p, top-k, penalties, a seed) don't exist yet; Python refuses them by name.

    Raises:
        SamplingError: ``temperature`` is not a number, or not 0.
    """

    temperature: float = 0.0

    def __post_init__(self) -> None:
        value: object = self.temperature  # nothing checks types at run time but this
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or value < 0:
            raise SamplingError(
                "temperature is not a temperature",
                found=repr(value),
                expected="the number 0",
                todo="leave temperature out, or pass 0",
            )
        if value != 0:
            raise SamplingError(
                "this version decodes greedily only",
                found=f"temperature={value}",
                expected="temperature=0",
                todo="leave temperature out, or pass 0; sampling comes in a later version",
            )
