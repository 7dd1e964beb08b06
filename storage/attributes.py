"""The user attributes that Trialyard keeps for studies and trials, checked whenever they are read.

Other programs write to the same tables, and may use any name. A study's attributes have our own prefix. A trial's do
not: a trial that another program added may have a ``failure`` or a ``model`` of another shape, which is ignored.
"""

import json
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Connection, Select, select

from storage.errors import StudyUnreadable
from storage.tables import StudyModel, StudyUserAttributeModel, TrialModel, TrialUserAttributeModel

PREFIX = "trialyard:"


# --- attributes of a study --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyAttributes:
    """The attributes that Trialyard made for one study."""

    study_id: int
    name: str
    values: Mapping[str, Any]  # by name, without the prefix
    problem: str | None  # one sentence that says why the study is not readable


def of_studies(connection: Connection, names: Collection[str], *where: ColumnElement[bool]) -> list[StudyAttributes]:
    """The attributes `names` of all studies that have any of them, oldest first, in one query.

    `where` are conditions on `StudyModel`.
    """
    rows = connection.execute(_query_of_studies(tuple(names)).where(*where))
    values: dict[tuple[int, str], dict[str, Any]] = {}
    problems: dict[int, str] = {}
    for study_id, study, key, value_json in rows:
        of_this_study = values.setdefault((study_id, study), {})
        try:
            of_this_study[key.removeprefix(PREFIX)] = _parsed(study, key, value_json)
        except StudyUnreadable as error:
            problems[study_id] = str(error)
    return [
        StudyAttributes(study_id=study_id, name=study, values=of_this_study, problem=problems.get(study_id))
        for (study_id, study), of_this_study in values.items()
    ]


@cache  # every claim asks twice, and to build the query takes longer than to run it
def _query_of_studies(names: tuple[str, ...]) -> Select[Any]:
    stored = StudyUserAttributeModel
    return (
        select(StudyModel.study_id, StudyModel.study_name, stored.key, stored.value_json)
        .join(stored, stored.study_id == StudyModel.study_id)
        .where(stored.key.in_([PREFIX + name for name in names]))
        .order_by(StudyModel.study_id)
    )


def of_study(connection: Connection, study_id: int, name: str) -> Any:
    """The attribute `name` of a study, None if there is none. Raises StudyUnreadable if it has a wrong shape."""
    stored, key = StudyUserAttributeModel, PREFIX + name
    value_json = connection.execute(
        select(stored.value_json).where(stored.study_id == study_id, stored.key == key)
    ).scalar()
    if value_json is None:
        return None
    try:
        return _parsed("", key, value_json)
    except StudyUnreadable:
        study = connection.execute(select(StudyModel.study_name).where(StudyModel.study_id == study_id)).scalar()
        return _parsed(str(study), key, value_json)


def _parsed(study: str, key: str, value_json: str) -> Any:
    value = decoded(value_json)
    if not SHAPES[key.removeprefix(PREFIX)](value):
        raise StudyUnreadable(
            f"study {study!r} is not readable, because Trialyard never writes its attribute {key} as "
            f"{value_json[:60]}: restore a backup of the database, or remove the study with `optuna delete-study`"
        )
    return value


def _is_budget(value: Any) -> bool:
    if not isinstance(value, dict) or not {"trials", "hours"} <= value.keys() <= {"trials", "hours", "imported"}:
        return False
    hours = value["hours"]
    return (
        _is_count(value["trials"])
        and _is_count(value.get("imported", 0))
        and (hours is None or (number(hours) is not None and hours > 0))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_definition(value: Any) -> bool:
    # `studies.definition` checks the rest. A later version may have written it.
    return (
        isinstance(value, dict)
        and {"name", "dataset", "model", "space", "budget"} <= value.keys()
        and isinstance(value.get("description"), str)
        and isinstance(value.get("data"), dict)
        and "validation" in value["data"]
    )


def _is_software(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(version, str) for version in value.values())


SHAPES: Mapping[str, Callable[[Any], bool]] = {
    "budget": _is_budget,
    "state": lambda value: value in ("open", "paused", "stopped"),
    "pause_reason": lambda value: isinstance(value, str),
    "incarnation": lambda value: isinstance(value, str),
    "definition": _is_definition,
    "data": lambda value: isinstance(value, dict),
    "software": _is_software,
    "precision": lambda value: isinstance(value, str),
    "priority": lambda value: isinstance(value, int) and not isinstance(value, bool),
}


# --- attributes of a trial --------------------------------------------------------------------------------


def failure(value: Any) -> dict[str, str]:
    """Why a trial failed: a ``kind`` in one word, and a ``message``. Plain Optuna stores neither."""
    if isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("kind", "message")):
        return {"kind": value["kind"], "message": value["message"]}
    return {"kind": "unknown", "message": "no reason was stored"}


def number(value: Any) -> int | float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Compared, because a whole number of hundreds of digits cannot become a float.
    return value if is_number and abs(value) <= sys.float_info.max else None


def numbers(value: Any) -> list[float]:
    """`value` if it is a list of finite numbers, else an empty list."""
    known = [number(each) for each in value] if isinstance(value, list) else []
    return [float(each) for each in known if each is not None] if None not in known else []


def listed_point(trial: FrozenTrial) -> dict[str, Any]:
    """The hyperparameters with which a trial was added to the queue; none if it was not, or says something else."""
    listed = trial.system_attrs.get("fixed_params")
    return dict(listed) if isinstance(listed, dict) else {}


def last_step_text(trial: FrozenTrial) -> str:
    """The last step of a trial for people: an epoch, or a repeat where it was trained several times."""
    return f"{'repeat' if 'repeats' in trial.user_attrs else 'epoch'} {trial.last_step}"


def mean_of_repeats(trial: FrozenTrial) -> float | None:
    """The value of a pruned trial whose steps are repeats: their mean, because each one alone is luck.

    None for every other trial: where the steps are epochs, the last or the best one says how far it came.
    """
    has_mean = trial.state == TrialState.PRUNED and "repeats" in trial.user_attrs and trial.values is not None
    return number(trial.values[0]) if has_mean else None


def of_all_trials(connection: Connection, study_id: int, key: str) -> list[Any]:
    """The values of the user attribute `key` of the study's trials; what is not JSON is None."""
    stored = connection.execute(
        select(TrialUserAttributeModel.value_json)
        .join(TrialModel, TrialModel.trial_id == TrialUserAttributeModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialUserAttributeModel.key == key)
    ).scalars()
    return [decoded(value_json) for value_json in stored]


def encoded(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, with null for a number that is not finite: JSON has no other word for it."""
    return json.dumps(_without_infinity(value), indent=indent, allow_nan=False)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_infinity(each) for key, each in value.items()}
    return [_without_infinity(each) for each in value] if isinstance(value, (list, tuple)) else value


def decoded(value_json: str | None) -> Any:
    """The value of a stored attribute; None if there is none, or it is not JSON."""
    try:
        return None if value_json is None else json.loads(value_json)
    except ValueError:
        return None
