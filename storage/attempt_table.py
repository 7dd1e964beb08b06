"""The table of attempts: who ran a trial, when it was last seen, and how its run ended.

Each run of a trial is one row. The row of a RUNNING trial's last attempt is its owner, its heartbeat and its right to
write, all in one. Only `storage.claims` changes rows; `storage.legacy` adds those of older
versions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

from optuna.trial import TrialState
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    RowMapping,
    Select,
    String,
    Table,
    Text,
    and_,
    bindparam,
    case,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute

from storage.artifacts import inside
from storage.owners import Owner, clock
from storage.tables import TrialModel, storable

Outcome = Literal["finished", "interrupted", "crashed", "lost"]

table = Table(
    "trialyard_attempts",
    MetaData(),
    # Whoever deletes a trial deletes its attempts: an id may be used again.
    Column("trial_id", ForeignKey(TrialModel.__table__.c.trial_id, ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("machine", String(200), nullable=False),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("born", Double, nullable=False),
    Column("slot", String(100), nullable=False),
    Column("began", DateTime, nullable=False),  # all times are UTC, by the database's clock
    Column("beat", DateTime, nullable=False),
    Column("beat_seconds", Double, nullable=False),
    Column("resumed_after", Integer),
    Column("epoch", Integer, nullable=False),
    Column("checkpoint", String(2000)),
    Column("ended", DateTime),
    Column("outcome", String(20)),
    Column("reason", Text),
)

INDEX = "CREATE INDEX IF NOT EXISTS trialyard_running_attempts ON trialyard_attempts (trial_id) WHERE ended IS NULL"
# SQLite obeys a foreign key only where a connection asks for it, and plain Optuna's connections do not.
SQLITE_CASCADE = (
    "CREATE TRIGGER IF NOT EXISTS trialyard_attempts_of_deleted_trials AFTER DELETE ON trials "
    "BEGIN DELETE FROM trialyard_attempts WHERE trial_id = OLD.trial_id; END"
)

_OWNER = ("machine", "host", "pid", "born", "slot")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One run of a trial, from its claim to its recorded end. Times are naive UTC, by the database's clock."""

    attempt: int  # from 1
    owner: Owner
    began: datetime
    beat: datetime  # the last heartbeat
    beat_seconds: float  # between two heartbeats
    resumed_after: int | None  # the epoch of the checkpoint that it continued from; None: it started at epoch 1
    epoch: int  # the last whole epoch; 0 before the first
    checkpoint: str | None  # its checkpoint, relative to the artifacts folder; None: it has written none
    ended: datetime | None
    outcome: Outcome | None  # None: it has not ended
    reason: str | None  # why it ended, if it did not finish


def of_trial(connection: Connection, trial_id: int) -> list[Attempt]:
    """All attempts at a trial, the first one first. Empty for a trial that Trialyard has not run."""
    rows = connection.execute(select(table).where(table.c.trial_id == trial_id).order_by(table.c.attempt))
    return [_attempt(row) for row in rows.mappings()]


def running(connection: Connection, study_id: int) -> list[tuple[int, int, Attempt]]:
    """The id, the number and the running attempt of each RUNNING trial of a study that Trialyard runs, by number."""
    rows = connection.execute(
        select(TrialModel.number, table)
        .join(table, and_(table.c.trial_id == TrialModel.trial_id, table.c.ended.is_(None)))
        .where(TrialModel.study_id == study_id, trial_is_running())
        .order_by(TrialModel.number)
    )
    return [(row["trial_id"], row["number"], _attempt(row)) for row in rows.mappings()]


def last_of_unfinished(connection: Connection, study_id: int) -> dict[int, Attempt]:
    """The last attempt at each RUNNING or WAITING trial of a study, by the trial's id; none at one that never ran."""
    unfinished = TrialModel.state.in_((TrialState.RUNNING, TrialState.WAITING))
    rows = connection.execute(
        select(table)
        .join(TrialModel, TrialModel.trial_id == table.c.trial_id)
        .where(TrialModel.study_id == study_id, unfinished)
        .order_by(table.c.attempt)
    )
    return {row["trial_id"]: _attempt(row) for row in rows.mappings()}


