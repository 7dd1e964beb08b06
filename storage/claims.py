"""The only place where a trial changes hands: claim, beat, report, finish, requeue.

A trial's way is WAITING -> RUNNING -> (COMPLETE | PRUNED | FAIL), and RUNNING -> WAITING when whoever ran it was
interrupted, crashed or vanished: the same row runs again, with the same hyperparameters. Everything here that
changes a state is one transaction under the study's one lock (`database.write`), so that

- finished + running never exceeds the budget, and a study ends with exactly its budget;
- a crash at any line leaves things as they were before it: a RUNNING trial always has an owner and a heartbeat;
- no two workers hold one trial: the owner is the last of the trial's ``attempts``, and is compared before
  anything is written in its name.

The statements are our own, on Optuna's tables: its storage has no call for "the oldest waiting trial, unless the
budget is spent", and its calls are a transaction each.
"""

import hashlib
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Literal

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    BaseModel,
    StudyModel,
    StudyUserAttributeModel,
    TrialHeartbeatModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import TrialState
from sqlalchemy import Connection, and_, func, insert, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.exc import SQLAlchemyError

from storage import artifacts, legacy
from storage.database import read, write
from storage.errors import ClaimLost, StorageError, StudyGone
from storage.workers import Worker, database_now, server_started

log = logging.getLogger(__name__)

RETRIES = 3  # how often in a row a trial that took its trainer or worker down is tried again without getting further

IMPORT_KEY = "import_key"  # user attribute of an imported trial: what it is recognised by

Outcome = Literal["finished", "interrupted", "crashed", "lost"]
State = Literal["open", "paused", "stopped"]
Attempts = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one trial, until somebody else has it."""

    study: str
    study_id: int
    trial_id: int  # unique in the database
    number: int  # unique in the study, from 0
    attempt: int  # from 1
    worker: Worker


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a study may spend, over all its workers."""

    trials: int  # that are run: complete, pruned and failed ones count
    hours: float | None  # since the first trial began; no trial starts later
    imported: int = 0  # trials that were run elsewhere; they stand beside those above, and take nothing from them

    @property
    def total(self) -> int:
        """How many trials the study ends with."""
        return self.trials + self.imported


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A complete trial that was run elsewhere."""

    value: float
    params: Mapping[str, tuple[BaseDistribution, Any]]  # by name: what it was drawn from, and the value
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A study's trials by state."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        """How many count against the budget for good."""
        return self.complete + self.pruned + self.failed


# --- the study --------------------------------------------------------------------------------------------


def set_budget(storage: RDBStorage, study: str, budget: Budget) -> Budget:
    """Gives `study` its budget, or a larger one, and returns the one that it has then. The last step of its creation.

    Fewer trials than it has been given change nothing, so that nobody ends a study that others asked more of; what was
    imported stays beside it, whatever `budget` says of that.
    """

    def work(connection: Connection) -> Budget:
        study_id = _study_id(connection, study)
        there = _budget(connection, study_id)
        trials = budget.trials if there is None else max(budget.trials, there.trials)
        wanted = replace(budget, trials=trials, imported=len(_imported(connection, study_id)))
        if wanted != there:
            _set_study_attribute(connection, study_id, "budget", asdict(wanted))
        return wanted

    return write(storage, study, work)


def budget(storage: RDBStorage, study_id: int) -> Budget | None:
    """The study's budget; None while the study is being created, and for a study that is not ours."""
    return read(storage, lambda connection: _budget(connection, study_id))


