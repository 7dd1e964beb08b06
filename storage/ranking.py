"""The ranking of a study's trials: the complete and feasible ones, best first. SQL does it, without reading trials."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Connection, Double, ScalarSelect, and_, case, cast, func, select

from storage import attributes
from storage.artifacts import MODEL
from storage.tables import (
    IDS_IN_CLAUSE,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)

LOSS = "val_loss"  # the user attribute with the validation loss of the best epoch
_NUMBER = r"^-?\d{1,20}(\.\d{1,30})?([eE][+-]?\d{1,2})?$"  # as JSON, and in the range of a double


@dataclass(frozen=True, kw_only=True)
class RankedTrial:
    """A complete and feasible trial."""

    trial_id: int  # unique in the database
    number: int
    value: float
    rank: int  # from 1; equal values share it (1, 1, 3)


def ranks(values: Sequence[float]) -> list[int]:
    """The rank of each of these values, which are sorted, the best first. Equal values share it: 1, 1, 3.

    >>> ranks([0.9, 0.9, 0.8])
    [1, 1, 3]
    """
    first: dict[float, int] = {}
    return [first.setdefault(value, at) for at, value in enumerate(values, start=1)]


def ranked(
    connection: Connection, study_id: int, top: int | None = None, *, with_model: bool = False
) -> list[RankedTrial]:
    """The study's complete trials, best first; only the first `top` if it is given.

    The highest value is the best; of equal ones that with the lowest validation loss, and then with the lowest number.
    Trials of older versions and of other programs have no loss: they follow those that have one.
    `with_model` leaves out trials that have no model, such as imported ones.
    Trials whose value is not finite are left out: older versions stored them, and PostgreSQL would sort NaN first.
    Trials that violate a constraint (`optuna.Trial.set_constraint`: more than 0) are left out, as in Optuna's own
    ``study.best_trial``. A trial's rank never rises, because values and losses of finished trials do not change.
    """
    infeasible = _infeasible(connection, study_id)
    limit = None if top is None else top + len(infeasible)
    while True:
        best = _best(connection, study_id, limit)
        feasible = [row for row in best if row[0] not in infeasible]
        found = [
            RankedTrial(trial_id=trial_id, number=number, value=value, rank=rank)
            for (trial_id, number, value), rank in zip(feasible, ranks([row[2] for row in feasible]), strict=True)
        ]
        if with_model:
            having = _with_model(connection, [trial.trial_id for trial in found])
            found = [trial for trial in found if trial.trial_id in having]
        if top is None or limit is None or len(found) >= top or len(best) < limit:
            return found[:top]
        limit *= 4  # many of them have no model


def _best(connection: Connection, study_id: int, limit: int | None) -> list[tuple[int, int, float]]:
    """The id, the number and the value of complete trials, the best first."""
    value = TrialValueModel.value
    scored = (
        select(TrialModel.trial_id, TrialModel.number, value)
        .join(TrialValueModel, TrialValueModel.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE, TrialValueModel.objective == 0)
        .where(is_finite())
    )
    if limit is not None:
        # The losses of the others need not be read.
        last = scored.with_only_columns(value).order_by(value.desc()).offset(limit - 1).limit(1).scalar_subquery()
        scored = scored.where(value >= func.coalesce(last, -sys.float_info.max))
    rows = connection.execute(
        scored.order_by(value.desc(), _loss_of_trial().nulls_last(), TrialModel.number).limit(limit)
    )
    return [(trial_id, number, value) for trial_id, number, value in rows]


def _loss_of_trial() -> ScalarSelect[Any]:
    """The validation loss of a trial's best epoch; NULL if it has none, or another program stored something else."""
    stored = TrialUserAttributeModel
    loss = case((stored.value_json.regexp_match(_NUMBER), cast(stored.value_json, Double)))
    return select(loss).where(stored.trial_id == TrialModel.trial_id, stored.key == LOSS).scalar_subquery()


def _with_model(connection: Connection, trial_ids: list[int]) -> set[int]:
    """Which of these trials have a model.

    A query of its own: as a part of the other, PostgreSQL without statistics compared every trial with every attribute.
    """
    stored, found = TrialUserAttributeModel, set[int]()
    for start in range(0, len(trial_ids), IDS_IN_CLAUSE):
        rows = connection.execute(
            select(stored.trial_id)
            .where(stored.trial_id.in_(trial_ids[start : start + IDS_IN_CLAUSE]), stored.key == "model")
            # Others may store anything as `model`, also a path outside the artifacts folder.
            .where(stored.value_json.endswith(f'/{MODEL}"', autoescape=True))
            .where(~stored.value_json.startswith('"/', autoescape=True))
            .where(~stored.value_json.contains("../", autoescape=True))
        )
        found |= set(rows.scalars())
    return found


def rank_key(trial: FrozenTrial) -> tuple[float, float, int]:
    """What to sort scored trials by, so that they have the order of `ranked`: the best has the smallest."""
    loss = attributes.number(trial.user_attrs.get(LOSS))
    return -trial.values[0], math.inf if loss is None else loss, trial.number


def is_scored(trial: FrozenTrial) -> bool:
    """Whether the trial is complete with a finite value. Older versions and plain Optuna also store other values."""
    return trial.state == TrialState.COMPLETE and trial.values is not None and math.isfinite(trial.values[0])


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether the trial violates no constraint."""
    constraints = (
        value for key, value in trial.system_attrs.items() if key == "constraints" or key.startswith("constraints:")
    )
    return not any(map(_violated, constraints))


def is_finite() -> ColumnElement[bool]:
    """Whether a stored value is finite. NaN is NULL on SQLite, and larger than all numbers on PostgreSQL."""
    largest = sys.float_info.max
    finite = TrialValueModel.value_type == TrialValueModel.TrialValueType.FINITE
    return and_(finite, TrialValueModel.value.between(-largest, largest))


def _infeasible(connection: Connection, study_id: int) -> set[int]:
    """The ids of the complete trials that violate a constraint, in the format of Optuna 5 or of earlier versions."""
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
    return {trial_id for trial_id, value_json in rows if _violated(attributes.decoded(value_json))}


def _violated(constraints: Any) -> bool:
    # Before Optuna 5 it was a list, or null if the constraints could not be computed.
    values = constraints if isinstance(constraints, list) else [constraints]
    # What another program stored there, and is not a number, says nothing.
    return any(value > 0 for value in values if isinstance(value, (int, float)))
