"""Reading a drafter's config.json, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_export.drafters.config import REMEDY, DrafterConfig, DrafterKind
from dflash_export.drafters.dflash2 import DFlash2
from dflash_export.drafters.speculators import Speculators
from dflash_export.drafters.zlab import DFlash
from dflash_export.errors import ExportError, UnsupportedModelError
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.files import read_json
from dflash_export.sources.resolve import Source

__all__ = ["KINDS", "load_drafter_config", "parse_drafter_config", "read_drafter_config"]

KINDS: tuple[type[DrafterKind], ...] = (Speculators, DFlash, DFlash2)
"""Every kind of drafter; the first that matches a config.json reads it."""


def load_drafter_config(source: Source) -> DrafterConfig:
    """Read config.json of a drafter. Raises what :func:`parse_drafter_config` raises."""
    return parse_drafter_config(read_json(source.path / "config.json"))


def read_drafter_config(source: Source) -> tuple[DrafterConfig | None, Findings]:
    """The same without raising: what could be read, and what is wrong with it.

    The config is of use for what doesn't depend on the names in :attr:`Findings.wrong`; it is None where the
    file can't be read at all, or is of no kind that is known.
    """
    findings = Findings()
    try:
        return _parse(read_json(source.path / "config.json"), findings), findings
    except ExportError as error:
        findings.add(error)
        return None, findings


def parse_drafter_config(raw: Mapping[str, Any]) -> DrafterConfig:
    """Read the object of a config.json of any supported kind.

    Raises :class:`~dflash_rt.errors.UnsupportedModelError` for another kind of drafter and
    :class:`~dflash_rt.errors.CheckpointError` for values that are missing, of the wrong type, or
    contradictory, all of them at once. Whether the values fit a target, and one another, is for
    :mod:`dflash_export.pairing.pair`.
    """
    findings = Findings()
    try:
        config = _parse(raw, findings)
    except ExportError as error:  # what it can't go on after
        findings.add(error)
        findings.raise_any()
        raise
    findings.raise_any()
    return config


def _parse(raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
    for kind in KINDS:
        if kind.matches(raw):
            return kind.parse(raw, findings)
    raise UnsupportedModelError(
        "this is not a DFlash drafter",
        found=f"architectures {raw.get('architectures') or []}, model_type {raw.get('model_type')!r}",
        expected=" or ".join(kind.told_by for kind in KINDS),
        remedy="check that target and drafter weren't swapped, or " + REMEDY,
    )
