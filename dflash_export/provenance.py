"""What a bundle records of its build."""

from __future__ import annotations

import importlib.metadata
import os

from dflash_export.options import OPTIONS, BuildOptions
from dflash_rt.bundle.manifest import Provenance
from dflash_rt.files import utc_now
from dflash_rt.version import __version__

__all__ = ["provenance"]

_PACKAGES = ("gguf", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers", "torch", "transformers")
# What makes the fused target, if one of them is installed. Both fill the same folder.
_OPTIONAL_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
# Recorded elsewhere in the manifest, or not a property of the bundle.
_NOT_RECORDED = ("target", "drafter", "output", "name", "chat_template_kwargs", "force")


def provenance(options: BuildOptions) -> Provenance:
    """When, by what and with which options a bundle is built. Of a path only the file's name is recorded."""
    recorded = {name: getattr(options, name) for name in OPTIONS if name not in _NOT_RECORDED}
    if options.calib is not None:
        recorded["calib"] = os.path.basename(options.calib)
    return Provenance(
        created=utc_now(),
        tool=f"dflash-export {__version__}",
        packages={package: importlib.metadata.version(package) for package in _PACKAGES}
        | {package: version for package in _OPTIONAL_PACKAGES if (version := _version(package))},
        options=recorded,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
