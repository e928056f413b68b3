"""Traced graphs on disk: runs and workers trace an architecture once, until something that traces changes.

Only tests use this. What is stored depends on nothing but its key: the source of every module that tracing
imports, the versions of the libraries that trace, and the arguments of the call.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
from filelock import FileLock
from transformers import PreTrainedConfig

import dflash_export.exporter  # noqa: F401  (what is patched below)
from dflash_export.drafters.graphs import trace_drafter
from dflash_export.graphs.graph import TracedGraph
from dflash_export.graphs.target import trace_target
from dflash_rt.files import write_atomically

ROOT = Path(__file__).parents[1]
TRACERS = {"trace_target": trace_target, "trace_drafter": trace_drafter}
LIBRARIES = ("ml-dtypes", "numpy", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")
_KEPT = 3  # states of the sources whose traces stay on disk


def imported_files(module: str, root: Path) -> set[Path]:
    """Files below ``root`` that ``module`` imports, at any depth, its own, and the packages above them.

    What a package above imports counts only where something is imported from the package itself: the topmost
    ones name all that they offer, and import it when it is asked for.
    """
    found: set[Path] = set()
    pending, seen = [module], set()
    while pending:
        name = pending.pop()
        path = root.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not file.is_file():
            continue
        seen.add(name)
        found |= {
            file,
            *(up / "__init__.py" for up in file.parents if up.is_relative_to(root) and up != root),
        }
        pending += _imports(file)
    return {file for file in found if file.is_file()}


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # may be modules


def traced_files(root: Path = ROOT) -> set[Path]:
    """Files that have a part in tracing, and this one."""
    # A kind of drafter makes graphs of its own, and nothing but this registry imports its file.
    modules = {trace.__module__ for trace in TRACERS.values()} | {"dflash_export.drafters.read"}
    return set().union(*(imported_files(module, root) for module in modules), {root / "tests" / "traces.py"})


def sources_key(root: Path = ROOT) -> str:
    """Changes with every source file and every library that has a part in tracing."""
    digest = hashlib.sha256(platform.python_version().encode())
    for name in LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for path in sorted(traced_files(root)):
        digest.update(
            f"{os.path.relpath(path, root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:32]


def _describe(arguments: Iterable[Any]) -> str:
    """Arguments as text; functions only report progress."""
    return "\n".join(
        f"{type(item).__name__} {item.to_json_string(use_diff=False)}"
        if isinstance(item, PreTrainedConfig)
        else repr(item)
        for item in arguments
        if not callable(item)
    )


class TraceCache:
    """Traces of one state of the sources."""

    def __init__(self, folder: Path = ROOT / ".cache" / "traces", root: Path = ROOT) -> None:
        self.folder = folder / sources_key(root)
        if not self.folder.exists():
            for old in sorted(folder.glob("*"), key=os.path.getmtime)[: 1 - _KEPT]:
                shutil.rmtree(old, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self._graphs: dict[str, bytes] = {}

    def call(self, trace: Callable[..., dict[str, TracedGraph]], *arguments: Any) -> dict[str, TracedGraph]:
        """``trace(*arguments)``, from disk if it was called before."""
        key = hashlib.sha256(f"{trace.__name__}\n{_describe(arguments)}".encode()).hexdigest()
        path = self.folder / key
        if key not in self._graphs:
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    write_atomically(path, _pack(trace(*arguments)))
            self._graphs[key] = path.read_bytes()
        return _unpack(self._graphs[key])

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While open, exports take their traces from here."""
        tracers = {name: functools.partial(self.call, trace) for name, trace in TRACERS.items()}
        with mock.patch.multiple("dflash_export.exporter", **tracers):
            yield


def traced_anew() -> Any:
    """While open, exports trace as they do for users."""
    return mock.patch.multiple("dflash_export.exporter", **TRACERS)


def _pack(graphs: dict[str, TracedGraph]) -> bytes:
    models = {name: ir.serde.serialize_model(g.model).SerializeToString() for name, g in graphs.items()}
    return pickle.dumps({name: (models[name], graph.weights) for name, graph in graphs.items()})


def _unpack(data: bytes) -> dict[str, TracedGraph]:
    """Fresh graphs: what a caller changes in them stays with the caller."""
    return {
        name: TracedGraph(ir.from_proto(onnx.ModelProto.FromString(model)), weights)
        for name, (model, weights) in pickle.loads(data).items()
    }
