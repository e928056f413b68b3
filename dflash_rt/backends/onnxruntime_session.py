"""Sessions of ONNX Runtime, made in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from dflash_rt.errors import BackendError

__all__ = ["open_session"]

_CPU = ("CPUExecutionProvider",)


def open_session(
    graph: str,
    path: str | Path,
    *,
    threads: int | None,
    config: Mapping[str, str],
    providers: Sequence[Any] = _CPU,
    log_severity: int | None = None,
    package: str = "onnxruntime 1.32",
) -> ort.InferenceSession:
    """Load ``graph`` from ``path``; ``threads`` of ``None``: one per physical core.

    ``config`` are entries of the session's configuration, ``package`` is what to use if it can't be loaded.
    Raises BackendError.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Without this the idle threads of one session spin for milliseconds into the run of the next.
    for key, value in {"session.force_spinning_stop": "1", **config}.items():
        options.add_session_config_entry(key, value)
    if log_severity is not None:
        options.log_severity_level = log_severity
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's own classes share no public base
        kind = "CPU kernels" if tuple(providers) == _CPU else "kernels"
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't load graph {graph}",
            found=str(error),
            expected=f"a graph of opset 24 whose operators have {kind} of its precision",
            remedy=f"use {package} or newer; on a CPU, build the bundle with --precision fp32",
        ) from error
