"""The slots of all workers: which exist, and which trial each one runs. For people: no trial changes hands by it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Double,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    and_,
    delete,
    insert,
    select,
)

from storage import attempt_table
from storage.owners import Owner, database_now, on_this_machine
from storage.tables import StudyModel, TrialModel, storable

FORGOTTEN_HOURS = 24.0  # a slot that was silent for so long is no longer shown

table = Table(
    "trialyard_slots",
    MetaData(),
    Column("machine", String(200), primary_key=True),
    Column("pid", Integer, primary_key=True),
    Column("slot", String(100), primary_key=True),
    Column("born", Double, nullable=False),
    Column("host", String(255), nullable=False),
    Column("device", String(255), nullable=False),
    Column("beat", DateTime, nullable=False),  # the last heartbeat; UTC, by the database's clock
    Column("closed", Text),  # why it takes no trials at the moment; NULL: it is open
)
OLD_TABLE = "trialyard_workers"  # the table of older versions, which had other columns
_OWNER = ("machine", "host", "pid", "born", "slot")


@dataclass(frozen=True, kw_only=True)
class SlotStatus:
    """A slot of a worker, as `status` shows it."""

    host: str
    pid: int
    slot: str
    device: str
    study: str | None  # the study, the trial's number and its last whole epoch; None between two trials
    trial: int | None
    epoch: int | None
    silent_seconds: float  # since its last heartbeat
    closed: str | None  # why it takes no trials at the moment; None: it is open


def beat(connection: Connection, slots: Mapping[Owner, str], closed: Mapping[Owner, str]) -> None:
    """Records a heartbeat of these slots, each with its device's name, and why some are closed.

    Forgets those that have been silent for long.
    """
    remove(connection, list(slots))
    now = database_now(connection)
    rows = [
        asdict(owner)
        | {"device": device[:255], "beat": now, "closed": storable(closed[owner]) if owner in closed else None}
        for owner, device in slots.items()
    ]
    connection.execute(insert(table), rows)
    connection.execute(delete(table).where(table.c.beat < now - timedelta(hours=FORGOTTEN_HOURS)))


def remove(connection: Connection, slots: Sequence[Owner]) -> None:
    """Removes these slots from the list."""
    for owner in slots:
        connection.execute(
            delete(table).where(table.c.machine == owner.machine, table.c.pid == owner.pid, table.c.slot == owner.slot)
        )


def present(connection: Connection) -> list[SlotStatus]:
    """The slots that send heartbeats, by host, process and slot. Processes known to be gone are left out."""
    now, stored = database_now(connection), attempt_table.table
    slot = ("machine", "pid", "born", "slot")
    held = (
        select(*(stored.c[name] for name in slot), stored.c.epoch, TrialModel.number, StudyModel.study_name)
        .join(TrialModel, TrialModel.trial_id == stored.c.trial_id)
        .join(StudyModel, StudyModel.study_id == TrialModel.study_id)
        .where(stored.c.ended.is_(None), attempt_table.trial_is_running())
        .subquery()
    )
    same_slot = and_(*(held.c[name] == table.c[name] for name in slot))
    rows = connection.execute(
        select(table, held.c.study_name, held.c.number, held.c.epoch)
        .outerjoin(held, same_slot)
        .order_by(table.c.host, table.c.pid, table.c.slot)
    )
    return [
        SlotStatus(
            **{name: row[name] for name in ("host", "pid", "slot", "device", "closed")},
            study=row["study_name"],
            trial=row["number"],
            epoch=row["epoch"],
            silent_seconds=max(0.0, (now - row["beat"]).total_seconds()),
        )
        for row in rows.mappings()
        if not Owner(**{name: row[name] for name in _OWNER}).gone()
    ]


def silence(connection: Connection) -> float | None:
    """Seconds since the last heartbeat of a worker of this very machine, or container; None if there is none."""
    rows = connection.execute(select(table)).mappings().all()
    now = database_now(connection)
    living = [
        row
        for row in rows
        if on_this_machine(row["machine"]) and not Owner(**{name: row[name] for name in _OWNER}).gone()
    ]
    return min((max(0.0, (now - row["beat"]).total_seconds()) for row in living), default=None)
