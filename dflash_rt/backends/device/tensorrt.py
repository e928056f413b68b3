"""Built engines of a bundle on a GPU, by TensorRT or TensorRT-RTX: one Python API, one class."""

from __future__ import annotations

import importlib
import logging
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_rt.backends.device.cuda import CudaDevice
from dflash_rt.backends.device.plan import Binding, Run
from dflash_rt.backends.device.protocols import Device, Work
from dflash_rt.bundle.engine_match import Machine, compile_command, find_engines
from dflash_rt.bundle.engine_sets import EngineSet
from dflash_rt.errors import BackendError, BackendUnavailableError
from dflash_rt.files import write_atomically

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["KernelCache", "TensorRTEngines"]

_LOG = logging.getLogger("dflash_rt")
_WITHOUT_GRAPHS = "use the option cuda_graph=false, and report this"
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class TensorRTEngines:
    """See :class:`dflash_rt.backends.device.protocols.Engines`.

    One execution context for each graph and shape, since a captured graph belongs to the state of its
    context. They share the engine's weights, and the scratch memory: the stream runs one at a time.

    Raises:
        BackendUnavailableError: the library isn't installed, or doesn't load.
    """

    def __init__(self, bundle: Bundle, backend: str) -> None:
        self._bundle, self._backend = bundle, backend
        self._trt = _import(backend)
        self._logger = _make_logger(self._trt)
        self._runtime: Any = None
        self._engines: dict[str, Any] = {}
        self._stream = self._scratch_bytes = 0
        self._folder: Path = bundle.root
        self._set: EngineSet | None = None
        self._machine: Machine | None = None
        self._caches: dict[str, KernelCache] = {}
        self._unasked: list[tuple[str, Any]] = []  # contexts, and the graphs that they run
        self.max_seq_len = self.weight_bytes = 0
        self.capacity: int | None = None

    def find(self, device: CudaDevice, *, max_seq_len: int | None) -> None:
        """Choose the engine set that fits the GPU. Raises EngineError, with the command that builds one."""
        self._machine = machine = Machine(
            backend=self._backend,
            backend_version=str(self._trt.__version__),
            gpu=device.name,
            compute_capability=device.compute_capability,
        )
        self._folder, self._set = find_engines(self._bundle, machine, max_seq_len=max_seq_len)
        self.max_seq_len = self._set.limits.max_seq_len
        self.capacity = self._set.limits.capacity  # a constant of the engines
        # An engine is its weights, and little else.
        self.weight_bytes = sum(file.size for file in self._set.files.values())

    def load(self, device: Device) -> int:
        """Deserialize every engine, which puts its weights on the GPU; see the protocol."""
        assert self._set is not None
        self._stream = device.stream
        self._runtime = self._new_runtime(self._set.build.version_compatible)
        for graph, file in self._set.files.items():
            engine = self._deserialize(self._folder / file.name)
            if engine is None:
                raise self._failed(f"{self._folder.name}/{file.name} can't be loaded")
            self._engines[graph] = engine
            if self._backend == "tensorrt-rtx":
                self._caches[graph] = KernelCache(self._folder / f"{graph}.kernels")
        self._scratch_bytes = max(int(engine.device_memory_size_v2) for engine in self._engines.values())
        return self._scratch_bytes

    def prepare(self, run: Run, address: Callable[[str], int], scratch: int) -> Work:
        context = self._new_context(run.graph)
        if context is None:
            raise self._failed(f"no execution context for {run.graph}")
        if scratch:
            context.set_device_memory(scratch, self._scratch_bytes)
        stream = self._stream
        done = context.set_optimization_profile_async(self._profile(run), stream)
        for item in run.inputs:
            done = done and context.set_input_shape(item.tensor, item.shape)
        for item in (*run.inputs, *run.outputs):
            done = done and context.set_tensor_address(item.tensor, address(item.buffer))
        lacking = context.infer_shapes() if done else []
        if not done or lacking:
            raise self._failed(f"{run.graph} doesn't take {_shapes(run.inputs)}", ", ".join(lacking))
        self._unasked.append((run.graph, context))

        def work() -> None:
            if not context.execute_async_v3(stream):
                raise self._failed(f"{run.graph} failed")

        return work

    def require_capturable(self) -> None:
        while self._unasked:
            graph, context = self._unasked.pop()
            asked = getattr(context, "is_stream_capturable", None)  # not in every version
            if asked is not None and not asked(self._stream):
                raise self._failed(f"{graph} can't be captured in a CUDA graph", remedy=_WITHOUT_GRAPHS)

    def close(self) -> None:
        """Keep the kernels that were made, and drop engines and runtime."""
        for cache in self._caches.values():
            cache.save()
        self._caches.clear()
        self._unasked.clear()
        self._engines.clear()
        self._runtime = None

    def _new_runtime(self, version_compatible: bool) -> Any:
        try:
            runtime = self._trt.Runtime(self._logger)
        except TypeError as error:  # how its bindings say that there is none, such as without a driver
            raise self._failed("its runtime can't be made", str(error)) from error
        # An engine for other versions brings its own code for the host, which is refused otherwise.
        runtime.engine_host_code_allowed = version_compatible
        return runtime

    def _deserialize(self, path: Path) -> Any:
        """The engine, without a copy of the file: a GPU may share the host's memory."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return self._runtime.deserialize_cuda_engine(mapped)

    def _new_context(self, graph: str) -> Any:
        trt, engine = self._trt, self._engines[graph]
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._backend == "tensorrt":
            return engine.create_execution_context(strategy)
        # TensorRT-RTX compiles kernels for a shape in the background and then changes over to them, which a
        # captured graph would never see: they are wanted at once. And the graph is captured by us.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        if graph in self._caches:
            self._caches[graph].use(config)
        return engine.create_execution_context(config)

    def _profile(self, run: Run) -> int:
        """The index of the profile for this run; a graph that has only one uses it for everything."""
        assert self._set is not None
        names = [profile.name for profile in self._set.engines[run.graph].profiles]
        wanted = "prefill" if run.prefill else "block"
        return names.index(wanted) if wanted in names else 0

    def _failed(self, what: str, more: str = "", remedy: str | None = None) -> BackendError:
        errors = "; ".join(text for text in (*self._logger.errors[-3:], more) if text)
        return BackendError(
            f"{self._backend} {self._trt.__version__}: {what}",
            found=errors or "no message",
            expected="an engine of this bundle, built for this GPU",
            remedy=remedy or self._advice(),
        )

    def _advice(self) -> str:
        assert self._machine is not None
        command = compile_command(self._bundle.root, self._machine, self._set)
        return f"check the GPU with nvidia-smi, or remove {self._folder} and run: {command}"


class KernelCache:
    """Kernels that TensorRT-RTX compiled for an engine, kept beside it for the next start.

    Shared by the engine's contexts. The library refuses by itself the kernels of another GPU.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._stored = b""

    def use(self, config: Any) -> None:
        """Give the cache to the ``IRuntimeConfig`` of a context, if this version has such caches."""
        if self._cache is None and hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            if self._cache is not None:
                self._load()
        if self._cache is not None and not config.set_runtime_cache(self._cache):
            _LOG.debug("no kernels are kept for %s", self._path)

    def save(self) -> None:
        """Write what was compiled, if there is anything new. That it can't be written is no error."""
        cache, self._cache = self._cache, None
        blob = None if cache is None else cache.serialize()
        if blob is None or bytes(blob) == self._stored:
            return
        try:
            write_atomically(self._path, bytes(blob))
        except OSError as error:
            _LOG.debug("kernels are not kept in %s: %s", self._path, error)

    def _load(self) -> None:
        if self._path.is_symlink() or not self._path.is_file():
            return
        try:
            stored = self._path.read_bytes()
        except OSError as error:
            _LOG.debug("kernels in %s are not used: %s", self._path, error)
            return
        if self._cache.deserialize(stored):
            self._stored = stored


def _shapes(bindings: tuple[Binding, ...]) -> str:
    return ", ".join(f"{item.tensor} {item.shape}" for item in bindings[:3])


def _import(backend: str) -> Any:
    try:
        return importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the {backend} library can't be imported",
            found=error,
            expected=f"the package {_MODULES[backend]}",
            remedy=f"pip install 'dflash-export[{backend}]'",
        ) from error


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # a vendor's class, known when it is imported
        """Keeps the errors, for messages."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)

    return Logger()
