"""The name of what a study maximizes, which Optuna keeps: optuna-dashboard shows it instead of "Objective 0"."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select

from storage.tables import StudySystemAttributeModel

KEY = "study:metric_names"  # of `optuna.Study.set_metric_names`


def judged_on(definition: Mapping[str, Any]) -> str:
    """Which images give a trial its value, by a study's definition as JSON: "validation" or "test"."""
    is_test = definition.get("confirm") is not None or definition["data"]["validation"] == "test"
    return "test" if is_test else "validation"


def name_metric(connection: Connection, study_id: int, definition: Mapping[str, Any]) -> None:
    """Names the metric of a study, unless it has a name."""
    stored = StudySystemAttributeModel
    known = select(stored.study_id).where(stored.study_id == study_id, stored.key == KEY)
    if connection.execute(known).first() is None:
        names = json.dumps([f"{judged_on(definition)} accuracy"])
        connection.execute(insert(stored).values(study_id=study_id, key=KEY, value_json=names))
