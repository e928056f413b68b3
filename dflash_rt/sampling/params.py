"""Sampling parameters of a request, and the log-probabilities that it may ask for."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from numbers import Integral, Real

from dflash_rt.errors import SamplingError

__all__ = ["RANGES", "SamplingParams", "TokenLogprob"]

RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""Smallest and largest value of each number that isn't a count. Logits could overflow outside of them."""

_COUNTS = {"top_k": 2**31 - 1, "seed": 2**64 - 1, "logprobs": 20}
_OPTIONAL = ("seed", "logprobs")

# A drawn seed is reported as a JSON number, which many readers hold as a double.
_DRAWN_SEED_BITS = 53


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, in the order in which they act. The defaults are greedy decoding.

    docs/guide/sampling.md defines each of them. Drafted tokens have exactly the distribution of plain
    decoding.

    Attributes:
        repetition_penalty: divides positive logits and multiplies negative ones of every token of the prompt
            and of the output so far, as transformers does; 1 is none.
        presence_penalty: subtracted once from the logits of every token of the output so far.
        frequency_penalty: subtracted from them once for each time that the token came.
        temperature: divides the logits. 0 takes the most probable token, and ``top_k``, ``top_p`` and
            ``min_p`` change nothing.
        top_k: only the k most probable tokens, and those as probable as the k-th; 0 is all.
        top_p: only the fewest most probable tokens that together reach this probability; 1 is all.
        min_p: only tokens at least this times as probable as the most probable one; 0 is all.
        seed: same seed, same tokens, whatever else the generator does. ``None`` draws one and reports it in
            the result. Not used at temperature 0.
        logprobs: ``None`` for none. A number n gives the log-probability of each emitted token and of
            the n most probable ones, under the model's own logits: before penalties and temperature.

    Raises:
        SamplingError: a value has a wrong type or is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value: object = getattr(self, name)  # callers may pass any type
            if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
                raise _wrong(name, value, f"a number from {low:g} to {high:g}")  # NaN is in no range
        for name, most in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= most:
                alternative = " or None" if name in _OPTIONAL else ""
                raise _wrong(name, value, f"an integer from 0 to {most}{alternative}")

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty changes logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_logits(self) -> bool:
        """Whether the request needs logits; otherwise the backend's own argmax chooses its tokens."""
        return self.temperature != 0 or self.has_penalties or self.logprobs is not None

    def seeded(self) -> SamplingParams:
        """A copy with a seed from the operating system if one is needed and none is given."""
        if self.temperature == 0 or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(_DRAWN_SEED_BITS))


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of an emitted token's probability under the model's own logits.

    ``top`` holds ids and log-probabilities of as many most probable tokens as the request asked for, best
    first; the emitted token is among them if it is one of these.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def _wrong(name: str, value: object, expected: str) -> SamplingError:
    return SamplingError(
        f"{name} is wrong",
        found=f"{value!r} ({type(value).__name__})",
        expected=expected,
        remedy=f"correct {name}, or leave it out",
    )
