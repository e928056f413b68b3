"""Reading a drafter's config.json, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.kind import drafter_kind
from dflash_export.drafters.speculators import parse_speculators_config
from dflash_export.drafters.zlab import parse_zlab_config
from dflash_export.errors import ExportError
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.files import read_json
from dflash_export.sources.resolve import Source

__all__ = ["load_drafter_config", "parse_drafter_config", "read_drafter_config"]


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
    kind = drafter_kind(raw)
    if kind == "speculators":
        return parse_speculators_config(raw, findings)
    return parse_zlab_config(raw, kind, findings)
