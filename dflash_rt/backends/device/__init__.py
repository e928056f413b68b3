"""A step that never leaves a device: its plan, the device's memory and stream, and who runs graphs."""

from __future__ import annotations

from dflash_rt.backends.device.protocols import Device, Engines

__all__ = ["Device", "Engines"]
