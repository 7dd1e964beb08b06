"""What came out: the best trial, the leaderboard, the status. Reading never changes anything."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import func, select

from storage import claims
from storage import workers as present_workers
from storage.claims import Holding
from storage.database import read
from storage.workers import Present
from studies import registry
from studies.errors import StudyError
from studies.registry import Place


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished trial of a leaderboard."""

    rank: int  # from 1; trials of equal value stand in the order of their numbers
    number: int
    value: float  # validation accuracy of its best epoch, 0 to 1
    params: dict[str, Any]
    epochs: int | None
    parameters: int | None  # weights in the model
    seconds: float | None  # trained, not counting the start


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a study stands."""

    study: str
    description: str
    protocol: str  # "validation", or "test": the notebook's own, chosen on the test set
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    budget: int  # trials
    state: claims.State  # open, paused or stopped
    ended: bool
    best: float | None  # the best value so far
    best_number: int | None
    seconds_left: float | None  # a guess, from the pace since the first trial began; None before one finished
    workers: tuple[Holding, ...]
    failures: tuple[str, ...]  # why trials failed, as "kind: message", each reason once


def best_trial(name: str, storage: Place = None) -> FrozenTrial:
    """The complete trial with the highest validation accuracy; of equals, the first. Pruned and failed never win.

    Raises StudyError where there is no such study, or no complete trial yet.
    """
    place = registry.storage_of(storage)
    study_id = registry.study_id(name, place)
    complete = place.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        counts = claims.counts(place, study_id)
        if claims.ended(place, study_id):
            raise StudyError(
                f"study {name!r} has ended without a complete trial ({counts.failed} failed, {counts.pruned} pruned): "
                f"`trialyard status {name}` says why; correct its definition and give it another name"
            )
        raise StudyError(
            f"study {name!r} has no complete trial yet: `trialyard run {name}` works on it, "
            f"`trialyard status {name}` shows how far it is"
        )
    return _ranked(complete)[0]


def leaderboard(name: str, storage: Place = None) -> list[Row]:
    """The complete trials of study `name`, best first. Raises StudyError where there is no such study."""
    place = registry.storage_of(storage)
    study_id = registry.study_id(name, place)
    complete = place.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        Row(
            rank=rank,
            number=trial.number,
            value=float(trial.values[0]),
            params=trial.params,
            epochs=trial.user_attrs.get("epochs"),
            parameters=trial.user_attrs.get("parameters"),
            seconds=trial.user_attrs.get("seconds"),
        )
        for rank, trial in enumerate(_ranked(complete), start=1)
    ]


def _ranked(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return sorted(trials, key=lambda trial: (-float(trial.values[0]), trial.number))


def status(name: str, storage: Place = None) -> Status:
    """Where study `name` stands. Raises StudyError where there is no such study."""
    place = registry.storage_of(storage)
    study_id = registry.study_id(name, place)
    definition = registry.definition_of(name, place)
    counts = claims.counts(place, study_id)
    budget = claims.budget(place, study_id)
    trials = budget.trials if budget is not None else definition.trials
    best = _best(place, study_id)
    return Status(
        study=name,
        description=definition.description,
        protocol="test" if definition.data.validation == "test" else "validation",
        complete=counts.complete,
        pruned=counts.pruned,
        failed=counts.failed,
        running=counts.running,
        waiting=counts.waiting,
        budget=trials,
        state=claims.state(place, study_id),
        ended=claims.ended(place, study_id),
        best=None if best is None else float(best.values[0]),
        best_number=None if best is None else best.number,
        seconds_left=_seconds_left(place, study_id, counts, trials),
        workers=tuple(claims.holdings(place, study_id)),
        failures=_failures(place, study_id) if counts.failed else (),
    )


def workers(storage: Place = None) -> list[Present]:
    """Every slot of every worker that beats, whatever study it is at, and also those that wait for one."""
    return read(registry.storage_of(storage), present_workers.present)


def _best(storage: RDBStorage, study_id: int) -> FrozenTrial | None:
    try:
        return storage.get_best_trial(study_id)
    except ValueError:  # Optuna's word for: nothing is complete
        return None


def _failures(storage: RDBStorage, study_id: int) -> tuple[str, ...]:
    failed = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.FAIL,))
    # A trial that plain Optuna failed has no reason.
    reasons = (trial.user_attrs.get("failure", {"kind": "unknown", "message": "no reason"}) for trial in failed)
    return tuple(dict.fromkeys(f"{reason['kind']}: {reason['message']}" for reason in reasons))


def _seconds_left(storage: RDBStorage, study_id: int, counts: claims.Counts, trials: int) -> float | None:
    left = trials - counts.finished
    if left <= 0:
        return 0.0
    with storage.engine.connect() as connection:
        began, last = connection.execute(
            select(func.min(TrialModel._datetime_start_utc), func.max(TrialModel._datetime_complete_utc)).where(
                TrialModel.study_id == study_id
            )
        ).one()
    if counts.finished == 0 or not isinstance(began, datetime) or not isinstance(last, datetime):
        return None
    return (last - began).total_seconds() / counts.finished * left
