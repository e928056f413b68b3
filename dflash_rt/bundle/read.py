"""Reading and writing ``manifest.json``: every field by itself, then the rules between them."""

from __future__ import annotations

from typing import Any

from dflash_rt.bundle.manifest import FORMAT, FORMAT_VERSION, Manifest
from dflash_rt.bundle.rules import broken_rules
from dflash_rt.bundle.schema import Problems, dump_json, load, parse_json, plain, shown
from dflash_rt.errors import ManifestError

__all__ = ["MAX_MANIFEST_BYTES", "manifest_json", "read_manifest"]

MAX_MANIFEST_BYTES = 16 * 2**20


def read_manifest(text: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: it is not JSON, of another format or version, or breaks a rule of
            docs/reference/bundle.md. All broken rules are reported together; rules between fields are
            checked once each field is readable.
    """
    document = parse_json(text, max_bytes=MAX_MANIFEST_BYTES)
    _check_format(document)
    return load(Manifest, document, Problems(), broken_rules)


def manifest_json(manifest: Manifest) -> str:
    """JSON text, always the same for the same manifest; :func:`read_manifest` reads it back as an equal one.

    Raises ManifestError if it couldn't be read back: such a manifest is never written.
    """
    try:
        text = dump_json(plain(manifest)) + "\n"
    except (TypeError, ValueError) as error:
        raise ManifestError(
            "the manifest can't be written as JSON",
            found=error,
            expected="strings, whole numbers, finite numbers, true, false and null",
            remedy="convert the value to a plain Python type before building the manifest",
        ) from error
    read_manifest(text)
    return text


def _check_format(document: Any) -> None:
    """Raise ManifestError unless the document is a manifest of the version that this package reads."""
    name = document.get("format") if isinstance(document, dict) else document
    if name != FORMAT:
        raise ManifestError(
            "manifest.json is not the manifest of a DFlash bundle",
            found=f"format {shown(name)}" if isinstance(document, dict) else shown(document),
            expected=f"an object with format {FORMAT!r}",
            remedy="give the folder that `dflash-export build` wrote",
        )
    version = document.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:
        return
    newer = type(version) is int and version > FORMAT_VERSION
    older = type(version) is int and version < FORMAT_VERSION
    age = ", which is newer" if newer else ", which is older" if older else ""
    raise ManifestError(
        "manifest.json has a format version that this package can't read",
        found=f"format_version {shown(version)}{age}",
        expected=f"format_version {FORMAT_VERSION}",
        remedy="upgrade dflash_rt" if newer else "build the bundle again with `dflash-export build --force`",
    )
