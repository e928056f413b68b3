"""What all tests share: no network, few threads, and the bundle of the demo pair."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
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


# --- The bundle of the demo pair ---

# Not getrusage(): its peak begins with that of the process that started this one.
_EXPORT = """
import re, sys
from pathlib import Path
from dflash_export import build
from dflash_export.recipe import read_recipe
build(output=sys.argv[2], **read_recipe(sys.argv[1]))
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@dataclass(frozen=True)
class DemoExport:
    """Where the demo pair's bundle is, and the most memory that its export had in use."""

    root: Path
    peak_bytes: int


@pytest.fixture(scope="session")
def smollm2_export(tmp_path_factory: pytest.TempPathFactory) -> DemoExport:
    """The demo pair, exported in a process of its own, once a session for all workers."""
    base = tmp_path_factory.getbasetemp()
    # Under xdist each worker has a folder of its own in that of the session.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    folder.mkdir(exist_ok=True)
    peak = folder / "peak_bytes"
    with FileLock(folder / "lock"):
        if not peak.exists():
            recipe = ROOT / "engines" / "smollm2-135m.yaml"
            done = subprocess.run(
                [sys.executable, "-c", _EXPORT, recipe, folder / "smollm2-135m"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            peak.write_text(done.stdout)
    return DemoExport(folder / "smollm2-135m", int(peak.read_text()))


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_export: DemoExport) -> Bundle:
    """The demo pair's bundle. Shared: tests that change it take a copy."""
    return Bundle.open(smollm2_export.root)
