"""Reports lie in the bundle's ``reports/`` folder, which is neither listed nor hashed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from dflash_rt import Bundle
from dflash_rt.bundle.manifest import REPORTS_FOLDER
from dflash_rt.errors import OutputError

__all__ = ["require_writable", "write_report"]


def require_writable(bundle: Bundle) -> None:
    """Raise OutputError unless reports can be written: before minutes of work, not after."""
    _write(bundle, "writable", None)


def write_report(bundle: Bundle, name: str, text: str) -> Path:
    """Write ``reports/NAME`` whole or not at all, in place of an older one. Raises OutputError."""
    return _write(bundle, name, text)


def _write(bundle: Bundle, name: str, text: str | None) -> Path:
    folder = bundle.root / REPORTS_FOLDER
    partial = folder / f".{uuid.uuid4().hex}.partial"
    try:
        # Never through a link: it may lead out of the bundle.
        if folder.is_symlink():
            raise OSError(f"{folder} is a link")
        folder.mkdir(exist_ok=True)
        try:
            with partial.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text or "")
                file.flush()
                os.fsync(file.fileno())
            if text is not None:
                os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"can't write a report into {folder}",
            found=error.strerror or error,
            expected="a folder that may be written, with some room",
            remedy="mend the permissions or free disk space, or pass write_report=False (--no-report)",
        ) from error
    return folder / name
