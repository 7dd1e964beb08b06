"""Pauses a study that cannot succeed, before it spends its budget on one failure after the other."""

import logging
import re
from itertools import takewhile

from optuna.trial import TrialState
from sqlalchemy import Connection, and_, func, select

from storage import attempt_table, attributes, faults, ledger
from storage.tables import TrialModel, TrialUserAttributeModel

log = logging.getLogger(__name__)

# What differs between two failures that are alike: hyperparameters, as a model's error names them, and numbers.
_HYPERPARAMETERS = re.compile(r"\{[^{}]*\}")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def pause_after_failures(connection: Connection, study_id: int) -> None:
    """Pauses the study with the reason, if none of its trials has ended well and the last ones failed alike.

    How many have to depends on the kind of failure: see `faults.Fault.pauses_after`. To be called in the transaction
    in which a trial fails. Once the study is resumed, as many further failures pause it again.
    """
    if _any_ended_well(connection, study_id):
        return
    study = ledger.by_id(connection, study_id)
    if study is None or study.state != "open" or study.has_ended:
        return
    failures = _failures(connection, study_id)
    last = failures[0]
    alike = sum(1 for _ in takewhile(lambda failure: _pattern(failure) == _pattern(last), failures))
    limit = faults.of(last["kind"]).pauses_after
    if limit is None or alike % limit != 0:
        return
    trials = "a trial failed" if alike == 1 else f"the last {alike} trials failed alike"
    reason = f"{trials}, and none has ended well: {last['kind']}: {last['message']}"
    ledger.change_state(connection, study_id, "paused", reason)
    log.warning("study %s is paused: %s", study.name, reason)


def _any_ended_well(connection: Connection, study_id: int) -> bool:
    """Whether any trial that was run here is complete or pruned. Imported trials have no attempt."""
    attempts = attempt_table.table
    well = (TrialState.COMPLETE, TrialState.PRUNED)
    query = (
        select(TrialModel.trial_id)
        .join(attempts, attempts.c.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.state.in_(well))
    )
    return connection.execute(query.limit(1)).first() is not None


def _failures(connection: Connection, study_id: int) -> list[dict[str, str]]:
    """Why the study's trials failed, the last one first."""
    stored, attempts = TrialUserAttributeModel, attempt_table.table
    # By the database's clock: Optuna's own time of a trial's end is by the worker's.
    ended = select(func.max(attempts.c.ended)).where(attempts.c.trial_id == TrialModel.trial_id).scalar_subquery()
    reasons = connection.execute(
        select(stored.value_json)
        .select_from(TrialModel)
        .outerjoin(stored, and_(stored.trial_id == TrialModel.trial_id, stored.key == "failure"))
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.FAIL)
        .order_by(ended.desc(), TrialModel.trial_id.desc())
    ).scalars()
    return [attributes.failure(attributes.decoded(reason)) for reason in reasons]


def _pattern(failure: dict[str, str]) -> tuple[str, str]:
    return failure["kind"], _NUMBER.sub("#", _HYPERPARAMETERS.sub("{}", failure["message"]))
