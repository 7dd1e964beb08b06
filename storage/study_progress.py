"""How far studies are: their trials by state, without reading a trial."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from optuna.trial import TrialState
from sqlalchemy import ColumnElement, Connection, ScalarSelect, Select, bindparam, func, select

from storage import attempt_table
from storage.owners import clock_of
from storage.tables import StudyModel, TrialModel


def of_studies(connection: Connection, study_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """For each study its finished, running, outside and waiting trials, when the first one began, and the time now.

    Only unfinished trials are counted, which are few. One statement sees one moment, also without a lock: a trial that
    changes its state is counted once.
    """
    rows = connection.execute(_query(connection.dialect.name), {"study_ids": list(study_ids)})
    return {
        study_id: {
            "finished": (0 if number is None else number + 1) - running - outside - waiting,
            "running": running,
            "outside": outside,
            "waiting": waiting,
            "first_began": began,
            "read_at": now,
        }
        for study_id, number, running, outside, waiting, began, now in rows
    }


@cache  # every claim asks twice, and to build the query takes longer than to run it
def _query(dialect: str) -> Select[Any]:
    def count(state: TrialState, *where: ColumnElement[bool]) -> ScalarSelect[int]:
        mine = (TrialModel.study_id == StudyModel.study_id, TrialModel.state == state, *where)
        return select(func.count()).where(*mine).correlate(StudyModel).scalar_subquery()

    last = select(func.max(TrialModel.number)).where(TrialModel.study_id == StudyModel.study_id).correlate(StudyModel)
    return select(
        StudyModel.study_id,
        last.scalar_subquery(),
        count(TrialState.RUNNING, attempt_table.has_running_attempt()),
        count(TrialState.RUNNING, ~attempt_table.has_running_attempt()),
        count(TrialState.WAITING),
        attempt_table.first_began(StudyModel.study_id).correlate(StudyModel).scalar_subquery(),
        clock_of(dialect),
    ).where(StudyModel.study_id.in_(bindparam("study_ids", expanding=True)))
