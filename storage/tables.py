"""Optuna's tables and cache, the keys of optuna-dashboard in them, and statements on rows that several modules need.

The only module that imports these parts of Optuna, which are private: look here first when its version is raised.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages._cached_storage import _CachedStorage as CachedStorage
from optuna.storages._cached_storage import _StudyInfo as StudyInfo
from optuna.storages._rdb.models import (
    BaseModel,
    StudyDirectionModel,
    StudyModel,
    StudySystemAttributeModel,
    StudyUserAttributeModel,
    TrialHeartbeatModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

__all__ = [
    "ALL_TABLES",
    "BaseModel",
    "CachedStorage",
    "StudyDirectionModel",
    "StudyInfo",
    "StudyModel",
    "StudySystemAttributeModel",
    "StudyUserAttributeModel",
    "TrialHeartbeatModel",
    "TrialIntermediateValueModel",
    "TrialModel",
    "TrialParamModel",
    "TrialSystemAttributeModel",
    "TrialUserAttributeModel",
    "TrialValueModel",
]

ALL_TABLES = tuple(BaseModel.metadata.sorted_tables)  # a table comes after those that its rows refer to


def find_study(connection: Connection, study: str) -> int | None:
    """The id of the study of this name; None if there is none."""
    return connection.execute(select(StudyModel.study_id).where(StudyModel.study_name == study)).scalar()


def insert_study(connection: Connection, study: str) -> int:
    """Inserts an empty study that maximizes one value; returns its id."""
    inserted = connection.execute(insert(StudyModel.__table__).values(study_name=study))
    (study_id,) = inserted.inserted_primary_key or (None,)
    assert study_id is not None
    connection.execute(
        insert(StudyDirectionModel.__table__).values(study_id=study_id, direction=StudyDirection.MAXIMIZE, objective=0)
    )
    return int(study_id)


def storable(text: str) -> str:
    """The text with escapes for what databases refuse: names of files that are not UTF-8, and NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def delete_study(connection: Connection, study_id: int) -> None:
    """Deletes a study with all its rows.

    Optuna's own deletion reads every row first: half a minute for 10,000 trials.
    """
    trials = select(TrialModel.trial_id).where(TrialModel.study_id == study_id)
    for table in reversed(ALL_TABLES):
        if table is TrialModel.__table__ or "trial_id" not in table.c:
            if "study_id" in table.c:
                connection.execute(delete(table).where(table.c.study_id == study_id))
        else:
            connection.execute(delete(table).where(table.c.trial_id.in_(trials)))


def next_number(connection: Connection, study_id: int) -> int:
    """The number of the next trial, which is how many trials the study has: numbers have no gaps.

    Nobody else adds a trial before the transaction ends: Optuna locks the study's row, too, when it does.
    """
    connection.execute(
        # FOR NO KEY UPDATE: rows that refer to the study may be written meanwhile.
        select(StudyModel.study_id).where(StudyModel.study_id == study_id).with_for_update(key_share=True)
    )
    last = connection.execute(select(func.max(TrialModel.number)).where(TrialModel.study_id == study_id)).scalar()
    return 0 if last is None else int(last) + 1


def insert_trial(
    connection: Connection, study_id: int, number: int, state: TrialState, started: datetime | None = None
) -> int:
    """Inserts a trial; returns its id. `started` is naive UTC."""
    row = {"study_id": study_id, "number": number, "state": state, "datetime_start": started}
    inserted = connection.execute(insert(TrialModel.__table__).values(row))
    (trial_id,) = inserted.inserted_primary_key or (None,)
    assert trial_id is not None
    return int(trial_id)


IDS_IN_CLAUSE = 500  # that one statement names: SQLite takes only so many variables in one
QUEUED_BY = "trialyard:queued_by"  # system attribute of a trial: the call that added it to the queue


