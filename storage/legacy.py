"""Repairs for databases of older versions: `storage check` reports what `storage upgrade` would repair."""

import json
from typing import Any

from optuna.trial import TrialState
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.orm import aliased

from storage.attributes import PREFIX, SHAPES, decoded
from storage.errors import trials_text
from storage.ranking import is_finite
from storage.tables import (
    StudyModel,
    StudyUserAttributeModel,
    TrialModel,
    TrialUserAttributeModel,
    TrialValueModel,
)

# `incarnation` tells a study from a deleted one of the same name. It was the time of creation before.
OLD_NAMES = {"incarnation": "founded"}
NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}

FAILURE = {"kind": "nan", "message": "its score was not a finite number, and an older version stored it as a result"}


def problems(connection: Connection, study_id: int, name: str) -> list[str]:
    """What `upgrade` would repair in a study of ours, one sentence each."""
    unscored = _unscored(connection, study_id)
    if not unscored:
        return []
    trials_are = _trials_are(list(unscored.values()))
    return [
        f"study {name}: {trials_are} complete without a finite score: `trialyard storage upgrade` marks them as failed"
    ]


def upgrade(connection: Connection) -> list[str]:
    """Repairs everything, in the caller's transaction; returns what was done, one sentence each."""
    done = []
    for study_id, name in outdated(connection).items():
        _rename(connection, study_id)
        done.append(f"study {name}: its attributes now have the prefix {PREFIX}")
    for study_id, name in _ours(connection):
        unscored = _unscored(connection, study_id)
        if unscored:
            _fail(connection, list(unscored))
            trials_are = _trials_are(list(unscored.values()))
            done.append(f"study {name}: {trials_are} now marked as failed, without a finite score")
    return done


def outdated(connection: Connection) -> dict[int, str]:
    """The ids and names of the studies whose attributes have no prefix, as older versions wrote them.

    Other programs may use the same names. So the definition, and the budget or the incarnation, must have our shape.
    """
    stored, current = StudyUserAttributeModel, aliased(StudyUserAttributeModel)
    renamed = select(current.key).where(current.study_id == stored.study_id, current.key == f"{PREFIX}definition")
    rows = connection.execute(
        select(StudyModel.study_id, StudyModel.study_name, stored.key, stored.value_json)
        .join(stored, stored.study_id == StudyModel.study_id)
        .where(stored.key.in_(("definition", "budget", OLD_NAMES["incarnation"])), ~renamed.exists())
        .order_by(StudyModel.study_id)
    )
    studies: dict[tuple[int, str], dict[str, Any]] = {}
    for study_id, name, key, value_json in rows:
        studies.setdefault((study_id, name), {})[NEW_NAMES.get(key, key)] = decoded(value_json)

    def fits(values: dict[str, Any], key: str) -> bool:
        return key in values and SHAPES[key](values[key])

    return {
        study_id: name
        for (study_id, name), values in studies.items()
        if fits(values, "definition") and (fits(values, "budget") or fits(values, "incarnation"))
    }


def _rename(connection: Connection, study_id: int) -> None:
    old_names = [OLD_NAMES.get(name, name) for name in SHAPES]
    stored = StudyUserAttributeModel
    rows = connection.execute(
        select(stored.key, stored.value_json).where(stored.study_id == study_id, stored.key.in_(old_names))
    ).all()
    for old, value_json in rows:
        key, value = NEW_NAMES.get(old, old), decoded(value_json)
        if SHAPES[key](value):
            existing = connection.execute(
                select(stored.key).where(stored.study_id == study_id, stored.key == PREFIX + key)
            ).scalar()
            if existing is None:
                renamed = update(stored).where(stored.study_id == study_id, stored.key == old)
                new = _scored_as_before(value) if key == "definition" else value
                connection.execute(renamed.values(key=PREFIX + key, value_json=json.dumps(new)))


def _scored_as_before(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition with Keras's own moving averages, so that new trials stay comparable with the older ones."""
    fixed = definition.get("fixed", {})
    no_averages = definition["model"] == "mnist_cnn" or (fixed.get("depth") == 3 and not fixed.get("batch_norm"))
    return definition if no_averages else definition | {"fixed": fixed | {"batch_norm_averages": "keras"}}


def _ours(connection: Connection) -> list[tuple[int, str]]:
    """The id and name of every study that Trialyard made."""
    rows = connection.execute(
        select(StudyModel.study_id, StudyModel.study_name)
        .join(StudyUserAttributeModel, StudyUserAttributeModel.study_id == StudyModel.study_id)
        .where(StudyUserAttributeModel.key == f"{PREFIX}budget")
        .order_by(StudyModel.study_id)
    )
    return [(study_id, name) for study_id, name in rows]


def _unscored(connection: Connection, study_id: int) -> dict[int, int]:
    """The ids and numbers of the complete trials whose value is missing, NaN or infinite."""
    finite = select(TrialValueModel.trial_id).where(TrialValueModel.trial_id == TrialModel.trial_id, is_finite())
    rows = connection.execute(
        select(TrialModel.trial_id, TrialModel.number)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE, ~finite.exists())
        .order_by(TrialModel.number)
    )
    return {int(trial_id): int(number) for trial_id, number in rows}


def _fail(connection: Connection, trial_ids: list[int]) -> None:
    stored = TrialUserAttributeModel
    for trial_id in trial_ids:  # one at a time: the length of a statement is limited, and there are few
        connection.execute(update(TrialModel).where(TrialModel.trial_id == trial_id).values(state=TrialState.FAIL))
        connection.execute(delete(TrialValueModel).where(TrialValueModel.trial_id == trial_id))
        connection.execute(delete(stored).where(stored.trial_id == trial_id, stored.key == "failure"))
        connection.execute(insert(stored).values(trial_id=trial_id, key="failure", value_json=json.dumps(FAILURE)))


def _trials_are(numbers: list[int]) -> str:
    return f"{trials_text(numbers)} {'is' if len(numbers) == 1 else 'are'}"
