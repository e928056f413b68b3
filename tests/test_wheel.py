"""The wheel and the sdist: what they hold, and that the runtime alone generates from the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dflash_export import build
from dflash_rt import Generator
from dflash_rt.version import __version__
from tests.checkpoints import byte_tokenizer
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("dflash_bench", "dflash_export", "dflash_rt")
SPEC = TargetSpec("qwen3", layers=2, vocab=300)

GENERATE = """
import importlib.util, json, sys
from dflash_rt import Generator
with Generator(sys.argv[1]) as generator:
    result = generator.generate("one", max_new_tokens=12)
absent = [name for name in sys.argv[2:] if importlib.util.find_spec(name) is None]
print(json.dumps([list(result.token_ids), result.text, absent]))
"""


def run(*command: object, cwd: Path) -> str:
    """What a command prints. It finds no package but the installed ones."""
    hidden = {"PYTHONPATH", "PYTHONHOME"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, made from a copy: the build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("distributions")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "source" / package)
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder)
    shutil.rmtree(folder / "source")
    return folder


def sources() -> set[str]:
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_both_hold_the_packages_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name == f"dflash_export-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert names == sources()
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in members if name.startswith(tuple(f"{p}/" for p in PACKAGES))} == sources()
    assert members >= {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
    assert not any(name.startswith("tests/") for name in members)


def test_the_index_would_take_both(distributions: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir(), cwd=distributions)


@pytest.fixture(scope="module")
def install(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Installs the wheel with an extra into an environment that was empty at first; the Python of that.

    pip takes from the index what the wheel asks for.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    (wheel,) = distributions.glob("*.whl")
    constraints = ROOT / "constraints" / "constraints.txt"

    def with_extra(extra: str = "") -> Path:
        run(python, "-m", "pip", "install", "--quiet", "-c", constraints, f"{wheel}{extra}", cwd=folder)
        return python

    return with_extra


def test_the_runtime_alone_generates(install: Callable[..., Path], tmp_path: Path) -> None:
    make_target(tmp_path / "target", SPEC)
    byte_tokenizer().save(str(tmp_path / "target" / "tokenizer.json"))
    make_drafter(tmp_path / "drafter", drafter_config(SPEC))
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle", max_seq_len=64)
    python = install()
    absent = ["torch", "transformers", "onnx", "safetensors"]
    ids, text, found = json.loads(run(python, "-c", GENERATE, bundle.root, *absent, cwd=tmp_path))
    assert found == absent
    with Generator(bundle) as generator:
        wanted = generator.generate("one", max_new_tokens=12)
    assert (ids, text) == (list(wanted.token_ids), wanted.text)

    command = ("generate", bundle.root, "--prompt", "one", "--max-new-tokens", "12")
    assert run(python.with_name("dflash-rt"), *command, cwd=tmp_path) == wanted.text + "\n"


def test_what_compiles_engines_needs_no_pytorch(install: Callable[..., Path], tmp_path: Path) -> None:
    python = install("[compile]")
    script = (
        "import importlib, pkgutil, sys, dflash_export.engines as engines\n"
        "for module in pkgutil.iter_modules(engines.__path__, 'dflash_export.engines.'):\n"
        "    importlib.import_module(module.name)\n"
        "from dflash_export import compile_engines\n"
        "assert 'torch' not in sys.modules\n"
    )
    run(python, "-c", script, cwd=tmp_path)
    assert "--device" in run(python.with_name("dflash-export"), "compile", "--help", cwd=tmp_path)
