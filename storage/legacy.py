"""What older versions of Trialyard left in the database: `storage check` finds it, and `storage upgrade` repairs it."""

import json

from optuna.storages._rdb.models import (
    StudyModel,
    StudyUserAttributeModel,
    TrialModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import TrialState
from sqlalchemy import Connection, delete, insert, select, update

from storage.standings import is_finite

FAILURE = {"kind": "nan", "message": "its score was not a finite number, and an older version stored it as a result"}


def problems(connection: Connection, study_id: int, name: str) -> list[str]:
    """What `upgrade` would repair in a study of ours, a sentence each."""
    unscored = _unscored(connection, study_id)
    if not unscored:
        return []
    numbers = _listed(list(unscored.values()))
    return [
        f"study {name}: {numbers} complete without a finite score: `trialyard storage upgrade` marks them as failed"
    ]


def upgrade(connection: Connection) -> list[str]:
    """Repairs everything, in the caller's transaction; returns what was done, a sentence each."""
    done = []
    for study_id, name in _ours(connection):
        unscored = _unscored(connection, study_id)
        if unscored:
            _fail(connection, list(unscored))
            done.append(f"study {name}: {_listed(list(unscored.values()))} failed now, for want of a finite score")
    return done


def _ours(connection: Connection) -> list[tuple[int, str]]:
    """The id and name of every study that Trialyard made."""
    rows = connection.execute(
        select(StudyModel.study_id, StudyModel.study_name)
        .join(StudyUserAttributeModel, StudyUserAttributeModel.study_id == StudyModel.study_id)
        .where(StudyUserAttributeModel.key == "budget")
        .order_by(StudyModel.study_id)
    )
    return [(study_id, name) for study_id, name in rows]


def _unscored(connection: Connection, study_id: int) -> dict[int, int]:
    """The numbers of the complete trials whose value is missing, NaN or infinite, by their ids."""
    finite = select(TrialValueModel.trial_id).where(TrialValueModel.trial_id == TrialModel.trial_id, is_finite())
    rows = connection.execute(
        select(TrialModel.trial_id, TrialModel.number)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE, ~finite.exists())
        .order_by(TrialModel.number)
    )
    return {int(trial_id): int(number) for trial_id, number in rows}


def _fail(connection: Connection, trial_ids: list[int]) -> None:
    stored = TrialUserAttributeModel
    for trial_id in trial_ids:  # one at a time: a statement's length has a limit, and there are few
        connection.execute(update(TrialModel).where(TrialModel.trial_id == trial_id).values(state=TrialState.FAIL))
        connection.execute(delete(TrialValueModel).where(TrialValueModel.trial_id == trial_id))
        connection.execute(delete(stored).where(stored.trial_id == trial_id, stored.key == "failure"))
        connection.execute(insert(stored).values(trial_id=trial_id, key="failure", value_json=json.dumps(FAILURE)))


def _listed(numbers: list[int]) -> str:
    """``trial 3 is`` or ``trials 3, 5 are``; of many, the first ten."""
    if len(numbers) == 1:
        return f"trial {numbers[0]} is"
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"trials {', '.join(map(str, numbers[:10]))}{more} are"
