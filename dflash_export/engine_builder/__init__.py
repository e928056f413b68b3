"""Builds TensorRT and TensorRT-RTX engines from the graphs of a bundle. See docs/engines.md.

Everything that differs between the two libraries is in :mod:`~dflash_export.engine_builder.vendor`.
"""

from __future__ import annotations

from dflash_export.engine_builder.compiler import CompiledEngines, compile_engines
from dflash_export.engine_builder.devices import DEVICE_CLASSES, DeviceClass
from dflash_export.engine_builder.vendor import BACKENDS

__all__ = ["BACKENDS", "DEVICE_CLASSES", "CompiledEngines", "DeviceClass", "compile_engines"]
