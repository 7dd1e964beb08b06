"""The trials of a study that wait: adds some, and says which comes next."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, select

from storage import attempt_table, attributes, ledger
from storage.ledger import Study
from storage.tables import (
    QUEUED_BY,
    TrialModel,
    TrialSystemAttributeModel,
    insert_waiting,
    next_number,
    numbers_queued_by,
    set_trial_attributes,
)
from storage.transactions import read, write

RETRY_OF = "retry_of"  # user attribute of a trial that repeats a failed one: that one's number


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A trial that is to be tried."""

    point: Mapping[str, Any]  # hyperparameters; the sampler gives those that are missing
    retry_of: int | None = None  # the failed trial that it repeats; each is repeated once


def enqueue(storage: RDBStorage, study: Study, trials: Sequence[Queued]) -> list[int]:
    """Adds waiting trials to `study`, all or nothing; returns their numbers.

    A failed trial that another one repeats already is left out. The budget grows by those that repeat a failed one, and
    where it has no room for the others. Raises StudyGone.
    """
    call = uuid.uuid4().hex

    def work(connection: Connection) -> list[int]:
        existing = ledger.current(connection, study)
        done = numbers_queued_by(connection, study.id, call)
        if done:
            return done  # the commit succeeded, but its answer was lost
        repeated = attributes.of_all_trials(connection, study.id, RETRY_OF)
        first = next_number(connection, study.id)
        wanted = [trial for trial in trials if trial.retry_of is None or trial.retry_of not in repeated]
        for number, trial in enumerate(wanted, start=first):
            trial_id = insert_waiting(connection, study.id, number, trial.point, call)
            if trial.retry_of is not None:
                set_trial_attributes(connection, trial_id, {RETRY_OF: trial.retry_of})
        begun = existing.finished + existing.running
        # Of a grid that is larger than the budget, the rest waits and never starts: it needs no room.
        waiting = min(existing.waiting, max(0, existing.budget.total - begun))
        taken = begun + waiting + len(wanted)
        # A repeated trial has spent its part of the budget without a result.
        repeats = sum(trial.retry_of is not None for trial in wanted)
        trials_needed = max(taken - existing.budget.imported, existing.budget.trials + repeats)
        needed = replace(existing.budget, trials=trials_needed)
        if wanted and needed.trials > existing.budget.trials:
            ledger.set_larger_budget(connection, study.id, needed)
        return list(range(first, first + len(wanted)))

    return write(storage, study.name, work)


def next_waiting(connection: Connection, study: Study) -> tuple[int, int] | None:
    """The id and the number of the waiting trial that comes next: the first one.

    Where more wait than the budget has room for, as of a grid, the first that somebody has added: the rest would never
    start.
    """
    model, stored = TrialModel, TrialSystemAttributeModel
    waiting = (
        select(model.trial_id, model.number)
        .where(model.study_id == study.id, model.state == TrialState.WAITING)
        .order_by(model.number)
        .limit(1)
    )
    added = waiting.join(stored, stored.trial_id == model.trial_id).where(stored.key == QUEUED_BY)
    is_overfull = study.finished + study.running + study.waiting > study.budget.total
    found = connection.execute(added).first() if is_overfull else None
    found = found or connection.execute(waiting).first()
    return None if found is None else (found[0], found[1])


def epochs_of_next(storage: RDBStorage, study: Study) -> int:
    """How many epochs the checkpoint has of the trial that is claimed next; 0 if it is a new one, or has none.

    Raises StudyGone.
    """

    def work(connection: Connection) -> int:
        waiting = next_waiting(connection, ledger.current(connection, study))
        return 0 if waiting is None else attempt_table.epochs_of(connection, waiting[0])

    return read(storage, work)
