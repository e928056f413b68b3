"""How much memory of a device a bundle needs, known before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_rt.device.plan import Layout
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

        Raises:
            BackendError: names every part, and how much there is.
        """
        for what, available in (("the limit", limit), ("free", free)):
            if available is not None and self.total > available:
                raise BackendError(
                    "the bundle doesn't fit into the device's memory",
                    found=str(self),
                    expected=f"at most {_megabytes(available)} ({what})",
                    todo="choose a shorter max_seq_len, 16-bit precision, or a larger device"
                    + (", or raise memory_limit" if what == "the limit" else ""),
                )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
