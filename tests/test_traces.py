"""The cache of traces holds nothing that is stale."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dflash_export.graphs.graph import TracedGraph
from dflash_export.graphs.simple import accept_graph
from tests import traces
from tests.traces import ROOT, TraceCache, sources_key, traced_files

PACKAGES = ("dflash_rt", "dflash_export")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, to change."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "traces.py", tmp_path / "tests")
    return tmp_path


def test_every_file_that_traces_changes_the_key(tree: Path) -> None:
    keys = {sources_key(tree), sources_key(ROOT)}
    assert len(keys) == 1, "a copy has the key of the original"
    files = traced_files(tree)
    for number, path in enumerate(sorted(files), 2):
        text = path.read_text()
        path.write_text(f"{text}\n# changed")
        keys.add(sources_key(tree))
        path.write_text(text)
        assert len(keys) == number, path


IMPORTED = """
import sys
import dflash_export.drafters.graphs, dflash_export.graphs.target
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("dflash_")))
"""


def test_the_key_counts_whatever_python_imports() -> None:
    command = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    version = ROOT / "dflash_rt" / "version.py"  # the topmost packages say it, and tracing doesn't ask
    assert {Path(name) for name in done.stdout.split()} <= traced_files() | {version}


def test_files_without_a_part_in_tracing(tree: Path) -> None:
    key = sources_key(tree)
    (tree / "dflash_export" / "publish.py").write_text("# has no part in tracing")
    assert sources_key(tree) == key


@pytest.mark.parametrize("library", traces.LIBRARIES)
def test_libraries_change_the_key(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, version = sources_key(ROOT), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + "x" * (name == library))
    assert sources_key(ROOT) != key


def test_a_changed_source_is_traced_again(tree: Path) -> None:
    calls = []

    def trace(vocab: int, traced: Callable[[str], object]) -> dict[str, TracedGraph]:
        calls.append(vocab)
        return {"graph": accept_graph(vocab)}

    def nodes(cache: TraceCache, vocab: int) -> int:
        return len(cache.call(trace, vocab, print)["graph"].model.graph)

    folder = tree / "cache"
    count = nodes(TraceCache(folder, tree), 5)
    assert nodes(TraceCache(folder, tree), 5) == count
    assert calls == [5]
    nodes(TraceCache(folder, tree), 6)
    assert calls == [5, 6]
    path = tree / "dflash_export" / "graphs" / "trace.py"
    path.write_text(path.read_text() + "\n# changed")
    nodes(TraceCache(folder, tree), 5)
    assert calls == [5, 6, 5]


TRACE = """
import transformers
from dflash_export.graphs.target import trace_target
from tests.traces import TraceCache
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
config = transformers.Qwen2Config(num_attention_heads=2, num_key_value_heads=2, **sizes)
(target,) = [TraceCache().call(trace_target, config, (0,), "fp32", str)["target"]]
print(*(value.name for value in target.model.graph.inputs))
"""


@pytest.mark.slow
def test_a_changed_exporter_makes_another_graph(tree: Path) -> None:
    """A real trace, in a copy of the sources whose names of inputs change."""
    command = [sys.executable, "-c", TRACE]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    for old, new in (("embeddings", "embeddings"), ("embeddings", "changed")):
        path = tree / "dflash_export" / "graphs" / "target.py"
        path.write_text(path.read_text().replace(f'GraphTensor("{old}"', f'GraphTensor("{new}"'))
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == new


def test_callers_don_t_share_their_changes(tree: Path) -> None:
    cache = TraceCache(tree / "cache", tree)

    def trace(vocab: int) -> dict[str, TracedGraph]:
        return {"graph": accept_graph(vocab)}

    first = cache.call(trace, 5)["graph"].model.graph
    first.name = "changed"
    assert cache.call(trace, 5)["graph"].model.graph.name != "changed"


def test_few_states_of_the_sources_are_kept(tree: Path) -> None:
    path = tree / "dflash_export" / "graphs" / "trace.py"
    for _ in range(5):
        path.write_text(path.read_text() + "\n# changed")
        newest = TraceCache(tree / "cache", tree).folder
    kept = list((tree / "cache").iterdir())
    assert len(kept) == 3
    assert newest in kept
