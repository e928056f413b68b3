"""Reports lie in the bundle's ``reports/`` folder, which is neither listed nor hashed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dflash_rt import Bundle
from dflash_rt.bundle.manifest import REPORTS_FOLDER
from dflash_rt.errors import OutputError
from dflash_rt.files import write_atomically

__all__ = ["require_writable", "write_report"]


def require_writable(bundle: Bundle) -> None:
    """Raise OutputError unless reports can be written: before minutes of work, not after."""
    with _reports(bundle) as folder, tempfile.TemporaryFile(dir=folder):
        pass


def write_report(bundle: Bundle, name: str, text: str) -> Path:
    """Write ``reports/NAME`` whole or not at all, in place of an older one. Raises OutputError."""
    with _reports(bundle) as folder:
        write_atomically(folder / name, text)
        return folder / name


@contextlib.contextmanager
def _reports(bundle: Bundle) -> Iterator[Path]:
    folder = bundle.root / REPORTS_FOLDER
    try:
        # Never through a link: it may lead out of the bundle.
        if folder.is_symlink():
            raise OSError(f"{folder} is a link")
        folder.mkdir(exist_ok=True)
        yield folder
    except OSError as error:
        raise OutputError(
            f"can't write a report into {folder}",
            found=error.strerror or error,
            expected="a folder that may be written, with some room",
            remedy="mend the permissions or free disk space, or pass write_report=False (--no-report)",
        ) from error