def found(storage: RDBStorage, study: str, attributes: dict[str, Any], points: Sequence[dict[str, Any]]) -> bool:
    """Gives an empty study its `attributes`, and waiting trials with the hyperparameters `points`; all or nothing.

    Returns whether it did: a study that has any of the attributes, or a trial, is left as it is.
    """

    def work(connection: Connection) -> bool:
        study_id = _study_id(connection, study)
        if _size(connection, study_id) or any(
            _study_attribute(connection, study_id, key) is not None for key in attributes
        ):
            return False
        for key, attribute in (attributes | {"founded": _now().isoformat()}).items():
            _set_study_attribute(connection, study_id, key, attribute)
        for number, point in enumerate(points):
            trial_id = _insert_trial(connection, study_id, number, TrialState.WAITING)
            row = {"trial_id": trial_id, "key": "fixed_params", "value_json": json.dumps(point)}
            connection.execute(insert(TrialSystemAttributeModel).values(row))
        return True

    return write(storage, study, work)


def add(storage: RDBStorage, study: str, trials: Sequence[Imported]) -> int:
    """Puts trials that were run elsewhere into `study`, finished, all or nothing; returns how many were new.

    Raises ValueError, and adds nothing, if a value is not finite.

    The budget grows with them: it is what the study may still run, and finished + running stays within it. Each is
    known by a digest of all that it says, so that the same trials given again (also by a transaction whose answer was
    lost) add nothing; two trials that say the same are told apart by their order.
    """
    seen: Counter[str] = Counter()
    keyed: dict[str, Imported] = {}
    for trial in trials:
        if not math.isfinite(trial.value):
            raise ValueError(f"the value of an imported trial is {trial.value}: it must be a finite number")
        digest = _digest(trial)
        seen[digest] += 1
        keyed[f"{digest}-{seen[digest]}"] = trial

    def work(connection: Connection) -> int:
        study_id = _study_id(connection, study)
        there = _imported(connection, study_id)
        new = {key: trial for key, trial in keyed.items() if key not in there}
        if new:
            _insert_imported(connection, study_id, new)
        # Without a budget the study is still being created, and its creation ends with one.
        limit = _budget(connection, study_id)
        if new and limit is not None:
            grown = replace(limit, imported=len(there) + len(new))
            _set_study_attribute(connection, study_id, "budget", asdict(grown))
        return len(new)

    return write(storage, study, work)


def founded(storage: RDBStorage, study_id: int) -> str | None:
    """When the study was founded, which tells it from one that was deleted: the database's numbers are used again."""
    found: str | None = read(storage, lambda connection: _study_attribute(connection, study_id, "founded"))
    return found


def software(storage: RDBStorage, study: str, here: dict[str, str]) -> dict[str, str]:
    """The software that `study` began with: what is recorded, and where nothing is `here`, which is recorded then.

    Under the lock, so that of two first workers with different software one finds the other's.
    Raises StudyGone where the study was deleted.
    """

    def work(connection: Connection) -> dict[str, str]:
        study_id = _study_id(connection, study)
        there: dict[str, str] | None = _study_attribute(connection, study_id, "software")
        if there is None:
            _set_study_attribute(connection, study_id, "software", here)
        return there or here

    return write(storage, study, work)


def set_state(storage: RDBStorage, study: str, state: State) -> None:
    """Opens, pauses or stops `study`. Its workers see it at their next beat or epoch, and give their trials back."""
    write(
        storage,
        study,
        lambda connection: _set_study_attribute(connection, _study_id(connection, study), "state", state),
    )


def state(storage: RDBStorage, study_id: int) -> State:
    """Whether the study is open, paused or stopped."""
    return read(storage, lambda connection: _state(connection, study_id))


def delete(storage: RDBStorage, study: str, grace_seconds: float) -> None:
    """Removes `study` with its trials, all or nothing. Its workers notice at their next beat or epoch, and go on.

    Raises StorageError while a worker that lives runs a trial of it, unless the study was stopped; StudyGone.
    """

    def work(connection: Connection) -> None:
        study_id = _study_id(connection, study)
        if _state(connection, study_id) != "stopped":
            _take_back(connection, study_id, study, grace_seconds)
            _, running = _spent(connection, study_id)
            if running:
                raise StorageError(
                    f"study {study!r} has {running} running trials: `trialyard stop {study}` first, then delete it"
                )
        trials = select(TrialModel.trial_id).where(TrialModel.study_id == study_id)
        # Optuna's own deletion reads every row of it first: half a minute for 10,000 trials.
        for table in reversed(BaseModel.metadata.sorted_tables):
            if table is TrialModel.__table__ or "trial_id" not in table.c:
                if "study_id" in table.c:
                    connection.execute(delete_rows(table).where(table.c.study_id == study_id))
            else:
                connection.execute(delete_rows(table).where(table.c.trial_id.in_(trials)))

    write(storage, study, work)


