"""A folder that this user may not look into, as another user's with the mode 0700 is; also for root."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

# <linux/capability.h>: what lets root pass by a file's mode.
VERSION = 0x20080522
OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody may list, read or write in `folder` meanwhile. Under root this holds for the calling thread alone."""
    mode = folder.stat().st_mode
    folder.chmod(0)
    try:
        with _without_override() if os.geteuid() == 0 else contextlib.nullcontext():
            yield
    finally:
        folder.chmod(mode)


@contextlib.contextmanager
def _without_override() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)  # 0: the calling thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    _require(libc.capget(header, before))
    fewer = type(before)(*before)
    fewer[0] &= ~OVERRIDE
    _require(libc.capset(header, fewer))
    try:
        yield
    finally:
        _require(libc.capset(header, before))


def _require(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