def started_outside(connection: Connection, study_id: int) -> list[int]:
    """The numbers of the RUNNING trials that none of our workers started: somebody called `study.ask()`."""
    rows = connection.execute(
        select(TrialModel.number)
        .where(TrialModel.study_id == study_id, trial_is_running(), ~has_running_attempt())
        .order_by(TrialModel.number)
    )
    return list(rows.scalars())


def first_began(study_id: int | InstrumentedAttribute[int]) -> Select[datetime]:
    """The query for when the first trial of a study began. Imported trials have not run here."""
    # A scalar subquery, not a join: before PostgreSQL has statistics of these tables, it joins all attempts of the
    # database and sorts them, at each claim. So it goes through the trials by number, and stops at the first.
    began = select(table.c.began).where(table.c.trial_id == TrialModel.trial_id, table.c.attempt == 1)
    of_trial = began.correlate(TrialModel).scalar_subquery()
    mine = TrialModel.study_id == study_id
    return select(of_trial).where(mine, of_trial.is_not(None)).order_by(TrialModel.number).limit(1)


def durations(connection: Connection, study_id: int, last: int) -> list[float]:
    """How many seconds all attempts took at each of the `last` trials of a study that one of them finished."""
    ended = (
        select(table.c.trial_id)
        .join(TrialModel, TrialModel.trial_id == table.c.trial_id)
        .where(TrialModel.study_id == study_id, table.c.outcome == "finished")
        .order_by(TrialModel.number.desc())
        .limit(last)
    )
    rows = connection.execute(
        select(table.c.trial_id, table.c.began, _last_sign()).where(
            table.c.trial_id.in_(connection.execute(ended).scalars().all()), table.c.ended.is_not(None)
        )
    )
    seconds: dict[int, float] = {}
    for trial_id, began, end_time in rows:
        seconds[trial_id] = seconds.get(trial_id, 0.0) + (end_time - began).total_seconds()
    return list(seconds.values())


def _last_sign() -> ColumnElement[datetime]:
    """When an attempt ended. Of one that was lost nobody knows it, and it was noticed later: its last heartbeat."""
    return case((table.c.outcome == "lost", table.c.beat), else_=table.c.ended)


def spent(connection: Connection, study_id: int) -> dict[int, tuple[int, float]]:
    """The last epoch of each trial of a study, and the seconds of all its attempts that have ended, by its id."""
    rows = connection.execute(
        select(table.c.trial_id, table.c.epoch, table.c.began, _last_sign())
        .join(TrialModel, TrialModel.trial_id == table.c.trial_id)
        .where(TrialModel.study_id == study_id, table.c.ended.is_not(None))
    )
    found: dict[int, tuple[int, float]] = {}
    for trial_id, epoch, began, ended in rows:
        epochs, seconds = found.get(trial_id, (0, 0.0))
        found[trial_id] = max(epochs, epoch), seconds + (ended - began).total_seconds()
    return found


def epoch_seconds(connection: Connection, study_id: int, last: int) -> float | None:
    """The median seconds of an epoch in the attempts that finished the `last` trials of a study; None if none has.

    The time around the epochs, such as the start of the framework, is part of it.
    """
    rows = connection.execute(
        select(table.c.began, table.c.ended, table.c.epoch, table.c.resumed_after)
        .join(TrialModel, TrialModel.trial_id == table.c.trial_id)
        .where(TrialModel.study_id == study_id, table.c.outcome == "finished")
        .order_by(TrialModel.number.desc())
        .limit(last)
    ).all()
    trained = [(ended - began, epoch - (resumed_after or 0)) for began, ended, epoch, resumed_after in rows]
    seconds = [time.total_seconds() / epochs for time, epochs in trained if epochs > 0]
    return median(seconds) if seconds else None


def epochs_of(connection: Connection, trial_id: int) -> int:
    """How many epochs the checkpoint of a trial has; 0 if it has none."""
    epochs = select(func.max(table.c.epoch)).where(table.c.trial_id == trial_id, table.c.checkpoint.is_not(None))
    return connection.execute(epochs).scalar() or 0