def stands(storage: RDBStorage, claim: Claim) -> bool:
    """Whether the claimed trial is still in the database: its study may have been deleted."""
    found = select(TrialModel.trial_id).where(TrialModel.trial_id == claim.trial_id)
    return read(storage, lambda connection: connection.execute(found).scalar() is not None)


def counts(storage: RDBStorage, study_id: int) -> Counts:
    """The study's trials by state, in one query that reads no trial."""

    def work(connection: Connection) -> dict[TrialState, int]:
        rows = connection.execute(
            select(TrialModel.state, func.count()).where(TrialModel.study_id == study_id).group_by(TrialModel.state)
        )
        return {state: int(number) for state, number in rows}

    by_state = read(storage, work)
    return Counts(
        complete=by_state.get(TrialState.COMPLETE, 0),
        pruned=by_state.get(TrialState.PRUNED, 0),
        failed=by_state.get(TrialState.FAIL, 0),
        running=by_state.get(TrialState.RUNNING, 0),
        waiting=by_state.get(TrialState.WAITING, 0),
    )


def ended(storage: RDBStorage, study_id: int) -> bool:
    """Whether nothing is left to run: the budget is spent; or the study was stopped, or late, and no trial runs."""

    def work(connection: Connection) -> bool:
        limit = _budget(connection, study_id)
        if limit is None:
            return True
        finished, running = _spent(connection, study_id)
        over = _state(connection, study_id) == "stopped" or _late(connection, study_id, limit)
        return finished >= limit.total or (running == 0 and over)

    return read(storage, work)


def finished(connection: Connection, study_id: int) -> tuple[int, State]:
    """How many trials have ended for good, and the study's state: whether there is news since the last look."""
    return _spent(connection, study_id)[0], _state(connection, study_id)


def _late(connection: Connection, study_id: int, limit: Budget) -> bool:
    if limit.hours is None:
        return False
    # The one with the least number was the first to begin (imported ones have no attempts); its start in Optuna's table
    # is that of its last attempt.
    first = connection.execute(
        select(TrialUserAttributeModel.value_json)
        .join(TrialModel, TrialModel.trial_id == TrialUserAttributeModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialUserAttributeModel.key == "attempts")
        .order_by(TrialModel.number)
        .limit(1)
    ).scalar()
    if first is None:
        return False
    return datetime.now(UTC) - datetime.fromisoformat(json.loads(first)[0]["began"]) >= timedelta(hours=limit.hours)


# --- claim ------------------------------------------------------------------------------------------------


