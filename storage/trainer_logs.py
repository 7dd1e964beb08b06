"""The logs of trainer processes: how large one may become, and which are not needed any more.

A slot of a worker has one file, which all its trainer processes append to. Nothing else limits it: a worker may run for
weeks, and a model may print whatever it likes.
"""

import contextlib
import re
import stat
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from optuna.storages import RDBStorage

from storage import slots
from storage.transactions import read

MOST_BYTES = 20 << 20
KEPT_BYTES = 10 << 20  # of a log that has more than MOST_BYTES
OLD_SECONDS = 24 * 3600.0
SHORTENED = b"(the lines before were removed, because the log was too large)\n"
_NAME = re.compile(r"trainer-.+-([0-9]+)\.log")


@dataclass(frozen=True, kw_only=True)
class OldLog:
    """A log that nobody writes any more."""

    path: Path
    size: int  # bytes
    why: str = "the log of a worker that ended more than a day ago"


def shorten(log: Path) -> None:
    """Keeps the last lines alone of a log that is too large. Does nothing if it cannot be written.

    In place, so that it needs no space on a full disk, and a process that appends to it goes on at the new end.
    """
    with contextlib.suppress(OSError):
        found = log.stat()
        if found.st_size <= MOST_BYTES or not stat.S_ISREG(found.st_mode):
            return
        with log.open("r+b") as file:
            file.seek(-KEPT_BYTES, 2)
            kept = file.read()
            file.seek(0)
            file.write(SHORTENED + kept[kept.find(b"\n") + 1 :])
            file.truncate()


def unneeded(folder: Path, storage: RDBStorage) -> list[OldLog]:
    """The logs in `folder`, by path, that are older than a day and whose worker has ended.

    Other machines may share the folder, so the log of a worker that `storage` has heard of is kept as well.
    """
    living = {slot.pid for slot in read(storage, slots.present)}
    logs = (_old(path, living) for path in sorted(folder.glob("trainer-*.log")))
    return [log for log in logs if log is not None]


def remove(logs: Sequence[OldLog], storage: RDBStorage) -> int:
    """Removes those of the `logs` that are still unneeded; returns how many bytes that freed."""
    freed, living = 0, {slot.pid for slot in read(storage, slots.present)}
    for listed in logs:
        log = _old(listed.path, living)
        if log is not None:
            with contextlib.suppress(OSError):  # another user's: it stays
                log.path.unlink()
                freed += log.size
    return freed


def _old(path: Path, living: Collection[int]) -> OldLog | None:
    """The log, if its worker is none of the `living` and no process of this machine, and it is a day old."""
    named = _NAME.fullmatch(path.name)
    if named is None or int(named[1]) in living or psutil.pid_exists(int(named[1])):
        return None
    try:
        found = path.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or time.time() - found.st_mtime <= OLD_SECONDS:
        return None
    return OldLog(path=path, size=found.st_size)
