"""The only place where a trial changes hands: claim, beat, report, finish, requeue.

A trial goes WAITING -> RUNNING -> (COMPLETE | PRUNED | FAIL), and RUNNING -> WAITING when its worker was interrupted,
crashed or vanished: the same row runs again, with the same hyperparameters. Every change of a state is one transaction
under the study's one lock (`database.write`), so that

- finished + running never exceeds the budget, and a study ends with exactly its budget;
- a crash at any line changes nothing: a RUNNING trial always has an owner and a heartbeat;
- no two workers hold one trial: the owner is in the last of the trial's ``attempts``, and is compared before
  anything is written in the trial's name.

The statements are our own, on Optuna's tables: its storage has no call for "the oldest waiting trial, unless the
budget is spent", and its calls are a transaction each.
"""

import json
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, and_, func, insert, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.exc import SQLAlchemyError

from storage import artifacts, attributes
from storage.attributes import Attempts
from storage.database import read, write
from storage.errors import ClaimLost, StorageError, StudyGone
from storage.ledger import State, budget_of, finished_and_running, is_late, state_of, study_id_of
from storage.owners import Owner, database_now, server_started
from storage.tables import (
    TrialHeartbeatModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
    delete_study,
    insert_trial,
    next_number,
    set_trial_attributes,
    update_trial,
    utc_now,
    value_row,
)

log = logging.getLogger(__name__)

RETRIES = 3  # how often in a row a trial is tried again after a crash or a lost worker, without a new epoch

