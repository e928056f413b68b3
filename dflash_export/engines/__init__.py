"""Builds TensorRT and TensorRT-RTX engines from the graphs of a bundle. See docs/reference/engines.md.

Everything that differs between the two libraries is in :mod:`~dflash_export.engines.vendor`. Nothing
is imported here: the command line asks ``vendor`` and ``devices`` for names, and must not wait for ONNX.
"""
