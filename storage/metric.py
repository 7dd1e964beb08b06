"""Which images judge the trials of a study, and the metric's name: optuna-dashboard shows it for "Objective 0"."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import Connection, insert, select

from storage.tables import StudySystemAttributeModel

KEY = "study:metric_names"  # of `optuna.Study.set_metric_names`


Protocol = Literal["validation", "test", "confirmation"]
JudgedOn = Literal["validation", "test"]


def protocol(confirm: object, validation: object) -> Protocol:
    """How a study judges its trials, by the keys `confirm` and `data.validation` of its definition.

    By validation images; by the test images in each epoch, as the notebook did ("test"); or by the test images once,
    after the last epoch ("confirmation").
    """
    if confirm is not None:
        return "confirmation"
    return "test" if validation == "test" else "validation"


def protocol_of(definition: Mapping[str, Any]) -> Protocol:
    """The protocol of a definition as JSON."""
    return protocol(definition.get("confirm"), definition["data"]["validation"])


def judged_on(protocol: object) -> JudgedOn:
    """Which images give a trial its value; `protocol` may be what another program stored."""
    return "test" if protocol in ("test", "confirmation") else "validation"


def epochs_judged_on(protocol: object) -> JudgedOn:
    """Which images are evaluated after each epoch.

    Those of `judged_on`, except in a confirmation, which opens the test images once, after the last epoch.
    """
    return "test" if protocol == "test" else "validation"


def name_metric(connection: Connection, study_id: int, definition: Mapping[str, Any]) -> None:
    """Names the metric of a study, unless it has a name."""
    stored = StudySystemAttributeModel
    known = select(stored.study_id).where(stored.study_id == study_id, stored.key == KEY)
    if connection.execute(known).first() is None:
        names = json.dumps([f"{judged_on(protocol_of(definition))} accuracy"])
        connection.execute(insert(stored).values(study_id=study_id, key=KEY, value_json=names))