Outcome = Literal["finished", "interrupted", "crashed", "lost"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one trial, until somebody else has it."""

    study: str
    study_id: int
    trial_id: int  # unique in the database
    number: int  # unique in the study, from 0
    attempt: int  # from 1
    owner: Owner


def delete(storage: RDBStorage, study: str, grace_seconds: float) -> None:
    """Deletes `study` with its trials, all or nothing. Its workers notice at their next beat or epoch, and continue.

    Raises StorageError while a living worker runs a trial of it, unless the study was stopped; and StudyGone.
    """

    def work(connection: Connection) -> None:
        study_id = study_id_of(connection, study)
        if state_of(connection, study_id) != "stopped":
            _take_back(connection, study_id, study, grace_seconds)
            _, running = finished_and_running(connection, study_id)
            if running:
                raise StorageError(
                    f"study {study!r} has {running} running trials: `trialyard stop {study}` first, then delete it"
                )
        delete_study(connection, study_id)

    write(storage, study, work)


def trial_exists(storage: RDBStorage, claim: Claim) -> bool:
    """Whether the claimed trial is still in the database. Its study may have been deleted."""
    found = select(TrialModel.trial_id).where(TrialModel.trial_id == claim.trial_id)
    return read(storage, lambda connection: connection.execute(found).scalar() is not None)


# --- claim ------------------------------------------------------------------------------------------------


def claim(
    storage: RDBStorage, study: str, worker: Owner, grace_seconds: float, incarnation: str | None = None
) -> Claim | None:
    """Claims the oldest waiting trial of `study`, or a new one while the budget lasts and the study is open; else None.

    First takes back the trials of workers that are gone: at once if the owner was a process of this machine, otherwise
    after `grace_seconds` without a beat.

    Raises StudyGone where there is none, or where it is another one of that name than that `incarnation`.
    """

    def work(connection: Connection) -> Claim | None:
        study_id = study_id_of(connection, study)
        if incarnation is not None and attributes.of_study(connection, study_id, "incarnation") != incarnation:
            raise StudyGone(f"study {study!r} was deleted, and another one made: start the worker again")
        limit = budget_of(connection, study_id)
        if limit is None:
            raise StorageError(f"study {study!r} has no budget: run `trialyard create` for it again")
        _take_back(connection, study_id, study, grace_seconds)
        finished, running = finished_and_running(connection, study_id)
        if (
            finished + running >= limit.total
            or state_of(connection, study_id) != "open"
            or is_late(connection, study_id, limit)
        ):
            return None
        waiting = connection.execute(
            select(TrialModel.trial_id, TrialModel.number)
            .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.WAITING)
            .order_by(TrialModel.number)
            .limit(1)
        ).first()
        if waiting is not None:
            trial_id, number = waiting
            update_trial(connection, trial_id, state=TrialState.RUNNING, _datetime_start_utc=utc_now())
        else:
            number = next_number(connection, study_id)
            trial_id = insert_trial(connection, study_id, number, TrialState.RUNNING, started=utc_now())
        attempts = _attempts(connection, trial_id)
        attempts.append(asdict(worker) | {"began": _now().isoformat(timespec="seconds")})
        set_trial_attributes(connection, trial_id, {"attempts": attempts})
        _beat(connection, trial_id)
        return Claim(
            study=study,
            study_id=study_id,
            trial_id=trial_id,
            number=number,
            attempt=len(attempts),
            owner=worker,
        )

    return write(storage, study, work)


def _take_back(connection: Connection, study_id: int, study: str, grace_seconds: float) -> None:
    """Puts the RUNNING trials of workers that are gone back into the queue."""
    running = connection.execute(
        select(TrialModel.trial_id, TrialModel.number, TrialHeartbeatModel.heartbeat)
        .outerjoin(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING)
        .order_by(TrialModel.number)
    ).all()
    if not running:
        return
    # While the server was away nobody could beat, so silence counts from the server's start.
    now, since = database_now(connection), server_started(connection)
    for trial_id, number, beaten in running:
        attempts = _attempts(connection, trial_id)
        if not attempts:
            continue  # started with plain Optuna's `study.ask()`: not ours to take back
        owner = _owner(attempts)
        silent = (now - max(beaten or datetime.min, since)).total_seconds()
        if owner.gone():
            why = f"process {owner.pid} on {owner.host} ended"
        elif silent > grace_seconds:
            why = f"no sign of process {owner.pid} on {owner.host} for {silent:.0f} s"
        else:
            continue
        log.warning("study %s: trial %d goes back to the queue: %s", study, number, why)
        _put_back(connection, trial_id, attempts, "lost", why)


def _put_back(connection: Connection, trial_id: int, attempts: Attempts, outcome: Outcome, why: str) -> None:
    """Ends the last attempt. The trial waits again, or fails after RETRIES attempts without a new epoch."""
    last = attempts[-1] | _ending(outcome) | {"why": why, "epoch": _last_epoch(connection, trial_id)}
    attempts = [*attempts[:-1], last]
    broken = 0
    for attempt, before in zip(reversed(attempts), [*reversed(attempts[:-1]), {}], strict=True):
        if attempt.get("outcome") in ("crashed", "lost"):
            broken += 1
        if attempt.get("epoch", 0) > before.get("epoch", 0):
            break  # this attempt finished a new epoch: earlier crashes no longer count
    values: dict[str, Any] = {"attempts": attempts}
    if broken > RETRIES:
        values["failure"] = {"kind": outcome, "message": f"{why}; tried {broken} times without getting further"}
        update_trial(connection, trial_id, state=TrialState.FAIL, _datetime_complete_utc=utc_now())
    else:
        update_trial(connection, trial_id, state=TrialState.WAITING)
    set_trial_attributes(connection, trial_id, values)


# --- while it runs ----------------------------------------------------------------------------------------


def beat(storage: RDBStorage, claim: Claim) -> State:
    """Records that `claim` is being worked on; returns the study's state.

    Raises ClaimLost if somebody else has the trial by now.
    """

    def work(connection: Connection) -> State:
        _attempts_if_owner(connection, claim)
        _beat(connection, claim.trial_id)
        return state_of(connection, claim.study_id)

    return write(storage, None, work)


def report(storage: RDBStorage, claim: Claim, step: int, value: float, files: Sequence[str] | None = None) -> State:
    """Records the intermediate `value` of epoch `step` (from 1); returns the study's state.

    Recorded again after a restart, a value replaces the earlier one. A value that is not finite is stored as NaN:
    Optuna can read it, and its pruners and TPE take it for the worst. `files` are the names of the files that the trial
    has now, of `artifacts.DOWNLOADABLE`; None if they have not changed. Raises ClaimLost.
    """
    return resume(storage, claim, {step: value}, None, files)


def resume(
    storage: RDBStorage,
    claim: Claim,
    values: dict[int, float],
    epoch: int | None,
    files: Sequence[str] | None = None,
) -> State:
    """Records intermediate `values` by step, in one transaction, and that the attempt resumed after `epoch`.

    The values are those of a checkpoint: the database may lack some of them. `files` as for `report`. Raises ClaimLost.
    """

    def work(connection: Connection) -> State:
        attempts = _attempts_if_owner(connection, claim)
        stored = TrialIntermediateValueModel
        connection.execute(delete_rows(stored).where(stored.trial_id == claim.trial_id, stored.step.in_(values)))
        for step, value in values.items():
            # An infinite accuracy is also a failed measurement, but a pruner would take it for the best.
            known = value if math.isfinite(value) else math.nan
            number, kind = stored.intermediate_value_to_stored_repr(known)
            row = {"trial_id": claim.trial_id, "step": step}
            connection.execute(
                insert(stored).values(row | {"intermediate_value": number, "intermediate_value_type": kind})
            )
        if epoch is not None:
            attempts[-1]["resumed_after"] = epoch
            set_trial_attributes(connection, claim.trial_id, {"attempts": attempts})
        if files is not None:
            _list_files(connection, claim, files)
        return state_of(connection, claim.study_id)

    return write(storage, claim.study, work)


def finish(
    storage: RDBStorage,
    claim: Claim,
    state: TrialState,
    value: float | None,
    values: dict[str, Any],
    files: Sequence[str] = (),
) -> None:
    """Ends the trial for good, with `values` as its user attributes. Raises ClaimLost.

    A `value` that is not finite is never stored. A COMPLETE trial without a finite value ends as FAIL with that reason,
    and a PRUNED one has no value, as with Optuna's own `tell`.

    `files` are the names of the files that it leaves, of `artifacts.DOWNLOADABLE`: optuna-dashboard offers them.

    The samplers that Trialyard offers do nothing in `after_trial` for one objective without constraints, so the state
    is set directly, under the lock.
    """
    score = value if value is not None and math.isfinite(value) else None
    if state == TrialState.COMPLETE and score is None:
        failure = {"kind": "nan", "message": f"its score is {value}, which is not a finite number"}
        state, values = TrialState.FAIL, values | {"failure": failure}

    def work(connection: Connection) -> None:
        attempts = _attempts_if_owner(connection, claim, or_finished=True)
        if "outcome" in attempts[-1]:
            return  # done already: the commit succeeded, but its answer was lost
        attempts[-1] |= _ending("finished")
        set_trial_attributes(connection, claim.trial_id, values | {"attempts": attempts})
        if score is not None:
            connection.execute(insert(TrialValueModel).values(value_row(claim.trial_id, score)))
        _list_files(connection, claim, files)
        update_trial(connection, claim.trial_id, state=state, _datetime_complete_utc=utc_now())

    write(storage, claim.study, work)


def requeue(
    storage: RDBStorage,
    claim: Claim,
    outcome: Literal["interrupted", "crashed"],
    why: str,
    files: Sequence[str] = (),
) -> None:
    """Puts the trial back into the queue, with its `files` as for `report`. Raises ClaimLost.

    A trial that keeps crashing fails.
    """

    def work(connection: Connection) -> None:
        _put_back(connection, claim.trial_id, _attempts_if_owner(connection, claim), outcome, why)
        _list_files(connection, claim, files)

    write(storage, claim.study, work)


class Beating:
    """Beats for a claim in the background while the ``with`` block runs.

    A beat that fails because the database is away is tried again at the next interval. The thread ends only with the
    block, or when the claim is lost.
    """

    def __init__(self, storage: RDBStorage, claim: Claim, seconds: float) -> None:
        self._storage, self._claim, self._seconds = storage, claim, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"beat-{claim.study}-{claim.number}", daemon=True)
        self.lost = False
        self.wanted: State = "open"  # of the study, as of the last beat

    def __enter__(self) -> "Beating":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        # A beat that waits for an absent database must not delay the end of the trial.
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                self.wanted = beat(self._storage, self._claim)
            except ClaimLost as lost:
                if not self._done.is_set():
                    log.warning("%s", lost)
                    self.lost = True
                return
            except (OptunaError, SQLAlchemyError, StorageError, OSError) as error:
                log.warning("a beat for trial %d failed, to be tried again: %s", self._claim.number, error)


# --- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A RUNNING trial and who runs it."""

    number: int
    host: str
    pid: int
    slot: str
    attempt: int
    epoch: int  # the last finished one that was recorded; 0 before the first
    silent_seconds: float  # since its last beat


def running_trials(storage: RDBStorage, study_id: int) -> list[RunningTrial]:
    """The running trials and their owners, by trial number."""

    def work(connection: Connection) -> list[RunningTrial]:
        now = database_now(connection)
        last = (
            select(func.max(TrialIntermediateValueModel.step))
            .where(TrialIntermediateValueModel.trial_id == TrialModel.trial_id)
            .scalar_subquery()
        )
        of_trial = and_(
            TrialUserAttributeModel.trial_id == TrialModel.trial_id, TrialUserAttributeModel.key == "attempts"
        )
        rows = connection.execute(
            select(TrialModel.number, TrialHeartbeatModel.heartbeat, TrialUserAttributeModel.value_json, last)
            .join(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
            .join(TrialUserAttributeModel, of_trial)
            .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING)
            .order_by(TrialModel.number)
        )
        parsed = [(attributes.attempts(attributes.decoded(row[2])), row) for row in rows]
        return [
            _running_trial(number, attempts, epoch or 0, (now - beaten).total_seconds())
            for attempts, (number, beaten, _, epoch) in parsed
            if attempts
        ]

    return read(storage, work)


def _running_trial(number: int, attempts: Attempts, epoch: int, silent: float) -> RunningTrial:
    owner = _owner(attempts)
    return RunningTrial(
        number=number,
        host=owner.host,
        pid=owner.pid,
        slot=owner.slot,
        attempt=len(attempts),
        epoch=epoch,
        silent_seconds=max(0.0, silent),
    )


# --- statements -------------------------------------------------------------------------------------------


def _attempts_if_owner(connection: Connection, claim: Claim, or_finished: bool = False) -> Attempts:
    """Locks the trial's row; returns its attempts. Raises ClaimLost unless the last one is `claim`'s and runs."""
    state = connection.execute(
        select(TrialModel.state).where(TrialModel.trial_id == claim.trial_id).with_for_update()
    ).scalar()
    attempts = _attempts(connection, claim.trial_id) if state is not None else []
    mine = len(attempts) == claim.attempt and _owner(attempts) == claim.owner
    if mine and (state == TrialState.RUNNING or (or_finished and attempts[-1].get("outcome") == "finished")):
        return attempts
    raise ClaimLost(
        f"study {claim.study}: trial {claim.number} is no longer held by {claim.owner.slot} of process "
        f"{claim.owner.pid} on {claim.owner.host} (attempt {claim.attempt}): its result is dropped"
    )


def _attempts(connection: Connection, trial_id: int) -> Attempts:
    found = connection.execute(
        select(TrialUserAttributeModel.value_json).where(
            TrialUserAttributeModel.trial_id == trial_id, TrialUserAttributeModel.key == "attempts"
        )
    ).scalar()
    return attributes.attempts(attributes.decoded(found))


def _last_epoch(connection: Connection, trial_id: int) -> int:
    stored = TrialIntermediateValueModel
    return int(connection.execute(select(func.max(stored.step)).where(stored.trial_id == trial_id)).scalar() or 0)


def _list_files(connection: Connection, claim: Claim, names: Sequence[str]) -> None:
    """Sets which of the trial's files optuna-dashboard offers."""
    stored = TrialSystemAttributeModel
    listed = {name: artifacts.listing(claim.study, claim.number, name) for name in artifacts.DOWNLOADABLE}
    keys = [key for key, _ in listed.values()]
    connection.execute(delete_rows(stored).where(stored.trial_id == claim.trial_id, stored.key.in_(keys)))
    wanted = [listed[name] for name in names]
    rows = [{"trial_id": claim.trial_id, "key": key, "value_json": json.dumps(entry)} for key, entry in wanted]
    if rows:
        connection.execute(insert(stored), rows)


def _beat(connection: Connection, trial_id: int) -> None:
    stored, now = TrialHeartbeatModel, database_now(connection)
    if connection.execute(update(stored).where(stored.trial_id == trial_id).values(heartbeat=now)).rowcount == 0:
        connection.execute(insert(stored).values(trial_id=trial_id, heartbeat=now))


def _owner(attempts: Attempts) -> Owner:
    last = attempts[-1]
    return Owner(machine=last["machine"], host=last["host"], pid=last["pid"], born=last["born"], slot=last["slot"])


def _ending(outcome: Outcome) -> dict[str, str]:
    return {"ended": _now().isoformat(timespec="seconds"), "outcome": outcome}


def _now() -> datetime:
    return datetime.now(UTC)
