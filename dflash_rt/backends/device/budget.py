"""How much memory of a device a bundle needs, known before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_rt.backends.device.plan import Layout
from dflash_rt.errors import BackendError

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Bytes on the device. ``scratch`` is what kernels share; engines tell it when they are loaded."""

    weights: int
    caches: int
    activations: int
    scratch: int = 0

    @classmethod
    def of(cls, layout: Layout, *, weights: int, scratch: int = 0) -> Budget:
        """The budget of a plan's buffers."""
        caches = layout.bytes_of("cache")
        return cls(weights, caches, layout.nbytes - caches, scratch)

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.caches + self.activations + self.scratch

    def __str__(self) -> str:
        parts = ("weights", "caches", "activations", "scratch", "total")
        return ", ".join(f"{part} {_megabytes(getattr(self, part))}" for part in parts)

    def check(self, *, free: int | None, limit: int | None) -> None:
        """Refuse what doesn't fit. ``free``: bytes that the device has for it; ``limit``: that it may take.

        A limit also stands for what is free: where a GPU shares the host's memory, as on a Jetson, that
        leaves out what the system would give back, such as cached files.

        Raises:
            BackendError: names every part, and how much there is.
        """
        available = free if limit is None else limit
        if available is None or self.total <= available:
            return
        what, advice = "the limit", "raise memory_limit"
        if limit is None:
            what = "free"
            advice = "set memory_limit where more can be had than is free, as on a GPU that shares the memory"
        raise BackendError(
            "the bundle doesn't fit into the device's memory",
            found=str(self),
            expected=f"at most {_megabytes(available)} ({what})",
            remedy=f"choose a shorter max_seq_len, 16-bit precision, or a larger device, or {advice}",
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
