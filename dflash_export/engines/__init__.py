"""Builds TensorRT and TensorRT-RTX engines from the graphs of a bundle. See docs/reference/engines.md.

Nothing is imported here: the command line needs ``options`` alone, and must not wait for ONNX.
"""
