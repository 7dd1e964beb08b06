"""The only place where a trial changes hands: claim, begin, beat, record, finish, requeue.

A trial goes WAITING -> RUNNING -> (COMPLETE | PRUNED | FAIL), and RUNNING -> WAITING when its worker was interrupted,
crashed or vanished: the same row runs again, with the same hyperparameters. Every change of a state is one transaction
under the study's one lock (`transactions.write`), so that

- finished + running never exceeds the budget, and a study ends with exactly its budget;
- a crash at any line changes nothing: a RUNNING trial always has a running attempt, which names its owner;
- no two workers hold one trial: the owner in the last attempt's row is compared before anything is written in the
  trial's name.

The statements are our own, on Optuna's tables: its storage has no call for "the oldest waiting trial, unless the
budget is spent", and its calls are a transaction each.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, insert, or_, select
from sqlalchemy import delete as delete_rows

from storage import artifacts, attempt_table, deletions, faults, ledger, pausing, queue
from storage import hits as hit_rows
from storage import slots as slot_rows
from storage.attempt_table import Attempt, Outcome
from storage.errors import ClaimLost, StorageError, StudyUnreadable, many
from storage.hits import Hits
from storage.holdings import hold, holds, let_go
from storage.ledger import State, Study
from storage.owners import Owner, database_now
from storage.silence import watched_seconds
from storage.tables import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialValueModel,
    delete_study,
    insert_trial,
    next_number,
    param_row,
    points_in_queue,
    set_trial_attributes,
    start_waiting,
    update_trial,
    utc_now,
    value_row,
)
from storage.transactions import PatientStorage, read, write

log = logging.getLogger(__name__)

MISSED_BEATS = 3  # a slow heartbeat is not a lost one: so many must be missing, however short the grace period is


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one trial, until somebody else has it."""

    study: str
    study_id: int
    incarnation: str
    trial_id: int  # unique in the database
    number: int  # unique in the study, from 0
    attempt: int  # from 1
    owner: Owner
    checkpoints: tuple[str, ...] = ()  # where earlier attempts may have left one, relative to the artifacts folder

    @property
    def folder(self) -> PurePosixPath:
        """Where this attempt has its files, relative to the artifacts folder. No other attempt writes there."""
        return artifacts.attempt_folder(self.study, self.incarnation, self.number, self.attempt)


def delete(storage: RDBStorage, study: Study, grace_seconds: float) -> None:
    """Deletes `study` with its trials, all or nothing. Its workers notice at their next beat or epoch, and continue.

    Raises StorageError while a living worker runs a trial of it, unless the study was stopped; and StudyGone.
    """

    def work(connection: Connection) -> None:
        _take_back(
            connection, study, _lost_trials(storage, connection, ledger.current(connection, study), grace_seconds)
        )
        current = ledger.current(connection, study)
        if current.state != "stopped" and current.running:
            raise StorageError(
                f"study {study.name!r} has {many(current.running, 'running trial')}: "
                f"`trialyard stop {study.name}` first, then delete it"
            )
        _delete(connection, study)

    write(storage, study.name, work)


def _delete(connection: Connection, study: Study) -> None:
    # A heartbeat or an epoch, which do not take the study's lock, must not wait for this, and this for it.
    attempt_table.lock_study(connection, study.id)
    deletions.record(connection, study.id, study.name, study.incarnation)
    delete_study(connection, study.id)


def ended_elsewhere(claim: Claim) -> ClaimLost:
    """What to raise when somebody has ended the trial, such as `optuna tell`."""
    return ClaimLost(f"study {claim.study}: trial {claim.number} was ended by somebody else meanwhile")


def lost(claim: Claim) -> ClaimLost:
    """What to raise when somebody else has the trial."""
    return ClaimLost(
        f"study {claim.study}: trial {claim.number} is no longer held by {claim.owner.slot} of process "
        f"{claim.owner.pid} on {claim.owner.host} (attempt {claim.attempt}): its result is dropped"
    )


def trial_exists(storage: RDBStorage, claim: Claim) -> bool:
    """Whether the claimed trial is still in the database. Its study may have been deleted.

    Its attempt tells it from another trial that has its id now: SQLite gives ids again.
    """
    attempts = read(storage, lambda connection: attempt_table.of_trial(connection, claim.trial_id))
    return any(_is_of(claim, attempt) for attempt in attempts)


