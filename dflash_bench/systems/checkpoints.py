"""What baselines of other projects share: the checkpoints that the bundle came from, and refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from dflash_bench.systems.base import BenchSetup
from dflash_rt.errors import BackendUnavailableError

__all__ = ["checkpoint", "missing", "needs_torch", "require_fp32", "target_model", "torch_threads"]


def target_model(setup: BenchSetup, name: str) -> Any:
    """The target as transformers loads it, in fp32, once for all systems. ``name`` is whom it is for."""
    with needs_torch(name):
        from dflash_export.reference import load_target

    if "torch target" not in setup.shared:
        setup.shared["torch target"] = load_target(checkpoint(setup, "target"))
    return setup.shared["torch target"]


def checkpoint(setup: BenchSetup, role: Literal["target", "drafter"]) -> Any:
    """Where a checkpoint is: the option, else the recipe's, else the hub id in the manifest."""
    from dflash_export.recipe import PACKAGE_PREFIX, locate_package_file, read_recipe
    from dflash_export.reference import find_source

    spec = setup.target if role == "target" else setup.drafter
    if spec is None and setup.recipe is not None:
        spec = read_recipe(setup.recipe)[role]
    if spec is not None and spec.startswith(PACKAGE_PREFIX):
        spec = str(locate_package_file(spec))
    manifest = setup.bundle.manifest
    return find_source(role, manifest.target.source if role == "target" else manifest.drafter.source, spec)


def require_fp32(setup: BenchSetup, name: str) -> None:
    """Raise BackendUnavailableError for a bundle of another precision."""
    precision = setup.bundle.manifest.precision
    if precision != "fp32":
        raise BackendUnavailableError(
            f"{name} decodes in fp32 and the bundle doesn't",
            found=f"a bundle of precision {precision}",
            expected="fp32: anything else would compare two different things",
            remedy=f"leave {name} out of --compare, or build the bundle with --precision fp32",
        )


@contextlib.contextmanager
def needs_torch(name: str) -> Iterator[None]:
    """Turn the lack of a package of the exporter into BackendUnavailableError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(name, error.name or "a package", "pip install 'dflash-export[export]'") from error


def missing(name: str, package: str, remedy: str) -> BackendUnavailableError:
    """The error for a system whose package isn't installed."""
    return BackendUnavailableError(
        f"{name} can't be compared with",
        found=f"{package} isn't installed",
        expected=f"the package {package}",
        remedy=f"{remedy}; or leave it out of --compare",
    )


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """PyTorch's number of CPU threads for this block only: the setting belongs to the process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
