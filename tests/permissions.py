"""Permissions that hold for root as well, so that tests of them run wherever the tests do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# linux/capability.h: what lets root pass over permissions. Each thread has capabilities of its own.
_VERSION = 0x20080522
_PASS_OVER = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextmanager
def as_any_user() -> Iterator[None]:
    """This thread is bound by permissions of files and folders; nothing changes for a user who isn't root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective = before & ~_PASS_OVER
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0