def delete_at_once(storage: RDBStorage, study_id: int) -> bool:
    """As `delete`, but also while workers run its trials, as Optuna deletes. False: it is no study of ours.

    Optuna's own deletion reads the rows first, and ends in nothing if a worker writes another one meanwhile.
    """
    study = next((study for study in ledger.studies(storage) if study.id == study_id), None)
    if study is None:
        return False
    write(storage, study.name, lambda connection: _delete(connection, study))
    return True


# --- claim ------------------------------------------------------------------------------------------------


def claim(
    storage: RDBStorage, study: Study, owner: Owner, grace_seconds: float, beat_seconds: float = 10.0
) -> Claim | None:
    """Claims the next waiting trial of `study`, or a new one while the budget lasts and the study is open; else None.

    The oldest waits at the front; where more wait than the budget has room for, what somebody has added since.

    First takes back the trials of workers that are gone: at once if the owner was a process of this machine, otherwise
    once this process has seen the same last heartbeat for `grace_seconds`, which takes two calls. `beat_seconds` is how
    often the new owner will send one.

    Raises StudyGone if the study was deleted, whether or not there is another one of its name.
    """
    made: list[Claim] = []
    gone: list[_Lost] = []

    def is_worth_the_lock(connection: Connection) -> bool:
        current = ledger.current(connection, study)
        # Without the lock: beside hundreds of running trials this takes longer than all the rest.
        gone[:] = _lost_trials(storage, connection, current, grace_seconds)
        return _may_start(current) or bool(gone)

    def work(connection: Connection) -> Claim | None:
        if made and _owns(connection, made[0]):
            return made[0]  # done already: the commit succeeded, but its answer was lost
        _take_back(connection, study, gone)
        current = ledger.current(connection, study)
        if not _may_start(current):
            return None
        waiting = queue.next_waiting(connection, current)
        if waiting is not None:
            trial_id, number = waiting
            if not start_waiting(connection, trial_id):
                return None  # somebody's own `study.ask()`, which does not take our lock, was faster
        else:
            number = next_number(connection, study.id)
            trial_id = insert_trial(connection, study.id, number, TrialState.RUNNING, started=utc_now())
        earlier = attempt_table.start(connection, trial_id, owner, beat_seconds, is_new=waiting is None)
        new = Claim(
            study=study.name,
            study_id=study.id,
            incarnation=study.incarnation,
            trial_id=trial_id,
            number=number,
            attempt=len(earlier) + 1,
            owner=owner,
            checkpoints=tuple(_checkpoint(study, number, attempt) for attempt in reversed(earlier)),
        )
        made[:] = [new]
        hold(study.incarnation, trial_id, new.attempt)  # before other slots of this process can see it
        return new

    # Most looks of idle workers find nothing: they leave the lock to others.
    if not read(storage, is_worth_the_lock):
        return None
    try:
        return write(storage, study.name, work)
    except BaseException:
        # Its commit may have succeeded without an answer: then it is taken back as that of a worker that ended.
        for each in made:
            let_go(each.incarnation, each.trial_id, each.attempt)
        raise


def _may_start(study: Study) -> bool:
    """Whether a trial may start: the budget lasts, and the study is open and within its hours."""
    return study.finished + study.running < study.budget.total and study.state == "open" and not study.is_late


def _checkpoint(study: Study, number: int, attempt: Attempt) -> str:
    # A worker that was killed may have written one without a word to the database.
    folder = artifacts.attempt_folder(study.name, study.incarnation, number, attempt.attempt)
    return attempt.checkpoint or str(folder / artifacts.CHECKPOINT)


def _take_back(connection: Connection, study: Study, lost: Sequence["_Lost"]) -> None:
    """Puts the RUNNING trials of workers that are gone back into the queue."""
    for trial in lost:
        # One may have been taken back since. And heartbeats and epochs are recorded without the study's lock.
        state, attempt = attempt_table.locked(connection, trial.trial_id) or (None, None)
        if state == TrialState.RUNNING and attempt == trial.attempt:
            log.warning("study %s: trial %d goes back to the queue: %s", study.name, trial.number, trial.reason)
            _put_back(connection, trial.trial_id, trial.attempt.attempt, "lost", trial.reason)


@dataclass(frozen=True, kw_only=True)
class _Lost:
    """A RUNNING trial whose worker is gone."""

    trial_id: int
    number: int
    attempt: Attempt
    reason: str  # how that is known


