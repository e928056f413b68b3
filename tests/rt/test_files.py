"""Files that are there whole or not at all; also where the system can do less than Linux."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from dflash_rt.files import sync, utc_now, write_atomically


def test_a_file_is_written_in_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    write_atomically(path, "é\n\r\n")
    assert path.read_bytes() == "é\n\r\n".encode()
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_old_file_outlives_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_without_folders_that_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: opening a folder is refused there."""
    opened = os.open

    def refuse_folders(path: Path, *arguments: int, **options: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse_folders)
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    write_atomically(tmp_path / "file", "text")
    sync(tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "text"


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="folders can't be opened here")
@pytest.mark.parametrize(("code", "is_error"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_can_not_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_error: bool
) -> None:
    """Some network file systems have no such call. A disk that fails is an error."""

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    if is_error:
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            sync(tmp_path)
    else:
        sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        sync(tmp_path / "file")


def test_the_time_is_in_utc() -> None:
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())