def start(
    connection: Connection, trial_id: int, owner: Owner, beat_seconds: float, *, is_new: bool = False
) -> list[Attempt]:
    """Adds the next attempt at a trial; returns the attempts before it, of which a trial that `is_new` has none."""
    earlier = [] if is_new else of_trial(connection, trial_id)
    now = clock(connection)
    number = earlier[-1].attempt + 1 if earlier else 1
    row = {"trial_id": trial_id, "attempt": number, "began": now, "beat": now, "beat_seconds": beat_seconds, "epoch": 0}
    connection.execute(insert(table).values(row | asdict(owner)))
    return earlier


def locked(connection: Connection, trial_id: int) -> tuple[TrialState, Attempt] | None:
    """Locks the rows of a trial and of its last attempt; returns its state and that attempt. None: there is none.

    Both are locked: PostgreSQL reads a row again only if it has waited for that very row. Another worker may have taken
    the trial back meanwhile, and claimed it.
    """
    row = connection.execute(_query_of_locked(), {"trial": trial_id}).mappings().first()
    return None if row is None else (row["state"], _attempt(row))


@cache  # every change of a trial asks, and to build the query takes longer than to run it
def _query_of_locked() -> Select[Any]:
    return (
        select(TrialModel.state, table)
        .join(table, table.c.trial_id == TrialModel.trial_id)
        .where(TrialModel.trial_id == bindparam("trial"))
        .order_by(table.c.attempt.desc())
        .limit(1)
        .with_for_update(of=[TrialModel, table])
    )


def lock_study(connection: Connection, study_id: int) -> None:
    """Locks all trials of a study, and then their attempts, in the order in which everybody locks them: by trial."""
    trials = select(TrialModel.trial_id).where(TrialModel.study_id == study_id)
    connection.execute(trials.order_by(TrialModel.trial_id).with_for_update())
    attempts = select(table.c.trial_id).where(table.c.trial_id.in_(trials), table.c.ended.is_(None))
    connection.execute(attempts.order_by(table.c.trial_id).with_for_update())


def change(connection: Connection, trial_id: int, attempt: int, **columns: Any) -> None:
    """Sets columns of an attempt's row."""
    mine = (table.c.trial_id == trial_id, table.c.attempt == attempt)
    connection.execute(update(table).where(*mine).values(columns))


def end(
    connection: Connection, trial_id: int, attempt: int, outcome: Outcome, reason: str | None = None, **columns: Any
) -> None:
    """Records how an attempt ended, and other columns of its row."""
    reason = None if reason is None else storable(reason)
    change(connection, trial_id, attempt, ended=clock(connection), outcome=outcome, reason=reason, **columns)


def beat(connection: Connection, trial_id: int, attempt: int, owner: Owner) -> bool:
    """Records a heartbeat; returns whether the attempt is still `owner`'s and has not ended."""
    mine = and_(*(table.c[name] == value for name, value in asdict(owner).items()))
    running_attempt = (table.c.trial_id == trial_id, table.c.attempt == attempt, table.c.ended.is_(None))
    return connection.execute(update(table).where(*running_attempt, mine).values(beat=clock(connection))).rowcount == 1


def without_progress(attempts: Sequence[Attempt], outcome: Outcome) -> int:
    """How many of the last attempts had this outcome, back to the last attempt that finished a new epoch."""
    count = 0
    for index in range(len(attempts) - 1, -1, -1):
        count += attempts[index].outcome == outcome
        if attempts[index].epoch > max((earlier.epoch for earlier in attempts[:index]), default=0):
            break
    return count


def trial_is_running() -> ColumnElement[bool]:
    """Whether a trial's row is RUNNING: plain Optuna may have ended it."""
    return TrialModel.state == TrialState.RUNNING


def has_running_attempt() -> ColumnElement[bool]:
    """Whether a trial has an attempt that has not ended."""
    return select(table.c.trial_id).where(table.c.trial_id == TrialModel.trial_id, table.c.ended.is_(None)).exists()


def _attempt(row: RowMapping) -> Attempt:
    owner = Owner(**{name: row[name] for name in _OWNER})
    columns = {name: row[name] for name in Attempt.__dataclass_fields__ if name != "owner"}
    if inside(Path(), row["checkpoint"]) is None:
        columns["checkpoint"] = None  # everyone who may write to the database can name any file
    return Attempt(owner=owner, **columns)
