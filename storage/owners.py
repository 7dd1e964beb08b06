"""Who owns a trial: one slot of one process, as other processes can recognize it; and the clock that all agree on."""

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import psutil
from sqlalchemy import ColumnElement, Connection, DateTime, func, literal_column, select, text

SAME_SECONDS = 1.0  # two looks at one process's start may differ by less


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One slot of one process, as other processes can recognise it."""

    machine: str  # this boot of this machine, and the process namespace within it
    host: str  # for people
    pid: int
    born: float  # the process's start, seconds since the machine's: process ids are used again
    slot: str  # for people, and to tell the slots of one process apart

    @property
    def is_here(self) -> bool:
        """Whether this is a process of this very machine, or container: `gone` tells whether it has ended."""
        return on_this_machine(self.machine)

    @property
    def is_this_process(self) -> bool:
        """Whether this is the process that asks."""
        own = self.is_here and self.pid == os.getpid()
        return own and abs(_born(psutil.Process()) - self.born) <= SAME_SECONDS

    def gone(self) -> bool:
        """Whether this was a process of this very machine and has ended; False if that is not known."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            # A killed process stays in the table as a zombie until its parent looks.
            return process.status() == psutil.STATUS_ZOMBIE or abs(_born(process) - self.born) > SAME_SECONDS
        except psutil.NoSuchProcess:
            return not _is_hidden(self.pid)
        except psutil.AccessDenied:
            return False


def this_slot(slot: str) -> Owner:
    """This process's `slot`."""
    return Owner(
        machine=_machine(),
        host=socket.gethostname(),
        pid=os.getpid(),
        born=_born(psutil.Process()),
        slot=slot,
    )


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process though /proc does not show it: with `hidepid`, other users' are not shown."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False  # it is this user's, and would be shown: it has ended since


def _born(process: psutil.Process) -> float:
    # By the calendar's clock it would change with that clock: a machine that wakes up has it set.
    return process.create_time() - psutil.boot_time()


@cache
def _machine() -> str:
    # Two containers of one machine may share its name but not its process ids; a reboot ends every process.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def on_this_machine(machine: str) -> bool:
    """Whether an owner's `machine` is this very machine, or container."""
    return machine == _machine()


def database_now(connection: Connection) -> datetime:
    """The database's clock, naive UTC: it wrote the beats, so it is the one to compare them with."""
    if connection.dialect.name == "sqlite":
        # CURRENT_TIMESTAMP has whole seconds only.
        return datetime.fromisoformat(
            connection.execute(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')")).scalar_one()
        )
    # Not now(), which is when the transaction began: it may have waited for a lock since.
    found: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return found.astimezone(UTC).replace(tzinfo=None)


def clock(connection: Connection) -> ColumnElement[datetime]:
    """As `database_now`, as an expression inside another statement."""
    return clock_of(connection.dialect.name)


def clock_of(dialect: str) -> ColumnElement[datetime]:
    """The database's time as an SQL expression, for the kind "sqlite" or "postgresql"."""
    if dialect == "sqlite":
        return literal_column("strftime('%Y-%m-%d %H:%M:%f', 'now')", DateTime())
    return literal_column("(clock_timestamp() AT TIME ZONE 'UTC')", DateTime())
