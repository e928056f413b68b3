"""The sessions of a bundle on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnxruntime as ort

from dflash_rt.backends.onnxruntime_session import open_session
from dflash_rt.bundle.manifest import GraphSpec

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["load_sessions"]


def load_sessions(
    bundle: Bundle,
    graphs: Mapping[str, GraphSpec],
    *,
    threads: int | None,
    fused: bool | None,
    integer_activations: bool,
) -> dict[str, ort.InferenceSession]:
    """One session for each graph; the arguments are those of the backend. Raises BackendError."""
    if integer_activations:
        config = {"session.qdq_matmulnbits_accuracy_level": "4"}  # int8
    else:
        config = {"session.disable_quant_qdq": "1"}  # constants are folded
    sessions = {}
    for name, graph in graphs.items():
        path = None if fused is False else bundle.fused_path(name)
        sessions[name] = open_session(
            name,
            path or bundle.graph_path(name),
            threads=1 if graph.is_lookup else threads,
            config=config,
        )
    return sessions