def _lost_trials(storage: RDBStorage, connection: Connection, study: Study, grace_seconds: float) -> list[_Lost]:
    """The RUNNING trials of a study whose workers are gone.

    A process of this machine is gone when it has ended, however long it was silent. A worker of this very process is
    gone when it does not hold the trial any more. A process of another machine is gone when this one has watched it
    silent for the grace period, and for as long as three heartbeats of that worker take.
    """
    if study.running == 0:
        return []
    running = attempt_table.running(connection, study.id)
    # While the database was away nobody could send a heartbeat.
    not_before = storage.last_away if isinstance(storage, PatientStorage) else float("-inf")
    attempts = [(trial_id, attempt) for trial_id, _, attempt in running]
    silent = watched_seconds((study.incarnation, study.id), attempts, not_before)
    lost = []
    gone: dict[tuple[str, int, float], bool] = {}  # by process: each is asked for once, and not for each of its slots
    for trial_id, number, attempt in running:
        owner, seconds = attempt.owner, silent[trial_id, attempt.attempt]
        process = owner.machine, owner.pid, owner.born
        if process not in gone:
            gone[process] = owner.gone()
        if gone[process]:
            reason = f"process {owner.pid} on {owner.host} ended"
        elif owner.is_this_process and not holds(study.incarnation, trial_id, attempt.attempt):
            reason = f"the worker in process {owner.pid} on {owner.host} ended, though the process goes on"
        elif not owner.is_here and seconds >= max(grace_seconds, MISSED_BEATS * attempt.beat_seconds):
            reason = f"no sign of process {owner.pid} on {owner.host} for {seconds:.0f} s"
        else:
            continue
        lost.append(_Lost(trial_id=trial_id, number=number, attempt=attempt, reason=reason))
    return lost


def _put_back(
    connection: Connection, trial_id: int, attempt: int, outcome: Literal["interrupted", "crashed", "lost"], reason: str
) -> TrialState:
    """Ends the attempt. The trial waits again, or fails if it ended so too often without a new epoch.

    Returns its new state.
    """
    attempt_table.end(connection, trial_id, attempt, outcome, reason)
    retries = faults.of(outcome).retries
    count = attempt_table.without_progress(attempt_table.of_trial(connection, trial_id), outcome)
    if retries is None or count <= retries:
        update_trial(connection, trial_id, state=TrialState.WAITING)
        return TrialState.WAITING
    failure = {"kind": outcome, "message": f"{reason}; tried {count} times without getting further"}
    set_trial_attributes(connection, trial_id, {"failure": failure})
    update_trial(connection, trial_id, state=TrialState.FAIL, _datetime_complete_utc=utc_now())
    return TrialState.FAIL


# --- while it runs ----------------------------------------------------------------------------------------


class PointTaken(Exception):  # noqa: N818 - it is an event
    """Another trial of the study has these hyperparameters."""


def begin(
    storage: RDBStorage, claim: Claim, params: Mapping[str, tuple[BaseDistribution, Any]], *, unique: bool = False
) -> None:
    """Records the trial's hyperparameters: by name the distribution, and the value. Those that it has stay as they are.

    Raises ClaimLost; and if they must be `unique`, PointTaken where another trial of the study has all of them.
    """

    def work(connection: Connection) -> None:
        _require_owner(connection, claim)
        if unique and _is_taken(connection, claim, params):
            raise PointTaken
        stored = TrialParamModel
        recorded = set(connection.execute(select(stored.param_name).where(stored.trial_id == claim.trial_id)).scalars())
        new = {name: param for name, param in params.items() if name not in recorded}
        rows = [param_row(claim.trial_id, name, *param) for name, param in new.items()]
        if rows:
            connection.execute(insert(stored), rows)

    # Unless they must be unique, the lock of the trial's row is enough.
    write(storage, claim.study if unique else None, work)


def _is_taken(connection: Connection, claim: Claim, params: Mapping[str, tuple[BaseDistribution, Any]]) -> bool:
    of_trials = defaultdict[int, dict[str, Any]](dict)
    stored, others = TrialParamModel, (TrialModel.study_id == claim.study_id, TrialModel.trial_id != claim.trial_id)
    rows = connection.execute(
        select(stored.trial_id, stored.param_name, stored.param_value)
        .join(TrialModel, TrialModel.trial_id == stored.trial_id)
        .where(*others)
    )
    for trial_id, name, value in rows:
        of_trials[trial_id][name] = value
    own = {name: distribution.to_internal_repr(value) for name, (distribution, value) in params.items()}
    if any(_is_same(point, own) for point in of_trials.values()):
        return True
    # A trial that was listed has its point before it begins.
    listed = points_in_queue(connection, *others)
    return any(_is_same(point, {name: value for name, (_, value) in params.items()}) for point in listed)


