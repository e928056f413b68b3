"""ONNX Runtime on the CPU, graph by graph.

- ``backend``: :class:`OnnxRuntimeBackend`.
"""
