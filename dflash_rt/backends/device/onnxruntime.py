"""ONNX Runtime on a device: its CPU kernels on the host, its CUDA kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from dflash_rt.backends.device.plan import Run
from dflash_rt.backends.device.protocols import Device, Work
from dflash_rt.backends.onnxruntime_session import open_graph, require_fused, run_bound
from dflash_rt.bundle.dtypes import ONNX_TYPES
from dflash_rt.bundle.onnx_scan import weight_bytes
from dflash_rt.errors import BackendError

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["OnnxRuntimeEngines"]


class OnnxRuntimeEngines:
    """:class:`~dflash_rt.backends.device.protocols.Engines` on the GPU with ``cuda``, else on the host.

    Every tensor is bound to its address, so that a run copies nothing. With CUDA a run only enqueues work on
    the device's own stream, and doesn't wait for it. ``fused`` takes that form of the target.

    Raises:
        BackendError: the bundle has no fused target for this kind of device.
    """

    def __init__(
        self, bundle: Bundle, *, cuda: bool, threads: int | None = None, fused: bool = False
    ) -> None:
        if fused:
            require_fused(bundle, on_gpu=cuda)
        self._fused = fused
        self._bundle = bundle
        self._cuda = cuda
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self.max_seq_len = bundle.manifest.limits.max_seq_len
        self.capacity: int | None = None
        self.weight_bytes = sum(weight_bytes(bundle.graph_path(graph)) for graph in bundle.manifest.graphs)

    def load(self, device: Device) -> int:
        """Make the sessions; see the protocol. ONNX Runtime keeps its own scratch memory."""
        for graph in self._bundle.manifest.graphs:
            self._sessions[graph] = self._load(graph, device)
        return 0

    def prepare(self, run: Run, address: Callable[[str], int], scratch: int) -> Work:
        session = self._sessions[run.graph]
        binding = session.io_binding()
        place = "cuda" if self._cuda else "cpu"
        for bind, items in ((binding.bind_input, run.inputs), (binding.bind_output, run.outputs)):
            for item in items:
                bind(item.tensor, place, 0, ONNX_TYPES[item.dtype], item.shape, address(item.buffer))
        options = ort.RunOptions()
        if self._cuda:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            options.add_run_config_entry("gpu_graph_id", "-1")  # no capture by ONNX Runtime itself
        shapes = ", ".join(f"{item.tensor} {item.shape}" for item in run.inputs[:2])
        return partial(run_bound, session, run.graph, binding, shapes, options)

    def require_capturable(self) -> None:
        """ONNX Runtime doesn't tell."""

    def close(self) -> None:
        self._sessions.clear()

    def _load(self, graph: str, device: Device) -> Any:
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._cuda:
            cuda = {"device_id": "0", "user_compute_stream": str(device.stream)}
            # The backend captures graphs, and ONNX Runtime has to believe that it does so itself. Otherwise
            # it frees pinned buffers in callbacks on the stream, which a captured graph would call again at
            # each launch, and which end the process when they outlive the session. Its own arena grows by
            # what is asked for.
            cuda |= {"enable_cuda_graph": "1", "arena_extend_strategy": "kSameAsRequested"}
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        session = open_graph(
            self._bundle,
            graph,
            fused=self._fused,
            on_gpu=self._cuda,
            threads=self._threads,
            config={},
            providers=providers,
            # Errors alone: each load warns that shapes are computed on the CPU. They are the same in each run
            # that a graph was captured for.
            log_severity=3 if self._cuda else None,
            package="onnxruntime-gpu 1.31" if self._cuda else "onnxruntime 1.32",
        )
        # ONNX Runtime falls back to the CPU with a warning only; tensors on the GPU would then be copied.
        if self._cuda and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime can't run graph {graph} on the GPU",
                found="execution providers " + ", ".join(session.get_providers()),
                expected="CUDAExecutionProvider",
                remedy="check the driver with nvidia-smi, and that CUDA and cuDNN fit this onnxruntime-gpu",
            )
        return session