def _is_same(point: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    # Steps of a float are sums, which differ in the last digits.
    return point.keys() == other.keys() and all(
        math.isclose(point[name], value, rel_tol=1e-9)
        if isinstance(value, float) and isinstance(point[name], (int, float))
        else point[name] == value
        for name, value in other.items()
    )


def beat(
    storage: RDBStorage, slots: Mapping[Owner, str], held: Sequence[Claim], closed: Mapping[Owner, str] | None = None
) -> dict[Claim, State | None]:
    """Records in one transaction that the `slots` of a worker live, each with its device's name, and its trials.

    Those slots that are `closed` have the reason there.

    Returns the state of each claim's study, or None where the claim is lost: somebody else has the trial by now, or it
    was deleted.
    """

    def work(connection: Connection) -> dict[Claim, State | None]:
        if slots:
            slot_rows.beat(connection, slots, closed or {})
        states: dict[Claim, State | None] = {}
        # In one order, so that two transactions never wait for each other.
        for claim in sorted(held, key=lambda claim: claim.trial_id):
            ours = attempt_table.beat(connection, claim.trial_id, claim.attempt, claim.owner)
            states[claim] = _state_to_obey(connection, claim) if ours else None
        return states

    return write(storage, None, work)


def _state_to_obey(connection: Connection, claim: Claim) -> State:
    try:
        return ledger.state_of(connection, claim.study_id)
    except StudyUnreadable as error:
        log.warning("%s", error)
        return "paused"


def record_epochs(
    storage: RDBStorage,
    claim: Claim,
    values: Mapping[int, float],
    files: Sequence[str] | None = None,
    resumed_after: int | None = None,
    *,
    epoch: int | None = None,
) -> State:
    """Records the intermediate `values` by step (from 1), in one transaction; returns the study's state.

    A step is an epoch, or a repeat where there are several; then `epoch` is the last whole epoch.

    Recorded again after a restart, a value replaces the earlier one and those of later steps. A value that is not
    finite is stored as NaN: Optuna can read it, and its pruners and TPE take it for the worst. `files` are the names of
    the files that the attempt has now, of `artifacts.DOWNLOADABLE`; None if they have not changed. `resumed_after` is
    the last epoch of the checkpoint that the attempt continues from: the database may lack some of its values. Raises
    ClaimLost.
    """

    def work(connection: Connection) -> State:
        _require_owner(connection, claim)
        stored = TrialIntermediateValueModel
        if values:
            # What an attempt left that got further before it was lost is not of this training.
            later = stored.step > max(values)
            again = or_(stored.step.in_(values), later)
            connection.execute(delete_rows(stored).where(stored.trial_id == claim.trial_id, again))
        for step, value in values.items():
            # An infinite accuracy is also a failed measurement, but a pruner would take it for the best.
            known = value if math.isfinite(value) else math.nan
            number, kind = stored.intermediate_value_to_stored_repr(known)
            row = {"trial_id": claim.trial_id, "step": step}
            connection.execute(
                insert(stored).values(row | {"intermediate_value": number, "intermediate_value_type": kind})
            )
        columns: dict[str, Any] = {"epoch": max(values) if epoch is None else epoch}
        if files is not None:
            columns["checkpoint"] = _set_files(connection, claim, files)
        if resumed_after is not None:
            columns["resumed_after"] = resumed_after
        attempt_table.change(connection, claim.trial_id, claim.attempt, **columns)
        return _state_to_obey(connection, claim)

    # The lock of the trial's row is enough: claims of other trials do not wait for this.
    return write(storage, None, work)


def finish(
    storage: RDBStorage,
    claim: Claim,
    state: TrialState,
    value: float | None,
    values: dict[str, Any],
    files: Sequence[str] = (),
    hits: Hits | None = None,
) -> None:
    """Ends the trial for good, with `values` as its user attributes and its `hits`. Raises ClaimLost.

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
        if _has_ended(connection, claim, "finished"):
            return
        attempt_table.end(connection, claim.trial_id, claim.attempt, "finished", checkpoint=None)
        if values:
            set_trial_attributes(connection, claim.trial_id, values)
        if score is not None:
            connection.execute(insert(TrialValueModel).values(value_row(claim.trial_id, score)))
        if hits is not None:
            hit_rows.record(connection, claim.trial_id, hits)
        _set_files(connection, claim, files)
        update_trial(connection, claim.trial_id, state=state, _datetime_complete_utc=utc_now())
        if state == TrialState.FAIL:
            pausing.pause_after_failures(connection, claim.study_id)

    write(storage, claim.study, work)


def requeue(
    storage: RDBStorage,
    claim: Claim,
    outcome: Literal["interrupted", "crashed"],
    reason: str,
    files: Sequence[str] | None = None,
) -> None:
    """Puts the trial back into the queue, with its `files` as for `record_epochs`. Raises ClaimLost.

    A trial that keeps crashing fails.
    """

    def work(connection: Connection) -> None:
        if _has_ended(connection, claim, outcome):
            return
        state = _put_back(connection, claim.trial_id, claim.attempt, outcome, reason)
        if state == TrialState.FAIL:
            pausing.pause_after_failures(connection, claim.study_id)
        if files is not None:
            checkpoint = _set_files(connection, claim, files)
            attempt_table.change(connection, claim.trial_id, claim.attempt, checkpoint=checkpoint)

    write(storage, claim.study, work)


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
    silent_seconds: float  # since its last heartbeat


def running_trials(storage: RDBStorage, study_id: int) -> list[RunningTrial]:
    """The running trials and their owners, by trial number."""

    def work(connection: Connection) -> tuple[datetime, list[tuple[int, int, Attempt]]]:
        return database_now(connection), attempt_table.running(connection, study_id)

    now, running = read(storage, work)
    return [
        RunningTrial(
            number=number,
            host=attempt.owner.host,
            pid=attempt.owner.pid,
            slot=attempt.owner.slot,
            attempt=attempt.attempt,
            epoch=attempt.epoch,
            silent_seconds=max(0.0, (now - attempt.beat).total_seconds()),
        )
        for _, number, attempt in running
    ]


# --- statements -------------------------------------------------------------------------------------------


def _require_owner(connection: Connection, claim: Claim) -> None:
    """Locks the trial's row. Raises ClaimLost unless the claim's attempt is its last one, and runs."""
    found = attempt_table.locked(connection, claim.trial_id)
    if found is not None:
        state, attempt = found
        if _is_of(claim, attempt) and attempt.ended is None and state == TrialState.RUNNING:
            return
    raise lost(claim)


def _owns(connection: Connection, claim: Claim) -> bool:
    try:
        _require_owner(connection, claim)
    except ClaimLost:
        return False
    return True


def _has_ended(connection: Connection, claim: Claim, outcome: Outcome) -> bool:
    """Whether the claim's attempt has ended so already: its commit succeeded, but the answer was lost.

    Locks the trial's row. Raises ClaimLost if the attempt does not run and has not ended so. Somebody else may have
    claimed the trial meanwhile.
    """
    if _owns(connection, claim):
        return False
    attempts = attempt_table.of_trial(connection, claim.trial_id)
    if any(_is_of(claim, attempt) and attempt.outcome == outcome for attempt in attempts):
        return True
    raise lost(claim)


def _is_of(claim: Claim, attempt: Attempt) -> bool:
    return (attempt.attempt, attempt.owner) == (claim.attempt, claim.owner)


def _set_files(connection: Connection, claim: Claim, names: Sequence[str]) -> str | None:
    """Sets which of the trial's files optuna-dashboard offers: these of this attempt, and none of earlier ones.

    Returns the attempt's checkpoint, if it is among them.
    """
    stored = TrialSystemAttributeModel
    folders = {PurePosixPath(path).parent for path in claim.checkpoints} | {claim.folder}
    paths = [folder / name for folder in folders for name in artifacts.DOWNLOADABLE]
    keys = [artifacts.listing(path)[0] for path in paths]
    connection.execute(delete_rows(stored).where(stored.trial_id == claim.trial_id, stored.key.in_(keys)))
    entries = [artifacts.listing(claim.folder / name) for name in names]
    rows = [{"trial_id": claim.trial_id, "key": key, "value_json": json.dumps(entry)} for key, entry in entries]
    if rows:
        connection.execute(insert(stored), rows)
    return str(claim.folder / artifacts.CHECKPOINT) if artifacts.CHECKPOINT in names else None
