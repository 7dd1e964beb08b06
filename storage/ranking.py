"""How the trials of a study stand: the complete and feasible ones, best first. By SQL, which reads no trial whole."""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Connection, and_, select, true

from storage.artifacts import MODEL
from storage.tables import (
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)


@dataclass(frozen=True, kw_only=True)
class RankedTrial:
    """A trial that may win."""

    trial_id: int  # unique in the database
    number: int
    value: float


def ranked(
    connection: Connection, study_id: int, top: int | None = None, *, with_model: bool = False
) -> list[RankedTrial]:
    """The study's complete trials, highest value first and of equals the first, or only the `top` of them.

    `with_model`: of those that left a model, as trials that were imported did not.
    Those whose value is not finite, which older versions stored, are left out: they would be the best on PostgreSQL.
    Those with a violated constraint (`optuna.Trial.set_constraint`: more than 0) are left out, as Optuna's own
    ``study.best_trial`` leaves them out. A trial's rank never rises: values of finished trials do not change.
    """
    barred = _infeasible(connection, study_id)
    stored = TrialUserAttributeModel
    has_model = (
        select(stored.trial_id)
        .where(stored.trial_id == TrialModel.trial_id, stored.key == "model")
        .where(stored.value_json.endswith(f'/{MODEL}"', autoescape=True))  # others may call anything a model
        .exists()
    )
    rows = connection.execute(
        select(TrialModel.trial_id, TrialModel.number, TrialValueModel.value)
        .join(TrialValueModel, TrialValueModel.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE, TrialValueModel.objective == 0)
        .where(is_finite(), has_model if with_model else true())
        .order_by(TrialValueModel.value.desc(), TrialModel.number)
        .limit(None if top is None else top + len(barred))
    )
    feasible = [
        RankedTrial(trial_id=trial_id, number=number, value=value)
        for trial_id, number, value in rows
        if trial_id not in barred
    ]
    return feasible[:top]


def is_scored(trial: FrozenTrial) -> bool:
    """Whether the trial is complete with a finite value. Older versions, and plain Optuna, store others too."""
    return trial.state == TrialState.COMPLETE and trial.values is not None and math.isfinite(trial.values[0])


def is_finite() -> ColumnElement[bool]:
    """Whether a row of values is a finite one. A NaN is NULL on SQLite, and larger than all numbers on PostgreSQL."""
    largest = sys.float_info.max
    finite = TrialValueModel.value_type == TrialValueModel.TrialValueType.FINITE
    return and_(finite, TrialValueModel.value.between(-largest, largest))


def _infeasible(connection: Connection, study_id: int) -> set[int]:
    """The ids of the complete trials that violate a constraint, told as Optuna 5 does or as it did before."""
    stored = TrialSystemAttributeModel
    rows = connection.execute(
        select(stored.trial_id, stored.value_json)
        .join(TrialModel, TrialModel.trial_id == stored.trial_id)
        .where(
            TrialModel.study_id == study_id,
            TrialModel.state == TrialState.COMPLETE,
            (stored.key == "constraints") | stored.key.startswith("constraints:", autoescape=True),
        )
    )
    return {trial_id for trial_id, told in rows if _violated(json.loads(told))}


def _violated(told: Any) -> bool:
    # Before Optuna 5 a list of them, or null where they could not be computed.
    return any(value > 0 for value in (told if isinstance(told, list) else [told]) if value is not None)
