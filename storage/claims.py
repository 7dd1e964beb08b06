"""The only place where a trial changes hands: claim, beat, report, finish, requeue.

A trial's way is WAITING -> RUNNING -> (COMPLETE | PRUNED | FAIL), and RUNNING -> WAITING when whoever ran it was
interrupted, crashed or vanished: the same row runs again, with the same hyperparameters. Everything here that
changes a state does so under the study's one lock (`database.exclusive`), so that

- finished + running never exceeds the budget, and a study ends with exactly its budget;
- a crash at any line leaves either a WAITING trial or a RUNNING one with an owner and a heartbeat;
- no two workers hold one trial: the owner is the last of the trial's ``attempts``, and is compared before
  anything is written in its name.
"""

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import optuna
import psutil
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    StudyUserAttributeModel,
    TrialHeartbeatModel,
    TrialModel,
    TrialUserAttributeModel,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from storage.database import exclusive
from storage.errors import ClaimLost, StorageError

log = logging.getLogger(__name__)

RETRIES = 3  # how often a trial that took its trainer or worker down is tried again

Outcome = Literal["finished", "interrupted", "crashed", "lost"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One slot of one process, as other processes can recognise it."""

    machine: str  # this boot of this machine, and the process namespace within it
    host: str  # for people
    pid: int
    born: float  # the process's start, seconds since 1970: process ids are used again
    slot: str  # for people, and to tell the slots of one process apart

    def gone(self) -> bool:
        """Whether this was a process of this very machine and has ended; False where that cannot be told."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            # A killed process stays in the table as a zombie until its parent looks.
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.born) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


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

    trials: int  # complete, pruned and failed ones count
    hours: float | None  # since the first trial began; no trial starts later


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


def worker(slot: str) -> Worker:
    """This process's `slot`."""
    return Worker(
        machine=_machine(),
        host=socket.gethostname(),
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        slot=slot,
    )


@cache
def _machine() -> str:
    # Two containers of one machine may share its name but not its process ids; a reboot ends every process.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


# --- the budget -------------------------------------------------------------------------------------------


def set_budget(storage: RDBStorage, study: str, budget: Budget) -> None:
    """Gives `study` its budget, or a larger one. It is the last step of a study's creation.

    Raises StorageError if more trials than `budget` have been spent already.
    """
    with exclusive(storage, study):
        study_id = storage.get_study_id_from_name(study)
        spent = counts(storage, study_id)
        if budget.trials < spent.finished + spent.running:
            raise StorageError(
                f"budget.trials = {budget.trials} is fewer than the {spent.finished + spent.running} trials "
                f"that study {study!r} has already: ask for that many or more"
            )
        storage.set_study_user_attr(study_id, "budget", asdict(budget))


def budget(storage: RDBStorage, study_id: int) -> Budget | None:
    """The study's budget; None while the study is being created, and for a study that is not ours."""
    with storage.engine.connect() as connection:
        found = connection.execute(
            select(StudyUserAttributeModel.value_json).where(
                StudyUserAttributeModel.study_id == study_id, StudyUserAttributeModel.key == "budget"
            )
        ).scalar()
    return None if found is None else Budget(**json.loads(found))


def counts(storage: RDBStorage, study_id: int) -> Counts:
    """The study's trials by state, in one query that reads no trial."""
    with storage.engine.connect() as connection:
        rows = connection.execute(
            select(TrialModel.state, func.count()).where(TrialModel.study_id == study_id).group_by(TrialModel.state)
        )
        by_state = {state: int(number) for state, number in rows}
    return Counts(
        complete=by_state.get(TrialState.COMPLETE, 0),
        pruned=by_state.get(TrialState.PRUNED, 0),
        failed=by_state.get(TrialState.FAIL, 0),
        running=by_state.get(TrialState.RUNNING, 0),
        waiting=by_state.get(TrialState.WAITING, 0),
    )


