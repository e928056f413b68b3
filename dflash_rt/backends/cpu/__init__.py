"""ONNX Runtime on the CPU, graph by graph.

- ``backend``: :class:`OnnxRuntimeBackend`.
- ``sessions``: its ONNX Runtime sessions, one for each graph.
"""