def claim(
    storage: RDBStorage, study: str, worker: Worker, grace_seconds: float, founded: str | None = None
) -> Claim | None:
    """The oldest waiting trial of `study`, or a new one while the budget lasts and the study is open; else None.

    First takes back the trials of workers that are gone: at once where the owner was a process of this machine,
    after `grace_seconds` without a beat elsewhere.

    Raises StudyGone where there is none, or where it is another one of that name than the one that was `founded` then.
    """

    def work(connection: Connection) -> Claim | None:
        study_id = _study_id(connection, study)
        if founded is not None and _study_attribute(connection, study_id, "founded") != founded:
            raise StudyGone(f"study {study!r} was deleted, and another one made: start the worker again")
        limit = _budget(connection, study_id)
        if limit is None:
            raise StorageError(f"study {study!r} was never made whole: run `trialyard create` for it again")
        _take_back(connection, study_id, study, grace_seconds)
        finished, running = _spent(connection, study_id)
        if (
            finished + running >= limit.total
            or _state(connection, study_id) != "open"
            or _late(connection, study_id, limit)
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
            _set_trial(connection, trial_id, state=TrialState.RUNNING, _datetime_start_utc=_utc())
        else:
            number = _size(connection, study_id)
            trial_id = _insert_trial(connection, study_id, number, TrialState.RUNNING, began=_utc())
        attempts = _attempts(connection, trial_id)
        attempts.append(asdict(worker) | {"began": _now().isoformat(timespec="seconds")})
        _set_attributes(connection, trial_id, {"attempts": attempts})
        _beat(connection, trial_id)
        return Claim(
            study=study,
            study_id=study_id,
            trial_id=trial_id,
            number=number,
            attempt=len(attempts),
            worker=worker,
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
    # Nobody could beat while the server was away: the silence of all is counted from its start.
    now, since = database_now(connection), server_started(connection)
    for trial_id, number, beaten in running:
        attempts = _attempts(connection, trial_id)
        if not attempts:
            continue  # somebody's own `study.ask()`: not ours to take
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
    """Ends the last attempt; the trial waits again, or fails for good after RETRIES that got it no further."""
    last = attempts[-1] | _ending(outcome) | {"why": why, "epoch": _last_epoch(connection, trial_id)}
    attempts = [*attempts[:-1], last]
    broken = 0
    for attempt, before in zip(reversed(attempts), [*reversed(attempts[:-1]), {}], strict=True):
        if attempt["outcome"] in ("crashed", "lost"):
            broken += 1
        if attempt.get("epoch", 0) > before.get("epoch", 0):
            break  # it got further than any before: what came earlier is forgiven
    told: dict[str, Any] = {"attempts": attempts}
    if broken > RETRIES:
        told["failure"] = {"kind": outcome, "message": f"{why}; tried {broken} times without getting further"}
        _set_trial(connection, trial_id, state=TrialState.FAIL, _datetime_complete_utc=_utc())
    else:
        _set_trial(connection, trial_id, state=TrialState.WAITING)
    _set_attributes(connection, trial_id, told)


# --- while it runs ----------------------------------------------------------------------------------------


def beat(storage: RDBStorage, claim: Claim) -> State:
    """Says that `claim` is being worked on, and returns what is wanted of the study.

    Raises ClaimLost if it is somebody else's by now.
    """

    def work(connection: Connection) -> State:
        _compare(connection, claim)
        _beat(connection, claim.trial_id)
        return _state(connection, claim.study_id)

    return write(storage, None, work)


def report(storage: RDBStorage, claim: Claim, step: int, value: float, files: Sequence[str] | None = None) -> State:
    """Writes the intermediate `value` of epoch `step` (from 1), and returns what is wanted of the study.

    Written again after a restart, a step's value replaces the earlier one. A value that is not finite is stored as NaN:
    Optuna can read it, and its pruners and TPE take it for the worst of all. `files` are the names of those that the
    trial now has, of `artifacts.LISTED`; None: the same as before. Raises ClaimLost.
    """
    return resume(storage, claim, {step: value}, None, files)


def resume(
    storage: RDBStorage,
    claim: Claim,
    values: dict[int, float],
    epoch: int | None,
    files: Sequence[str] | None = None,
) -> State:
    """Writes intermediate `values` by step, all at once, and that the attempt went on after `epoch`.

    They are those of a checkpoint, some of which the database may lack; `files` as for `report`. Raises ClaimLost.
    """

    def work(connection: Connection) -> State:
        attempts = _compare(connection, claim)
        stored = TrialIntermediateValueModel
        connection.execute(delete_rows(stored).where(stored.trial_id == claim.trial_id, stored.step.in_(values)))
        for step, value in values.items():
            # An infinite accuracy is a failed measurement too, and a pruner would take it for the best.
            known = value if math.isfinite(value) else math.nan
            number, kind = stored.intermediate_value_to_stored_repr(known)
            row = {"trial_id": claim.trial_id, "step": step}
            connection.execute(
                insert(stored).values(row | {"intermediate_value": number, "intermediate_value_type": kind})
            )
        if epoch is not None:
            attempts[-1]["resumed_after"] = epoch
            _set_attributes(connection, claim.trial_id, {"attempts": attempts})
        if files is not None:
            _list_files(connection, claim, files)
        return _state(connection, claim.study_id)

    return write(storage, claim.study, work)


def finish(
    storage: RDBStorage,
    claim: Claim,
    state: TrialState,
    value: float | None,
    attributes: dict[str, Any],
    files: Sequence[str] = (),
) -> None:
    """Ends the trial for good, with its `attributes` as user attributes. Raises ClaimLost.

    A `value` that is not finite is never stored. A COMPLETE trial without a finite value ends as FAIL with that reason,
    and a PRUNED one has no value, as with Optuna's own `tell`.

    `files` are the names of those that it leaves, of `artifacts.LISTED`: optuna-dashboard offers them.

    Optuna's samplers that Trialyard offers do nothing in `after_trial` for one objective without constraints, so
    the state is set directly, under the lock.
    """
    score = value if value is not None and math.isfinite(value) else None
    if state == TrialState.COMPLETE and score is None:
        failure = {"kind": "nan", "message": f"its score is {value}, which is not a finite number"}
        state, attributes = TrialState.FAIL, attributes | {"failure": failure}

    def work(connection: Connection) -> None:
        attempts = _compare(connection, claim, or_finished=True)
        if "outcome" in attempts[-1]:
            return  # done already: the commit came through, and its answer did not
        attempts[-1] |= _ending("finished")
        _set_attributes(connection, claim.trial_id, attributes | {"attempts": attempts})
        if score is not None:
            connection.execute(insert(TrialValueModel).values(_value_row(claim.trial_id, score)))
        _list_files(connection, claim, files)
        _set_trial(connection, claim.trial_id, state=state, _datetime_complete_utc=_utc())

    write(storage, claim.study, work)


def requeue(
    storage: RDBStorage,
    claim: Claim,
    outcome: Literal["interrupted", "crashed"],
    why: str,
    files: Sequence[str] = (),
) -> None:
    """Gives the trial back to the queue, with its `files` as for `report`. Raises ClaimLost.

    A trial that keeps crashing fails for good.
    """

    def work(connection: Connection) -> None:
        _put_back(connection, claim.trial_id, _compare(connection, claim), outcome, why)
        _list_files(connection, claim, files)

    write(storage, claim.study, work)


class Beating:
    """Beats for a claim in the background while the ``with`` block runs.

    A beat that fails (the database is away for a moment) is tried again at the next interval: the thread ends
    only with the block, or when the claim is lost.
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
        # A beat that waits for a database that is away must not keep the trial from its end.
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
class Entry:
    """A study as somebody sees it who looks for work."""

    name: str
    study_id: int
    founded: str | None
    budget: Budget
    state: State


def entries(storage: RDBStorage) -> list[Entry]:
    """All studies that were made whole, oldest first, in one query."""

    def work(connection: Connection) -> list[Entry]:
        stored = StudyUserAttributeModel
        rows = connection.execute(
            select(StudyModel.study_id, StudyModel.study_name, stored.key, stored.value_json)
            .join(stored, stored.study_id == StudyModel.study_id)
            .where(stored.key.in_(("budget", "founded", "state")))
            .order_by(StudyModel.study_id)
        )
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for study_id, name, key, value_json in rows:
            found.setdefault((study_id, name), {})[key] = json.loads(value_json)
        return [
            Entry(
                name=name,
                study_id=study_id,
                founded=told.get("founded"),
                budget=Budget(**told["budget"]),
                state=told.get("state") or "open",
            )
            for (study_id, name), told in found.items()
            if "budget" in told
        ]

    return read(storage, work)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A RUNNING trial and who runs it."""

    number: int
    host: str
    pid: int
    slot: str
    attempt: int
    epoch: int  # the last whole one that is told; 0 before the first
    silent_seconds: float  # since its last beat


def holdings(storage: RDBStorage, study_id: int) -> list[Holding]:
    """Who is running what, by trial number."""

    def work(connection: Connection) -> list[Holding]:
        now = database_now(connection)
        last = (
            select(func.max(TrialIntermediateValueModel.step))
            .where(TrialIntermediateValueModel.trial_id == TrialModel.trial_id)
            .scalar_subquery()
        )
        attempts = and_(
            TrialUserAttributeModel.trial_id == TrialModel.trial_id, TrialUserAttributeModel.key == "attempts"
        )
        rows = connection.execute(
            select(TrialModel.number, TrialHeartbeatModel.heartbeat, TrialUserAttributeModel.value_json, last)
            .join(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
            .join(TrialUserAttributeModel, attempts)
            .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING)
            .order_by(TrialModel.number)
        )
        return [
            _holding(number, json.loads(attempts_json), epoch or 0, (now - beaten).total_seconds())
            for number, beaten, attempts_json, epoch in rows
        ]

    return read(storage, work)


def _holding(number: int, attempts: Attempts, epoch: int, silent: float) -> Holding:
    owner = _owner(attempts)
    return Holding(
        number=number,
        host=owner.host,
        pid=owner.pid,
        slot=owner.slot,
        attempt=len(attempts),
        epoch=epoch,
        silent_seconds=max(0.0, silent),
    )


def check(storage: RDBStorage) -> list[str]:
    """What of the promises at the top of this file does not hold, a sentence each; empty if all do."""
    return read(storage, _problems)


def _problems(connection: Connection) -> list[str]:
    problems = []
    for study_id, name in connection.execute(select(StudyModel.study_id, StudyModel.study_name)).all():
        limit, (finished, running) = _budget(connection, study_id), _spent(connection, study_id)
        if limit is None:
            continue  # not one of ours, or its creation was interrupted and `create` will end it
        if finished + running > limit.total:
            problems.append(f"study {name}: {finished + running} trials, over its {limit.total}")
        imported = len(_imported(connection, study_id))
        if imported != limit.imported:
            problems.append(f"study {name}: {imported} imported trials, and its budget says {limit.imported}")
        twice = connection.execute(
            select(TrialModel.number)
            .where(TrialModel.study_id == study_id)
            .group_by(TrialModel.number)
            .having(func.count() > 1)
        ).scalars()
        problems += [f"study {name}: two trials have the number {number}" for number in twice]
        unbeaten = connection.execute(
            select(TrialModel.number)
            .outerjoin(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
            .where(
                TrialModel.study_id == study_id,
                TrialModel.state == TrialState.RUNNING,
                TrialHeartbeatModel.trial_id.is_(None),
            )
        ).scalars()
        problems += [f"study {name}: trial {number} runs without a heartbeat" for number in unbeaten]
        problems += legacy.problems(connection, study_id, name)
    return problems


# --- statements -------------------------------------------------------------------------------------------


def _compare(connection: Connection, claim: Claim, or_finished: bool = False) -> Attempts:
    """The trial's attempts, its row locked. Raises ClaimLost unless the last of them is `claim`'s and still runs."""
    state = connection.execute(
        select(TrialModel.state).where(TrialModel.trial_id == claim.trial_id).with_for_update()
    ).scalar()
    attempts = _attempts(connection, claim.trial_id) if state is not None else []
    mine = len(attempts) == claim.attempt and _owner(attempts) == claim.worker
    if mine and (state == TrialState.RUNNING or (or_finished and attempts[-1].get("outcome") == "finished")):
        return attempts
    raise ClaimLost(
        f"study {claim.study}: trial {claim.number} is no longer held by {claim.worker.slot} of process "
        f"{claim.worker.pid} on {claim.worker.host} (attempt {claim.attempt}): its result is dropped"
    )


def _study_id(connection: Connection, study: str) -> int:
    found = connection.execute(select(StudyModel.study_id).where(StudyModel.study_name == study)).scalar()
    if found is None:
        raise StudyGone(f"study {study!r} is gone from the database: `trialyard create` makes it anew")
    return int(found)


def _study_attribute(connection: Connection, study_id: int, key: str) -> Any:
    found = connection.execute(
        select(StudyUserAttributeModel.value_json).where(
            StudyUserAttributeModel.study_id == study_id, StudyUserAttributeModel.key == key
        )
    ).scalar()
    return None if found is None else json.loads(found)


def _set_study_attribute(connection: Connection, study_id: int, key: str, attribute: Any) -> None:
    stored = StudyUserAttributeModel
    connection.execute(delete_rows(stored).where(stored.study_id == study_id, stored.key == key))
    connection.execute(insert(stored).values(study_id=study_id, key=key, value_json=json.dumps(attribute)))


def _budget(connection: Connection, study_id: int) -> Budget | None:
    found = _study_attribute(connection, study_id, "budget")
    return None if found is None else Budget(**found)


def _state(connection: Connection, study_id: int) -> State:
    found: State | None = _study_attribute(connection, study_id, "state")
    return found or "open"


def _size(connection: Connection, study_id: int) -> int:
    """How many trials the study has, which is the next one's number: they are numbered without a gap."""
    last = connection.execute(select(func.max(TrialModel.number)).where(TrialModel.study_id == study_id)).scalar()
    return 0 if last is None else int(last) + 1


def _spent(connection: Connection, study_id: int) -> tuple[int, int]:
    """(finished, running). Counts only what is not finished, which is few, however many there are."""
    mine = TrialModel.study_id == study_id
    waiting, running = (
        select(func.count()).where(mine, TrialModel.state == state).scalar_subquery()
        for state in (TrialState.WAITING, TrialState.RUNNING)
    )
    last = select(func.max(TrialModel.number)).where(mine).scalar_subquery()
    # One statement sees one moment, also where no lock is held: a trial between two states is counted once.
    found = connection.execute(select(last, waiting, running)).one()
    size = 0 if found[0] is None else int(found[0]) + 1
    return size - int(found[1]) - int(found[2]), int(found[2])


def _insert_trial(
    connection: Connection, study_id: int, number: int, state: TrialState, began: datetime | None = None
) -> int:
    row = {"study_id": study_id, "number": number, "state": state, "datetime_start": began}
    inserted = connection.execute(insert(TrialModel.__table__).values(row))
    (trial_id,) = inserted.inserted_primary_key or (None,)
    assert trial_id is not None
    return int(trial_id)


def _insert_imported(connection: Connection, study_id: int, trials: Mapping[str, Imported]) -> None:
    """Inserts trials by their digest. Table by table, not trial by trial: the study is locked meanwhile."""
    first = _size(connection, study_id)
    # Nobody knows when they ran: they are of the moment in which they came.
    row = {"study_id": study_id, "state": TrialState.COMPLETE, "datetime_start": _utc(), "datetime_complete": _utc()}
    connection.execute(insert(TrialModel.__table__), [row | {"number": first + index} for index in range(len(trials))])
    found = select(TrialModel.trial_id).where(TrialModel.study_id == study_id, TrialModel.number >= first)
    ids = connection.execute(found.order_by(TrialModel.number)).scalars().all()
    params: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    attributes: list[dict[str, Any]] = []
    for trial_id, (key, trial) in zip(ids, trials.items(), strict=True):
        for name, (distribution, value) in trial.params.items():
            internal = {"param_value": distribution.to_internal_repr(value)}
            told = {"param_name": name, "distribution_json": distribution_to_json(distribution)}
            params.append({"trial_id": trial_id} | internal | told)
        values.append(_value_row(trial_id, trial.value))
        marked = {**trial.attributes, "imported": True, IMPORT_KEY: key}
        attributes += [{"trial_id": trial_id, "key": k, "value_json": json.dumps(one)} for k, one in marked.items()]
    if params:
        connection.execute(insert(TrialParamModel), params)
    connection.execute(insert(TrialValueModel), values)
    connection.execute(insert(TrialUserAttributeModel), attributes)


def _imported(connection: Connection, study_id: int) -> set[str]:
    """The digests of the study's imported trials."""
    found = connection.execute(
        select(TrialUserAttributeModel.value_json)
        .join(TrialModel, TrialModel.trial_id == TrialUserAttributeModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialUserAttributeModel.key == IMPORT_KEY)
    ).scalars()
    return {json.loads(one) for one in found}


def _digest(trial: Imported) -> str:
    params = {name: value for name, (_, value) in trial.params.items()}
    told = json.dumps([trial.value, params, dict(trial.attributes)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _value_row(trial_id: int, value: float) -> dict[str, Any]:
    number, kind = TrialValueModel.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": 0, "value": number, "value_type": kind}


def _set_trial(connection: Connection, trial_id: int, **columns: Any) -> None:
    connection.execute(
        update(TrialModel)
        .where(TrialModel.trial_id == trial_id)
        .values({getattr(TrialModel, name): value for name, value in columns.items()})
    )


def _attempts(connection: Connection, trial_id: int) -> Attempts:
    found = connection.execute(
        select(TrialUserAttributeModel.value_json).where(
            TrialUserAttributeModel.trial_id == trial_id, TrialUserAttributeModel.key == "attempts"
        )
    ).scalar()
    return [] if found is None else list(json.loads(found))


def _last_epoch(connection: Connection, trial_id: int) -> int:
    stored = TrialIntermediateValueModel
    return int(connection.execute(select(func.max(stored.step)).where(stored.trial_id == trial_id)).scalar() or 0)


def _set_attributes(connection: Connection, trial_id: int, attributes: dict[str, Any]) -> None:
    stored = TrialUserAttributeModel
    connection.execute(delete_rows(stored).where(stored.trial_id == trial_id, stored.key.in_(attributes)))
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(one)} for key, one in attributes.items()]
    connection.execute(insert(stored), rows)


def _list_files(connection: Connection, claim: Claim, names: Sequence[str]) -> None:
    """Has optuna-dashboard offer just the files `names` of the trial, of those that its worker writes."""
    stored = TrialSystemAttributeModel
    listed = {name: artifacts.listing(claim.study, claim.number, name) for name in artifacts.LISTED}
    keys = [key for key, _ in listed.values()]
    connection.execute(delete_rows(stored).where(stored.trial_id == claim.trial_id, stored.key.in_(keys)))
    there = [listed[name] for name in names]
    rows = [{"trial_id": claim.trial_id, "key": key, "value_json": json.dumps(told)} for key, told in there]
    if rows:
        connection.execute(insert(stored), rows)


def _beat(connection: Connection, trial_id: int) -> None:
    stored, now = TrialHeartbeatModel, database_now(connection)
    if connection.execute(update(stored).where(stored.trial_id == trial_id).values(heartbeat=now)).rowcount == 0:
        connection.execute(insert(stored).values(trial_id=trial_id, heartbeat=now))


def _owner(attempts: Attempts) -> Worker:
    last = attempts[-1]
    return Worker(machine=last["machine"], host=last["host"], pid=last["pid"], born=last["born"], slot=last["slot"])


def _ending(outcome: Outcome) -> dict[str, str]:
    return {"ended": _now().isoformat(timespec="seconds"), "outcome": outcome}


def _now() -> datetime:
    return datetime.now(UTC)


def _utc() -> datetime:
    # Optuna keeps naive UTC.
    return _now().replace(tzinfo=None)
