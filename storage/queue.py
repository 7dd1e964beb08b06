"""Adds trials to the queue of a study that exists."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, insert, select

from storage import attributes, ledger
from storage.ledger import Study
from storage.tables import (
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    insert_trial,
    next_number,
    set_trial_attributes,
)
from storage.transactions import write

RETRY_OF = "retry_of"  # user attribute of a trial that repeats a failed one: that one's number


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A trial that is to be tried."""

    point: Mapping[str, Any]  # hyperparameters; the sampler gives those that are missing
    retry_of: int | None = None  # the failed trial that it repeats; each is repeated once


def enqueue(storage: RDBStorage, study: Study, trials: Sequence[Queued]) -> list[int]:
    """Adds waiting trials to `study`, all or nothing; returns their numbers.

    A failed trial that another one repeats already is left out. The budget grows where it has no room for them. Raises
    StudyGone.
    """

    def work(connection: Connection) -> list[int]:
        existing = ledger.current(connection, study)
        repeated = _repeated(connection, study.id)
        first = next_number(connection, study.id)
        wanted = [trial for trial in trials if trial.retry_of is None or trial.retry_of not in repeated]
        for number, trial in enumerate(wanted, start=first):
            trial_id = insert_trial(connection, study.id, number, TrialState.WAITING)
            row = {"trial_id": trial_id, "key": "fixed_params", "value_json": json.dumps(dict(trial.point))}
            connection.execute(insert(TrialSystemAttributeModel).values(row))
            if trial.retry_of is not None:
                set_trial_attributes(connection, trial_id, {RETRY_OF: trial.retry_of})
        taken = existing.finished + existing.running + existing.waiting + len(wanted)
        needed = replace(existing.budget, trials=taken - existing.budget.imported)
        if wanted and needed.trials > existing.budget.trials:
            ledger.set_larger_budget(connection, study.id, needed)
        return list(range(first, first + len(wanted)))

    return write(storage, study.name, work)


def _repeated(connection: Connection, study_id: int) -> set[int]:
    """The numbers of the failed trials that others repeat."""
    stored = connection.execute(
        select(TrialUserAttributeModel.value_json)
        .join(TrialModel, TrialModel.trial_id == TrialUserAttributeModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialUserAttributeModel.key == RETRY_OF)
    ).scalars()
    return {number for number in map(attributes.decoded, stored) if isinstance(number, int)}
