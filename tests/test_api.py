"""What ``dflash_rt`` offers, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dflash_rt
import dflash_rt.errors
from dflash_rt import backends
from dflash_rt import version as _version

PACKAGE = Path(dflash_rt.__file__).parent


def run_python(code: str) -> str:
    command = [sys.executable, "-X", "utf8", "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_all_is_sorted_and_real() -> None:
    assert dflash_rt.__all__ == sorted(set(dflash_rt.__all__))
    for name in dflash_rt.__all__:
        assert getattr(dflash_rt, name) is not None
    assert set(dflash_rt.__all__) <= set(dir(dflash_rt))


def test_the_public_names() -> None:
    errors = {name for name in dflash_rt.__all__ if name.endswith("Error")}
    assert set(dflash_rt.__all__) - errors == {
        "Bundle",
        "Chunk",
        "GenerationResult",
        "GenerationStats",
        "Generator",
        "SamplingParams",
        "TokenLogprob",
        "TokenStream",
        "__version__",
    }


def test_every_error_of_the_runtime_is_public() -> None:
    tree = [getattr(dflash_rt.errors, name) for name in dflash_rt.errors.__all__]
    runtime = {cls.__name__ for cls in tree if issubclass(cls, dflash_rt.DFlashError)}
    assert {name for name in dflash_rt.__all__ if name.endswith("Error")} == runtime


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    block = next(node for node in ast.parse(inspect.getsource(dflash_rt)).body if isinstance(node, ast.If))
    homes = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert {*homes, "__version__"} == set(dflash_rt.__all__)
    for name, module in homes.items():
        assert module is not None
        assert getattr(dflash_rt, name) is getattr(importlib.import_module(module), name)


def test_version() -> None:
    assert dflash_rt.__version__ == _version.__version__


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'dflash_rt' has no attribute 'Genrator'"):
        _ = dflash_rt.Genrator  # type: ignore[attr-defined]


MODULES = [name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "dflash_rt.")]


@pytest.mark.parametrize("module", [name for name in MODULES if not name.split(".")[-1].startswith("_")])
def test_every_public_module_lists_its_names(module: str) -> None:
    if module.endswith(".onnxruntime"):
        pytest.importorskip("onnxruntime", reason="the package isn't there for this Python")
    opened = importlib.import_module(module)
    if hasattr(opened, "__path__") and not hasattr(opened, "__all__"):  # a folder: it names its files
        files = [name for _, name, _ in pkgutil.iter_modules(opened.__path__)]
        assert [name for name in files if f"``{name}``" not in (opened.__doc__ or "")] == []
        return
    names = opened.__all__
    assert len(set(names)) == len(names) > 0  # ruff checks that they are sorted
    assert all(hasattr(opened, name) for name in names)


def test_importing_is_cheap() -> None:
    loaded = json.loads(run_python("import sys, json, dflash_rt; print(json.dumps(sorted(sys.modules)))"))
    heavy = {
        "numpy",
        "onnxruntime",
        "tokenizers",
        "jinja2",
        "click",
        "torch",
        "transformers",
        "dflash_export",
    }
    assert not heavy & set(loaded)


def test_a_generator_needs_no_vendor_library_to_be_imported() -> None:
    code = (
        "import sys\n"
        "from dflash_rt import *\n"
        "from dflash_rt.backends.scripted import ScriptedBackend\n"
        "print(sorted({'onnxruntime', 'tokenizers', 'jinja2', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]\n"


def test_backend_names_are_there_without_a_vendor_library() -> None:
    code = "import sys, dflash_rt.backends as b; print(b.BACKEND_NAMES, 'numpy' in sys.modules)"
    assert run_python(code) == f"{backends.BACKEND_NAMES} False\n"


def test_a_missing_vendor_library_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "from dflash_rt.backends import create_backend\n"
        "from dflash_rt.errors import BackendUnavailableError\n"
        "try:\n"
        "    create_backend('onnxruntime', None)\n"
        "except BackendUnavailableError as error:\n"
        "    print(error)"
    )
    printed = run_python(code)
    assert printed.startswith(
        "the onnxruntime backend can't be imported\n  found: import of onnxruntime halted"
    )
    assert "pip install onnxruntime" in printed
