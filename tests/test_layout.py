"""Rules about the tree itself: who may import what, and that metadata, constraints and code agree."""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflash_rt.cli import console

ROOT = Path(__file__).parents[1]
PACKAGES = ("dflash_rt", "dflash_export", "dflash_bench")

# What setup.cfg's install_requires promises. Only backends/onnxruntime.py touches onnxruntime.
RUNTIME = {"dflash_rt", "numpy", "tokenizers", "jinja2", "click"}
EXTRA_IN_FOLDER = {"dflash_rt/backends": {"onnxruntime"}}
# The packages that those need in turn.
CLOSURE = RUNTIME | {"onnxruntime", "markupsafe", "flatbuffers", "google", "packaging"}

IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is outside the runtime's dependencies", name=name)

allowed = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
import dflash_rt
names = [module.name for module in pkgutil.walk_packages(dflash_rt.__path__, "dflash_rt.")]
for name in names:
    importlib.import_module(name)
for name in dflash_rt.__all__:
    getattr(dflash_rt, name)
print(*names)
"""

SIDE_EFFECTS = """
import logging, os, signal, sys, threading, warnings
import numpy  # adds filters of its own

def state():
    return (
        dict(os.environ), os.getcwd(), list(logging.root.handlers), logging.root.level, warnings.filters[:],
        signal.getsignal(signal.SIGINT), threading.active_count(), sys.excepthook, sys.getrecursionlimit(),
    )

before = state()
import dflash_rt, dflash_rt.cli.main, dflash_rt.generator
import dflash_export, dflash_export.cli, dflash_export.recipe
assert state() == before
"""


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names of all imports in a file, those inside functions and type checking blocks included."""
    package = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (package if node.level else (node.module or "").partition(".")[0]), node.lineno


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# --- Imports ---


def test_runtime_imports_only_its_dependencies() -> None:
    strangers = []
    for path in files("dflash_rt"):
        name = path.relative_to(ROOT).as_posix()
        extra = [names for start, names in EXTRA_IN_FOLDER.items() if name.startswith(start)]
        allowed = RUNTIME.union(sys.stdlib_module_names, *extra)
        strangers += [f"{name}:{line} imports {top}" for top, line in imported(path) if top not in allowed]
    assert strangers == []


def test_the_import_check_sees_imports_in_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "dflash_rt" / "module.py"
    path.parent.mkdir()
    path.write_text(
        "import os.path\ndef f():\n    from torch.nn import Module\n    from .loop import decode\n"
    )
    assert list(imported(path)) == [("os", 1), ("torch", 3), ("dflash_rt", 4)]


def test_runtime_works_without_anything_else() -> None:
    result = run(IMPORT_ALL, ",".join(CLOSURE))
    assert result.returncode == 0, result.stderr
    names = set(result.stdout.split())
    assert {f"dflash_rt.{path.stem}" for path in (ROOT / "dflash_rt").glob("[!_]*.py")} <= names


def test_the_clean_environment_would_notice() -> None:
    result = run(IMPORT_ALL, ",".join(CLOSURE - {"jinja2"}))
    assert "jinja2 is outside the runtime's dependencies" in result.stderr


def test_importing_changes_nothing() -> None:
    result = run(SIDE_EFFECTS)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_functions_are_not_hidden_by_their_modules() -> None:
    importlib.import_module("dflash_export.exporter")
    from dflash_export import build

    assert build is sys.modules["dflash_export.exporter"].build


# --- Sizes ---

MOST_FILES, MOST_LINES, MOST_TEST_LINES = 18, 400, 600


def test_folders_and_files_stay_small() -> None:
    paths = [(path, MOST_LINES) for package in PACKAGES for path in files(package)]
    paths += [(path, MOST_TEST_LINES) for path in files("tests")]
    lines = {path: (len(path.read_text(encoding="utf-8").splitlines()), most) for path, most in paths}
    assert {str(path): length for path, (length, most) in lines.items() if length > most} == {}
    folders = Counter(path.parent for package in PACKAGES for path in files(package))
    assert {str(folder): count for folder, count in folders.items() if count > MOST_FILES} == {}