def ended(storage: RDBStorage, study_id: int) -> bool:
    """Whether nothing is left to run: the budget is spent, or its hours are over and no trial runs."""
    limit, spent = budget(storage, study_id), counts(storage, study_id)
    if limit is None:
        return True
    return spent.finished >= limit.trials or (spent.running == 0 and _late(storage, study_id, limit))


def _late(storage: RDBStorage, study_id: int, limit: Budget) -> bool:
    if limit.hours is None:
        return False
    with storage.engine.connect() as connection:
        # Optuna keeps naive UTC.
        began = connection.execute(
            select(func.min(TrialModel._datetime_start_utc)).where(TrialModel.study_id == study_id)
        ).scalar()
    return began is not None and _now() - began.replace(tzinfo=UTC) >= timedelta(hours=limit.hours)


# --- claim ------------------------------------------------------------------------------------------------


def claim(storage: RDBStorage, study: str, worker: Worker, grace_seconds: float) -> Claim | None:
    """The oldest waiting trial of `study`, or a new one while the budget lasts; else None.

    First takes back the trials of workers that are gone: at once where the owner was a process of this machine,
    after `grace_seconds` without a beat elsewhere.
    """
    with exclusive(storage, study):
        study_id = storage.get_study_id_from_name(study)
        limit = budget(storage, study_id)
        if limit is None:
            raise StorageError(f"study {study!r} was never made whole: run `trialyard create` for it again")
        _take_back(storage, study_id, study, grace_seconds)
        spent = counts(storage, study_id)
        if spent.finished + spent.running >= limit.trials or _late(storage, study_id, limit):
            return None
        attempt = asdict(worker) | {"began": _now().isoformat(timespec="seconds")}
        trial_id = _oldest_waiting(storage, study_id)
        if trial_id is None:
            # Created WAITING: it must not be RUNNING before it has an owner and a heartbeat.
            attempts = [attempt]
            trial_id = storage.create_new_trial(study_id, _waiting_trial(attempts))
        else:
            attempts = _attempts(storage, trial_id)
            if attempts and "outcome" not in attempts[-1]:
                attempts.pop()  # written, but its worker died before the trial was RUNNING
            attempts.append(attempt)
            storage.set_trial_user_attr(trial_id, "attempts", attempts)
        storage.record_heartbeat(trial_id)
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return Claim(
            study=study,
            study_id=study_id,
            trial_id=trial_id,
            number=_number(storage, trial_id),
            attempt=len(attempts),
            worker=worker,
        )


def _waiting_trial(attempts: list[dict[str, Any]]) -> FrozenTrial:
    return optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"attempts": attempts})


def _take_back(storage: RDBStorage, study_id: int, study: str, grace_seconds: float) -> None:
    """Puts the RUNNING trials of workers that are gone back into the queue. Under the lock."""
    with storage.engine.connect() as connection:
        now = _database_now(connection)
        running = connection.execute(
            select(TrialModel.trial_id, TrialModel.number, TrialHeartbeatModel.heartbeat)
            .outerjoin(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
            .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING)
            .order_by(TrialModel.trial_id)
        ).all()
    for trial_id, number, beaten in running:
        attempts = _attempts(storage, trial_id)
        if not attempts:
            continue  # somebody's own `study.ask()`: not ours to take
        owner = _owner(attempts)
        silent = (now - beaten).total_seconds() if beaten is not None else float("inf")
        if owner.gone():
            why = f"process {owner.pid} on {owner.host} ended"
        elif silent > grace_seconds:
            why = f"no sign of process {owner.pid} on {owner.host} for {silent:.0f} s"
        else:
            continue
        log.warning("study %s: trial %d goes back to the queue: %s", study, number, why)
        _put_back(storage, trial_id, attempts, "lost", why)


