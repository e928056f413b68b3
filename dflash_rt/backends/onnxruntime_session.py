"""Sessions of ONNX Runtime: loading and running them, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from dflash_rt.errors import BackendError

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["open_graph", "open_session", "require_fused", "run_bound"]

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


def open_graph(
    bundle: Bundle, graph: str, *, fused: bool, threads: int | None, on_gpu: bool = False, **options: Any
) -> ort.InferenceSession:
    """Load a graph of ``bundle``, with ``fused`` in its fused form if it has one.

    ``options`` are those of :func:`open_session`. Raises BackendError.
    """
    path = bundle.fused_path(graph, on_gpu=on_gpu) if fused else None
    return open_session(
        graph,
        path or bundle.graph_path(graph),
        threads=1 if bundle.manifest.graphs[graph].is_lookup else threads,
        **options,
    )


def require_fused(bundle: Bundle, *, on_gpu: bool) -> None:
    """Raise BackendError unless the bundle has a fused target for this kind of device."""
    if bundle.fused_path("target", on_gpu=on_gpu) is None:
        raise BackendError(
            f"the bundle has no fused target for a {'GPU' if on_gpu else 'CPU'}",
            found=f"{bundle.manifest.target.model_type} in {bundle.manifest.precision}",
            expected=f"a target in {'fp16 or bf16' if on_gpu else 'fp32'} of a form that can be fused "
            "(docs/reference/bundle.md)",
            remedy="leave the option fused out, or build the bundle in that precision",
        )


def run_bound(
    session: ort.InferenceSession,
    graph: str,
    binding: ort.IOBinding,
    expected: str,
    options: ort.RunOptions | None = None,
) -> None:
    """Run over bound tensors; ``expected`` says over which shapes. Raises BackendError."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # ONNX Runtime's own classes share no public base
        raise BackendError(
            f"ONNX Runtime failed in graph {graph}",
            found=str(error),
            expected=f"a run over {expected}",
            remedy="check the bundle with `dflash-export inspect`; if it is whole, report this",
        ) from error