def test_no_file_is_private() -> None:
    """A folder's ``__init__`` says what is public, not a file's name."""
    paths = [path for folder in (*PACKAGES, "tests") for path in files(folder)]
    assert [path for path in paths if path.name.startswith("_") and not path.name.startswith("__")] == []


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "examples", "benchmarks"])
def test_imports_are_absolute(folder: str) -> None:
    relative = [
        f"{path}:{node.lineno}"
        for path in files(folder)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


# --- Modules ---


@pytest.mark.parametrize(
    "path",
    [path for package in PACKAGES for path in files(package) if not path.stem.startswith("_")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_public_module_says_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    assert "__all__" in [target.id for target in assigned if isinstance(target, ast.Name)]
    assert ast.get_docstring(tree)


def test_what_runs_on_windows_imports_nothing_that_only_posix_has() -> None:
    """The runtime, and what compiles engines: users of TensorRT-RTX sit on Windows."""
    compiles = [*files("dflash_export/engines"), *(ROOT / "dflash_export").glob("*.py")]
    posix = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios", "tty"}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {top}"
        for path in (*files("dflash_rt"), *compiles)
        for top, line in imported(path)
        if top in posix
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


# --- Metadata ---


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements() -> dict[str, set[str]]:
    """Names of required packages by extra; the core is under ``""``."""
    parser = settings()
    groups = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {
        group: {normal(re.split(r"[^\w.-]", line)[0]) for line in text.strip().splitlines()}
        for group, text in groups.items()
    }


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_extras() -> None:
    groups = requirements()
    assert groups.keys() == {
        "",
        "compile",
        "export",
        "quantize",
        "serve",
        "tensorrt",
        "tensorrt-rtx",
        "cuda",
        "test",
        "bench",
        "release",
    }
    assert groups[""] == RUNTIME - {"dflash_rt"} | {"onnxruntime"}
    assert groups["compile"] < groups["export"]


def test_extras_that_errors_name_exist() -> None:
    named = set()
    for package in PACKAGES:
        for path in files(package):
            named.update(re.findall(r"dflash-export\[([^\]]+)\]", path.read_text(encoding="utf-8")))
    assert named >= {"bench", "export"}
    backends = {"cuda", "tensorrt", "tensorrt-rtx"}  # what the errors put into the braces
    filled = {"{backend}": backends, "{extra}": backends | set(console._EXTRAS.values()) | {"compile"}}
    assert set().union(*(filled.get(name, {name}) for name in named)) <= requirements().keys()


def test_exporter_imports_what_its_extra_brings() -> None:
    distributions = {
        "huggingface_hub": "huggingface-hub",
        "ml_dtypes": "ml-dtypes",
        "yaml": "pyyaml",
        "onnx_ir": "onnxscript",
    }
    allowed = requirements()[""] | requirements()["export"] | {"dflash-rt", "dflash-export"}
    tops = {top for path in files("dflash_export") for top, _ in imported(path)} - sys.stdlib_module_names
    assert {top for top in tops if normal(distributions.get(top, top)) not in allowed} == set()


def test_every_requirement_is_pinned() -> None:
    pins = {}
    for line in (ROOT / "constraints" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].split("==")
            pins[normal(name)] = version
    required = set().union(*requirements().values())
    assert required - pins.keys() == set()
    assert pins["torch"] == "2.13.0"


def test_entry_points_exist() -> None:
    scripts = settings()["options.entry_points"]["console_scripts"].strip().splitlines()
    assert [line.split(" = ")[0] for line in scripts] == ["dflash-bench", "dflash-export", "dflash-rt"]
    for line in scripts:
        module, _, attribute = line.split(" = ")[1].partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))
