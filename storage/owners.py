"""The workers that are there: who they are, and what each slot is at. For people; no trial changes hands by it."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import psutil
from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Double,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    text,
)

FORGOTTEN_HOURS = 24.0  # a slot that was silent for so long is listed no more

table = Table(
    "trialyard_workers",
    MetaData(),
    Column("machine", String(200), primary_key=True),
    Column("pid", Integer, primary_key=True),
    Column("slot", String(100), primary_key=True),
    Column("born", Double, nullable=False),
    Column("host", String(255), nullable=False),
    Column("device", String(255), nullable=False),
    Column("study", String(512)),
    Column("trial", Integer),
    Column("epoch", Integer),
    Column("beaten", DateTime, nullable=False),  # UTC, by the database's clock
)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One slot of one process, as other processes can recognise it."""

    machine: str  # this boot of this machine, and the process namespace within it
    host: str  # for people
    pid: int
    born: float  # the process's start, seconds since the machine's: process ids are used again
    slot: str  # for people, and to tell the slots of one process apart

    def gone(self) -> bool:
        """Whether this was a process of this very machine and has ended; False where that cannot be told."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            # A killed process stays in the table as a zombie until its parent looks.
            return process.status() == psutil.STATUS_ZOMBIE or abs(_born(process) - self.born) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True, kw_only=True)
class SlotActivity:
    """What a slot is at; all None between trials."""

    study: str | None = None
    trial: int | None = None  # its number
    epoch: int | None = None  # the last whole one


@dataclass(frozen=True, kw_only=True)
class SlotStatus:
    """A slot of a worker, as `status` shows it."""

    host: str
    pid: int
    slot: str
    device: str
    study: str | None
    trial: int | None
    epoch: int | None
    silent_seconds: float  # since its last beat


def this_slot(slot: str) -> Owner:
    """This process's `slot`."""
    return Owner(
        machine=_machine(),
        host=socket.gethostname(),
        pid=os.getpid(),
        born=_born(psutil.Process()),
        slot=slot,
    )


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


def beat(connection: Connection, slots: Mapping[Owner, str], doing: Mapping[Owner, SlotActivity]) -> None:
    """Says that these slots (each with its device's name) live, and what they are at; forgets the long silent."""
    leave(connection, list(slots))
    now = database_now(connection)
    rows = [
        asdict(one) | {"device": device[:255], "beaten": now} | asdict(doing.get(one, SlotActivity()))
        for one, device in slots.items()
    ]
    connection.execute(insert(table), rows)
    connection.execute(delete(table).where(table.c.beaten < now - timedelta(hours=FORGOTTEN_HOURS)))


def leave(connection: Connection, slots: Sequence[Owner]) -> None:
    """Takes these slots off the list."""
    for one in slots:
        connection.execute(
            delete(table).where(table.c.machine == one.machine, table.c.pid == one.pid, table.c.slot == one.slot)
        )


def present(connection: Connection) -> list[SlotStatus]:
    """The slots that beat, by host, process and slot. Those of processes that are known to be gone are left out."""
    now = database_now(connection)
    rows = connection.execute(select(table).order_by(table.c.host, table.c.pid, table.c.slot)).mappings().all()
    return [
        SlotStatus(
            **{name: row[name] for name in ("host", "pid", "slot", "device", "study", "trial", "epoch")},
            silent_seconds=max(0.0, (now - row["beaten"]).total_seconds()),
        )
        for row in rows
        if not Owner(**{name: row[name] for name in ("machine", "host", "pid", "born", "slot")}).gone()
    ]


def silence(connection: Connection) -> float | None:
    """Seconds since the last beat of a worker of this very machine, or container; None where there is none."""
    mine = [column for column in table.c if column.name in ("machine", "host", "pid", "born", "slot", "beaten")]
    rows = connection.execute(select(*mine).where(table.c.machine == _machine())).mappings().all()
    now = database_now(connection)
    living = [row for row in rows if not Owner(**{name: row[name] for name in row if name != "beaten"}).gone()]
    return min((max(0.0, (now - row["beaten"]).total_seconds()) for row in living), default=None)


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


def server_started(connection: Connection) -> datetime:
    """When the database's server began to serve, naive UTC; nobody could beat before. The distant past on SQLite."""
    if connection.dialect.name == "sqlite":
        return datetime.min
    found: datetime = connection.execute(text("SELECT pg_postmaster_start_time()")).scalar_one()
    return found.astimezone(UTC).replace(tzinfo=None)
