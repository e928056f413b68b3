"""Exports a Hugging Face target and its DFlash drafter to a bundle for :mod:`dflash_rt`.

::

    from dflash_export import build, verify

    bundle = build("Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16", "engines/qwen3-4b", precision="bf16")
    print(verify(bundle).table())
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dflash_rt.version import __version__

if TYPE_CHECKING:
    from dflash_export.engines.compiler import compile_engines
    from dflash_export.exporter import build
    from dflash_export.parity.run import verify

__all__ = ["__version__", "build", "compile_engines", "verify"]


class _Package(ModuleType):
    """This package. Its functions are imported when they are asked for.

    They bring torch, which takes seconds and is not needed for ``dflash-export --help``. Two have the names
    of their modules, and Python makes a submodule an attribute of its package when it is imported; the
    setters keep that from hiding the functions.
    """

    @property
    def build(self) -> Any:
        from dflash_export.exporter import build

        return build

    @build.setter
    def build(self, module: ModuleType) -> None:
        pass

    @property
    def compile_engines(self) -> Any:
        from dflash_export.engines.compiler import compile_engines

        return compile_engines

    @property
    def verify(self) -> Any:
        from dflash_export.parity.run import verify

        return verify

    @verify.setter
    def verify(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