def _put_back(storage: RDBStorage, trial_id: int, attempts: list[dict[str, Any]], outcome: Outcome, why: str) -> None:
    """Ends the last attempt; the trial waits again, or fails for good after RETRIES. Under the lock."""
    attempts = [*attempts[:-1], attempts[-1] | _ending(outcome) | {"why": why}]
    storage.set_trial_user_attr(trial_id, "attempts", attempts)
    broken = sum(attempt["outcome"] in ("crashed", "lost") for attempt in attempts)
    if broken > RETRIES:
        failure = {"kind": outcome, "message": f"{why}; tried {broken} times in all"}
        storage.set_trial_user_attr(trial_id, "failure", failure)
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    else:
        storage.set_trial_state_values(trial_id, TrialState.WAITING)


# --- while it runs ----------------------------------------------------------------------------------------


def beat(storage: RDBStorage, claim: Claim) -> None:
    """Says that `claim` is being worked on. Raises ClaimLost if it is somebody else's by now."""
    _compare(storage, claim)
    storage.record_heartbeat(claim.trial_id)


def report(storage: RDBStorage, claim: Claim, step: int, value: float) -> None:
    """Writes the intermediate `value` of epoch `step` (from 1). Raises ClaimLost.

    Written again after a restart, a step's value replaces the earlier one.
    """
    with owned(storage, claim):
        storage.set_trial_intermediate_value(claim.trial_id, step, value)


def finish(
    storage: RDBStorage,
    claim: Claim,
    state: TrialState,
    value: float | None,
    attributes: dict[str, Any],
) -> None:
    """Ends the trial for good, with its `attributes` as user attributes. Raises ClaimLost.

    Optuna's samplers that Trialyard offers do nothing in `after_trial` for one objective without constraints, so
    the state is set directly, under the lock.
    """
    with owned(storage, claim) as attempts:
        attempts[-1] |= _ending("finished")
        # Attributes first: a finished trial takes none.
        _set_attributes(storage, claim.trial_id, attributes | {"attempts": attempts})
        storage.set_trial_state_values(claim.trial_id, state, None if value is None else [value])


def requeue(storage: RDBStorage, claim: Claim, outcome: Literal["interrupted", "crashed"], why: str) -> None:
    """Gives the trial back to the queue. A trial that crashed too often fails for good. Raises ClaimLost."""
    with owned(storage, claim) as attempts:
        _put_back(storage, claim.trial_id, attempts, outcome, why)


@contextmanager
def owned(storage: RDBStorage, claim: Claim) -> Iterator[list[dict[str, Any]]]:
    """Holds the study's lock while `claim` is known to be its worker's; yields the trial's attempts.

    Raises ClaimLost where it is not: the worker slept too long, and what it has must be dropped.
    """
    with exclusive(storage, claim.study):
        yield _compare(storage, claim)


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

    def __enter__(self) -> "Beating":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                beat(self._storage, self._claim)
            except ClaimLost as lost:
                log.warning("%s", lost)
                self.lost = True
                return
            except (OptunaError, SQLAlchemyError, StorageError, OSError) as error:
                log.warning("a beat for trial %d failed, to be tried again: %s", self._claim.number, error)


# --- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A RUNNING trial and who runs it."""

    number: int
    host: str
    pid: int
    slot: str
    attempt: int
    silent_seconds: float  # since its last beat


