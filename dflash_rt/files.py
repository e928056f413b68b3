"""Files that are there whole or not at all, and the time that is written into them."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["sync", "utc_now", "write_atomically"]

# Some network file systems can't sync a folder.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)


def utc_now() -> str:
    """The time as ``2026-11-28T09:30:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write ``path`` whole or not at all, in place of an older file; text as UTF-8, its line ends unchanged.

    The folder must be there. On return the content is on disk, and so is the name where the system can tell.

    Raises:
        OSError: it can't be written. Nothing is left behind.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on disk. Raises OSError.

    A folder is left alone where the system can't do that: Windows opens none.
    """
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return
    # Windows syncs only what is open for writing; elsewhere a file that may only be read can be synced too.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
