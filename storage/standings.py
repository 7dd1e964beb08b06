"""How the trials of a study stand: the complete and feasible ones, best first. By SQL, which reads no trial whole."""

import json
from dataclasses import dataclass
from typing import Any

from optuna.storages._rdb.models import (
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import TrialState
from sqlalchemy import Connection, case, select, true


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A trial that may win."""

    trial_id: int  # unique in the database
    number: int
    value: float


def ranked(
    connection: Connection, study_id: int, top: int | None = None, *, with_model: bool = False
) -> list[Standing]:
    """The study's complete trials, highest value first and of equals the first, or only the `top` of them.

    `with_model`: of those that left a model, as trials that were imported did not.
    Those with a violated constraint (`optuna.Trial.set_constraint`: more than 0) are left out, as Optuna's own
    ``study.best_trial`` leaves them out. A trial's rank never rises: values of finished trials do not change.
    """
    barred = _infeasible(connection, study_id)
    kind, kinds = TrialValueModel.value_type, TrialValueModel.TrialValueType
    infinity = case((kind == kinds.INF_POS, 1), (kind == kinds.INF_NEG, -1), else_=0)
    stored = TrialUserAttributeModel
    has_model = select(stored.trial_id).where(stored.trial_id == TrialModel.trial_id, stored.key == "model").exists()
    rows = connection.execute(
        select(TrialModel.trial_id, TrialModel.number, TrialValueModel.value, kind)
        .join(TrialValueModel, TrialValueModel.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE, TrialValueModel.objective == 0)
        .where(has_model if with_model else true())
        .order_by(infinity.desc(), TrialValueModel.value.desc(), TrialModel.number)
        .limit(None if top is None else top + len(barred))
    )
    feasible = [
        Standing(trial_id=trial_id, number=number, value=TrialValueModel.stored_repr_to_value(value, told))
        for trial_id, number, value, told in rows
        if trial_id not in barred
    ]
    return feasible[:top]


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