def holdings(storage: RDBStorage, study_id: int) -> list[Holding]:
    """Who is running what, by trial number."""
    with storage.engine.connect() as connection:
        now = _database_now(connection)
        rows = connection.execute(
            select(TrialModel.number, TrialHeartbeatModel.heartbeat, TrialUserAttributeModel.value_json)
            .join(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
            .join(TrialUserAttributeModel, TrialUserAttributeModel.trial_id == TrialModel.trial_id)
            .where(
                TrialModel.study_id == study_id,
                TrialModel.state == TrialState.RUNNING,
                TrialUserAttributeModel.key == "attempts",
            )
            .order_by(TrialModel.number)
        ).all()
    found = []
    for number, beaten, value_json in rows:
        attempts = json.loads(value_json)
        owner = _owner(attempts)
        found.append(
            Holding(
                number=number,
                host=owner.host,
                pid=owner.pid,
                slot=owner.slot,
                attempt=len(attempts),
                silent_seconds=max(0.0, (now - beaten).total_seconds()),
            )
        )
    return found


def check(storage: RDBStorage) -> list[str]:
    """What of the promises at the top of this file does not hold, a sentence each; empty if all do."""
    problems = []
    with storage.engine.connect() as connection:
        studies = connection.execute(select(StudyModel.study_id, StudyModel.study_name)).all()
    for study_id, name in studies:
        limit, spent = budget(storage, study_id), counts(storage, study_id)
        if limit is None:
            continue  # not one of ours, or its creation was interrupted and `create` will end it
        if spent.finished + spent.running > limit.trials:
            problems.append(f"study {name}: {spent.finished + spent.running} trials, over its {limit.trials}")
        with storage.engine.connect() as connection:
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
    return problems


# --- small readers ----------------------------------------------------------------------------------------


def _compare(storage: RDBStorage, claim: Claim) -> list[dict[str, Any]]:
    attempts = _attempts(storage, claim.trial_id)
    with storage.engine.connect() as connection:
        state = connection.execute(select(TrialModel.state).where(TrialModel.trial_id == claim.trial_id)).scalar()
    if state != TrialState.RUNNING or len(attempts) != claim.attempt or _owner(attempts) != claim.worker:
        raise ClaimLost(
            f"study {claim.study}: trial {claim.number} is no longer held by {claim.worker.slot} of process "
            f"{claim.worker.pid} on {claim.worker.host} (attempt {claim.attempt}): its result is dropped"
        )
    return attempts


def _attempts(storage: RDBStorage, trial_id: int) -> list[dict[str, Any]]:
    with storage.engine.connect() as connection:
        found = connection.execute(
            select(TrialUserAttributeModel.value_json).where(
                TrialUserAttributeModel.trial_id == trial_id, TrialUserAttributeModel.key == "attempts"
            )
        ).scalar()
    return [] if found is None else list(json.loads(found))


def _set_attributes(storage: RDBStorage, trial_id: int, attributes: dict[str, Any]) -> None:
    """Writes user attributes in one transaction; Optuna's own method takes one for each. Under the lock."""
    rows = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(attribute)} for key, attribute in attributes.items()
    ]
    with storage.engine.begin() as connection:
        connection.execute(
            delete(TrialUserAttributeModel).where(
                TrialUserAttributeModel.trial_id == trial_id, TrialUserAttributeModel.key.in_(attributes)
            )
        )
        connection.execute(insert(TrialUserAttributeModel), rows)


def _owner(attempts: list[dict[str, Any]]) -> Worker:
    last = attempts[-1]
    return Worker(machine=last["machine"], host=last["host"], pid=last["pid"], born=last["born"], slot=last["slot"])


def _oldest_waiting(storage: RDBStorage, study_id: int) -> int | None:
    with storage.engine.connect() as connection:
        return connection.execute(
            select(TrialModel.trial_id)
            .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.WAITING)
            .order_by(TrialModel.number)
            .limit(1)
        ).scalar()


def _number(storage: RDBStorage, trial_id: int) -> int:
    with storage.engine.connect() as connection:
        return int(connection.execute(select(TrialModel.number).where(TrialModel.trial_id == trial_id)).scalar_one())


def _ending(outcome: Outcome) -> dict[str, str]:
    return {"ended": _now().isoformat(timespec="seconds"), "outcome": outcome}


def _now() -> datetime:
    return datetime.now(UTC)


def _database_now(connection: Connection) -> datetime:
    # The database's clock wrote the beats, so it is the one to compare them with.
    return connection.execute(select(func.current_timestamp())).scalar_one().replace(tzinfo=None)
