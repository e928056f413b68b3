"""A request's random numbers: each depends on the seed, its purpose and its position alone.

They are the upper 53 bits of Philox-4x64's output, with the seed and the purpose as key and the position in
the counter: numpy promises to keep these streams. (J. Salmon et al., Parallel random numbers:
as easy as 1, 2, 3, SC 2011.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dflash_rt.sampling.distribution import noise_size

__all__ = ["Noise", "Uniforms"]

_DRAWN_AT_ONCE = 64
_WORDS = 4  # words that Philox gives for each value of its counter


class Uniforms:
    """One number in ``[0, 1)`` for each position, a multiple of 2^-53.

    The counter starts at 1; each word that it gives belongs to one position. ``stream`` is the upper half of
    the key and gives other numbers for the same seed.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._key = seed + (stream << 64)
        self._bits: np.random.Philox | None = None  # made on first use: most requests never need it
        self._drawn: list[float] = []

    def __getitem__(self, position: int) -> float:
        while position >= len(self._drawn):
            if self._bits is None:
                self._bits = np.random.Philox(key=self._key)
            self._drawn += _uniform(self._bits.random_raw(_DRAWN_AT_ONCE)).tolist()
        return self._drawn[position]


class Noise:
    """Numbers with the exponential distribution of mean 1, as many at each position as a choice needs.

    They are ``-log(1 - u)`` of uniform numbers u. Each position starts at its own value of the counter, so
    its numbers can be drawn without those of earlier positions.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def at(self, position: int, vocab_size: int) -> npt.NDArray[np.float64]:
        """float64 ``[noise]`` for :meth:`dflash_rt.sampling.distribution.Distribution.pick`."""
        size = noise_size(vocab_size)
        values = -(-size // _WORDS)
        bits = np.random.Philox(key=self._seed, counter=position * values)
        noise: npt.NDArray[np.float64] = -np.log1p(-_uniform(bits.random_raw(size)))
        return noise


def _uniform(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    uniform: npt.NDArray[np.float64] = (words >> np.uint64(11)) * np.float64(2.0**-53)
    return uniform
