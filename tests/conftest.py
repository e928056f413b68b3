"""What all tests share: no network, few threads, and the bundle of the demo pair."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dflash_rt import Bundle

# Read when the libraries are first imported, so they are set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process that forks after using it would be warned about
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, os.cpu_count() or 1) // _WORKERS)))

ROOT = Path(__file__).parents[1]


# --- The bundle of the demo pair ---


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo pair, exported once a session (once a worker under xdist)."""
    from dflash_export import build
    from dflash_export.recipe import read_recipe

    recipe = read_recipe(ROOT / "engines" / "smollm2-135m.yaml")
    return build(output=tmp_path_factory.mktemp("engines") / "smollm2-135m", **recipe.build_options())
