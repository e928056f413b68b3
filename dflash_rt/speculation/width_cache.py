"""Measured step costs, kept in the bundle's ``reports/`` folder, which is neither listed nor hashed.

A cache and no more: what is missing, broken, of another machine or not to be written is measured again, and
the log says why. Deleting the file is always safe.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from dflash_rt.bundle.manifest import REPORTS_FOLDER
from dflash_rt.bundle.schema import Bounds, Problems, Range, dump_json, parse_json, plain, read
from dflash_rt.errors import BundleError, DFlashError
from dflash_rt.files import write_atomically
from dflash_rt.machine import cpu_name, physical_cores
from dflash_rt.speculation.width_correction import StepCosts
from dflash_rt.version import __version__

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["STEP_COSTS_NAME", "CostKey", "cost_key", "load_step_costs", "save_step_costs"]

STEP_COSTS_NAME = "step_costs.json"
_FORMAT_VERSION = 1
_MAX_BYTES = 2**20
_MAX_ENTRIES = 16
_REMEDY = "nothing: it is measured again; delete the file to be rid of this line"
_LOG = logging.getLogger("dflash_rt")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostKey:
    """What the cost of a step depends on.

    Attributes:
        bundle: SHA-256 over the recorded hashes of the bundle's files.
        cpu: the processor's name.
        cores: physical cores that the process may use.
        backend: name of the backend.
        backend_version: version of the package of that name; empty if there is none.
        threads: threads that were asked for; ``None`` for the backend's default.
        runtime: version of this package.
    """

    bundle: str
    cpu: str
    cores: int
    backend: str
    backend_version: str
    threads: int | None
    runtime: str


@dataclass(frozen=True, slots=True)
class _Entry:
    key: CostKey
    seconds: tuple[Annotated[float, Range(1e-9, 1e6)], ...]


@dataclass(frozen=True, slots=True)
class _Document:
    format: Literal["dflash-step-costs"]
    format_version: Annotated[int, Bounds(_FORMAT_VERSION, _FORMAT_VERSION)]
    entries: tuple[_Entry, ...]  # the newest last


def cost_key(bundle: Bundle, backend: str, threads: int | None) -> CostKey:
    """The key of this machine, backend and bundle."""
    files = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    try:
        # A backend's name may say with which options it runs.
        backend_version = version("onnxruntime" if backend.startswith("onnxruntime-") else backend)
    except PackageNotFoundError:
        backend_version = ""
    return CostKey(
        bundle=hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        cpu=cpu_name(),
        cores=physical_cores(),
        backend=backend,
        backend_version=backend_version,
        threads=threads,
        runtime=__version__,
    )


def load_step_costs(bundle: Bundle, key: CostKey, widest: int) -> StepCosts | None:
    """The costs that were saved under ``key``, for widths 1 to ``widest``; ``None`` if there are none."""
    path = _path(bundle)
    for entry in reversed(_read(path)):
        if entry.key == key and len(entry.seconds) >= widest:
            return StepCosts(entry.seconds[:widest])
    _LOG.debug("%s has no step costs for this machine, backend and bundle", path)
    return None


def save_step_costs(bundle: Bundle, key: CostKey, costs: StepCosts) -> None:
    """Save costs for later: whole or not at all. A bundle that can't be written to is left as it is."""
    path = _path(bundle)
    kept = [entry for entry in _read(path) if entry.key != key]
    entries = (*kept, _Entry(key, costs.seconds))[-_MAX_ENTRIES:]
    text = dump_json(plain(_Document("dflash-step-costs", _FORMAT_VERSION, entries))) + "\n"
    try:
        # Never through a link: it may lead out of the bundle.
        if path.parent.is_symlink():
            raise OSError(f"{path.parent} is a link")
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        _LOG.info("step costs are not kept in %s: %s", path, error)


def _path(bundle: Bundle) -> Path:
    return bundle.root / REPORTS_FOLDER / STEP_COSTS_NAME


def _read(path: Path) -> tuple[_Entry, ...]:
    """What the file holds; nothing, with a line in the log, if it can't be used."""
    try:
        if path.parent.is_symlink() or path.is_symlink():
            raise OSError("it is a link")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise OSError(f"it is larger than {_MAX_BYTES} bytes")
        document = parse_json(data.decode("utf-8"), STEP_COSTS_NAME, _REMEDY, BundleError)
        problems = Problems(STEP_COSTS_NAME, _REMEDY, BundleError)
        found = cast(_Document, read(_Document, document, "", problems))
        problems.raise_if_any()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError, DFlashError) as error:
        _LOG.warning("step costs in %s are ignored: %s", path, error)
        return ()
    return tuple(entry for entry in found.entries if entry.seconds)
