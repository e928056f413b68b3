"""Writing a folder so that it is there whole or not at all.

The work happens in a hidden folder beside the output, which is renamed when everything is on disk. A killed
export leaves only that hidden folder; the next export to the same output removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from dflash_rt.bundle.manifest import MANIFEST_NAME
from dflash_rt.errors import OutputError

__all__ = ["check_output", "new_folder"]


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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent, prefix)
        folder, lock = _make_locked(output.parent, prefix)
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        yield folder
        for path in folder.rglob("*"):
            _sync(path)
        _sync(folder)
        _publish(folder, output, force=force)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and a descriptor that locks it until it is closed; a process that is killed lets go.

    The folder itself is locked, not a file in it: there is no moment at which it can be left behind without
    saying whether anybody works on it.
    """
    while True:
        folder = parent / f"{prefix}{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another export took it for abandoned before it was locked
        with contextlib.suppress(OSError):  # a network file system may not lock folders; it removes none then
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder, lock
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # gone already, or locked: somebody works on it
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _publish(folder: Path, output: Path, *, force: bool) -> None:
    if not _moved(folder, output):
        # It has been there all along, or appeared since the export began.
        check_output(output, force=force)
        if not _exchange(folder, output):
            _replace(folder, output)
    _sync(output.parent)


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
    except (AttributeError, OSError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    arguments = (
        at_fdcwd,
        os.fsencode(first.absolute()),
        at_fdcwd,
        os.fsencode(second.absolute()),
        rename_exchange,
    )
    return bool(rename(*arguments) == 0)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(output: Path, error: OSError) -> OutputError:
    return OutputError(
        f"can't write the bundle {output}",
        found=error.strerror or str(error),
        expected="a writable folder with room for the bundle",
        remedy="free disk space, mend the permissions, or choose another output; nothing was left behind",
    )
