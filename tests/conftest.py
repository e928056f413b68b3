"""What all tests share: no network, few threads, traces on disk, and the bundle of the demo pair."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from dflash_rt import Bundle

# Read when the libraries are first imported, so they are set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process that forks after using it would be warned about
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, os.cpu_count() or 1) // _WORKERS)))

ROOT = Path(__file__).parents[1]

# The same examples each time, so that a run says something about the change that it tests and not about luck.
# New examples: make test PYTEST_ARGS=--hypothesis-profile=explore
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("repeatable")


# --- Shards ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N parts of the tests, such as 2/4")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By a hash of the test's name: every test is in one shard, the same on every machine."""
    shard = config.getoption("--shard")
    if shard is None:
        return
    try:
        index, count = map(int, shard.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise pytest.UsageError(f"--shard {shard}: expected I/N with I from 1 to N, such as 2/4")
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % count != index - 1]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


# --- Bundles ---


@pytest.fixture(scope="session", autouse=True)
def _traces_from_disk() -> Iterator[None]:
    """Exports of one architecture share its traces. Tests that can't export don't wait for PyTorch."""
    if "dflash_export.exporter" in sys.modules:
        from tests.traces import TraceCache

        with TraceCache().shared():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this session."""
    base = tmp_path_factory.getbasetemp()
    # Under xdist each worker has a folder of its own in that of the session.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_bundle(session_folder: Path) -> Bundle:
    """The demo pair's bundle. Shared: tests that change it take a copy."""
    output = session_folder / "smollm2-135m"
    with FileLock(f"{output}.lock"):
        if not output.exists():
            from dflash_export import build
            from dflash_export.recipe import read_recipe
            from tests.traces import TraceCache

            with TraceCache().shared():
                build(output=output, **read_recipe(ROOT / "engines" / "smollm2-135m.yaml"))
    return Bundle.open(output)
