"""Writing a folder so that it is there whole or not at all.

The work happens in a hidden folder beside the output, which is renamed when everything is on disk. A killed
export leaves only that hidden folder; the next export to the same output removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from dflash_rt.bundle.manifest import MANIFEST_NAME
from dflash_rt.errors import OutputError
from dflash_rt.files import sync

__all__ = ["check_output", "new_folder", "writing"]

_LOCK = ".lock"


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that can't become a bundle.

    Raises:
        OutputError: it exists and ``force`` isn't given, or it exists and isn't a bundle, or can't be read.
    """
    if not os.path.lexists(output):
        return
    if not force:
        raise OutputError(
            f"the output {output} exists already",
            found="a folder" if output.is_dir() else "a file",
            expected="a path where nothing is yet",
            remedy="choose another output, or pass --force to replace a bundle",
        )
    try:
        replaceable = output.is_dir() and not output.is_symlink()
        is_other = not replaceable or (any(output.iterdir()) and not (output / MANIFEST_NAME).is_file())
    except OSError as error:
        raise OutputError(
            f"--force won't replace {output}",
            found=f"a folder that can't be looked into: {error.strerror or error}",
            expected="a bundle or an empty folder",
            remedy="mend the permissions, choose another output, or move what is there away yourself",
        ) from error
    if is_other:
        raise OutputError(
            f"--force won't replace {output}",
            found="something that is not a bundle",
            expected="a bundle or an empty folder",
            remedy="choose another output, or move what is there away yourself",
        )


@contextlib.contextmanager
def new_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A hidden folder to fill; becomes ``output`` when the block ends, vanishes when it raises.

    Raises:
        OutputError: see :func:`check_output`; or the place can't be written; or something appeared
            at ``output`` meanwhile.
    """
    check_output(output, force=force)
    prefix = f".{output.name}.partial-"
    with writing(f"the bundle {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent, prefix)
        folder, lock = _make_locked(output.parent, prefix)
        try:
            yield folder
            for path in folder.rglob("*"):
                sync(path)
            sync(folder)
            _publish(folder, output, force=force)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _remove_lock(lock)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, FileLock]:
    """A new folder, and the lock beside it that says that somebody works on it; a killed process lets go.

    The lock is taken before the folder is made, so there is no moment at which a folder that is worked on
    can be taken for abandoned.
    """
    folder = parent / f"{prefix}{uuid.uuid4().hex}"
    lock = FileLock(f"{folder}{_LOCK}")
    with contextlib.suppress(OSError):  # a network file system may have no locks; nothing is removed there
        lock.acquire()
    try:
        folder.mkdir()
    except OSError:
        _remove_lock(lock)
        raise
    return folder, lock


def _remove_lock(lock: FileLock) -> None:
    # Removed while it is held: a process that waits for it sees that, and makes a new one. Windows removes no
    # open file; there releasing it does.
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def _remove_abandoned(parent: Path, prefix: str) -> None:
    # Also where only a lock was left: it was made before its folder, and removed after it.
    names = {path.name.removesuffix(_LOCK) for path in parent.iterdir() if path.name.startswith(prefix)}
    for folder in (parent / name for name in names):
        lock = FileLock(f"{folder}{_LOCK}")
        with contextlib.suppress(OSError):  # it is held: somebody works on the folder
            lock.acquire(timeout=0)
            shutil.rmtree(folder, ignore_errors=True)
            _remove_lock(lock)


def _publish(folder: Path, output: Path, *, force: bool) -> None:
    if not _moved(folder, output):
        # It has been there all along, or appeared since the export began.
        check_output(output, force=force)
        if not _exchange(folder, output):
            _replace(folder, output)
    sync(output.parent)


def _moved(folder: Path, output: Path) -> bool:
    """Rename ``folder`` to ``output``, unless something is there."""
    if os.path.lexists(output):
        return False
    try:
        os.rename(folder, output)
    except OSError:
        if not os.path.lexists(output):
            raise
        return False
    return True


def _replace(folder: Path, output: Path) -> None:
    """Put ``folder`` in the place of ``output`` in two steps, where there is no way to do it in one."""
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    try:
        os.rename(output, aside / "bundle")
    except OSError:
        aside.rmdir()
        raise
    try:
        os.rename(folder, output)
    except OSError:
        os.rename(aside / "bundle", output)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one atomic step; False where the system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows None names no library
        return False
    at_fdcwd, rename_exchange = -100, 2
    old, new = (os.fsencode(path.absolute()) for path in (first, second))
    return bool(rename(at_fdcwd, old, at_fdcwd, new, rename_exchange) == 0)


@contextlib.contextmanager
def writing(what: object) -> Iterator[None]:
    """While open, an ``OSError`` becomes an ``OutputError`` that names ``what``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"can't write {what}",
            found=error.strerror or error,
            expected="a writable folder with room for the bundle",
            remedy="free disk space, mend the permissions, or choose another output; nothing was left behind",
        ) from error