def insert_waiting(
    connection: Connection, study_id: int, number: int, point: Mapping[str, Any], queued_by: str | None = None
) -> int:
    """Inserts a trial that is to be tried with the hyperparameters `point`, as Optuna's own queue has it; returns its
    id. `numbers_queued_by` finds it again.
    """
    trial_id = insert_trial(connection, study_id, number, TrialState.WAITING)
    values = {"fixed_params": dict(point)} | ({} if queued_by is None else {QUEUED_BY: queued_by})
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in values.items()]
    connection.execute(insert(TrialSystemAttributeModel), rows)
    return trial_id


def points_in_queue(connection: Connection, *where: ColumnElement[bool]) -> list[dict[str, Any]]:
    """The hyperparameters of such trials that were given with the queue and wait or run."""
    stored = TrialSystemAttributeModel
    rows = connection.execute(
        select(stored.value_json)
        .join(TrialModel, TrialModel.trial_id == stored.trial_id)
        .where(*where, stored.key == "fixed_params", TrialModel.state.in_((TrialState.WAITING, TrialState.RUNNING)))
    )
    points = [json.loads(value) for value in rows.scalars()]
    return [point for point in points if isinstance(point, dict)]


def numbers_queued_by(connection: Connection, study_id: int, queued_by: str) -> list[int]:
    """The numbers of the trials that one call added to the queue of a study, in order."""
    stored = TrialSystemAttributeModel
    return list(
        connection.execute(
            select(TrialModel.number)
            .join(stored, stored.trial_id == TrialModel.trial_id)
            .where(TrialModel.study_id == study_id, stored.key == QUEUED_BY, stored.value_json == json.dumps(queued_by))
            .order_by(TrialModel.number)
        ).scalars()
    )


def update_trial(connection: Connection, trial_id: int, **columns: Any) -> None:
    """Sets columns of a trial's row, by the names of `TrialModel`'s attributes."""
    values = {getattr(TrialModel, name): value for name, value in columns.items()}
    connection.execute(update(TrialModel).where(TrialModel.trial_id == trial_id).values(values))


def start_waiting(connection: Connection, trial_id: int) -> bool:
    """Makes a WAITING trial RUNNING; returns False if it is not waiting any more."""
    values = {TrialModel.state: TrialState.RUNNING, TrialModel._datetime_start_utc: utc_now()}
    waiting = (TrialModel.trial_id == trial_id, TrialModel.state == TrialState.WAITING)
    return connection.execute(update(TrialModel).where(*waiting).values(values)).rowcount == 1


def set_trial_attributes(connection: Connection, trial_id: int, values: Mapping[str, Any]) -> None:
    """Sets user attributes of a trial. The values must be JSON."""
    stored = TrialUserAttributeModel
    connection.execute(delete(stored).where(stored.trial_id == trial_id, stored.key.in_(values)))
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in values.items()]
    connection.execute(insert(stored), rows)


def param_row(trial_id: int, name: str, distribution: BaseDistribution, value: Any) -> dict[str, Any]:
    """The row of `TrialParamModel` that holds one hyperparameter of a trial."""
    return {
        "trial_id": trial_id,
        "param_name": name,
        "param_value": distribution.to_internal_repr(value),
        "distribution_json": distribution_to_json(distribution),
    }


def value_row(trial_id: int, value: float) -> dict[str, Any]:
    """The row of `TrialValueModel` that holds a trial's finite value."""
    number, kind = TrialValueModel.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": 0, "value": number, "value_type": kind}


def utc_now() -> datetime:
    """This machine's clock as naive UTC, which is how Optuna stores times."""
    return datetime.now(UTC).replace(tzinfo=None)


# --- the system attributes of a study in which optuna-dashboard keeps its notes and figures ------------------


def dashboard_plot_prefix() -> str:
    """The prefix of the keys of a study's figures."""
    from optuna_dashboard._custom_plot_data import SYSTEM_ATTR_PLOT_DATA  # it takes a moment to import

    return str(SYSTEM_ATTR_PLOT_DATA)


def dashboard_note_prefix(trial_id: int | None) -> str:
    """The prefix of the keys of a trial's note, or of the study's own (None)."""
    from optuna_dashboard._note import note_str_key_prefix

    return str(note_str_key_prefix(trial_id))
