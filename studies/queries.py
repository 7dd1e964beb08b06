"""What came out: the best trial, the leaderboard, the status. Reading never changes anything."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel, TrialUserAttributeModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import and_, func, select

from storage import claims, settings
from storage import workers as present_workers
from storage.claims import Holding
from storage.database import read
from storage.workers import Present
from studies import registry
from studies.errors import StudyError
from studies.registry import Place

log = logging.getLogger(__name__)


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
    budget: int  # trials, those included that were imported
    state: claims.State  # open, paused or stopped
    ended: bool
    best: float | None  # the best value so far
    best_number: int | None
    seconds_left: float | None  # a guess, from the pace since the first trial began; None before one finished
    workers: tuple[Holding, ...]
    failures: tuple[str, ...]  # why trials failed, as "kind: message", each reason once


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One trial, epoch by epoch: the n-th entry of each tuple is epoch n's, and what is not known is empty.

    Losses are mean cross-entropies, accuracies 0 to 1; `loss` and `accuracy` are of the training images.
    """

    number: int
    state: str  # complete or pruned
    value: float | None
    params: dict[str, Any]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    val_loss: tuple[float, ...]
    val_accuracy: tuple[float, ...]  # the database has it, also where the others lie on another machine
    seconds: tuple[float, ...]


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
    return rows_of(place.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,)))


def rows_of(complete: Sequence[FrozenTrial]) -> list[Row]:
    """The same for complete trials that were read already."""
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


def _ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return sorted(trials, key=lambda trial: (-float(trial.values[0]), trial.number))


def status(name: str, storage: Place = None) -> Status:
    """Where study `name` stands. Raises StudyError where there is no such study."""
    place = registry.storage_of(storage)
    study_id = registry.study_id(name, place)
    definition = registry.definition_of(name, place)
    counts = claims.counts(place, study_id)
    budget = claims.budget(place, study_id)
    trials = budget.total if budget is not None else definition.trials
    imported = 0 if budget is None else budget.imported
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
        seconds_left=_seconds_left(place, study_id, counts, trials, imported),
        workers=tuple(claims.holdings(place, study_id)),
        failures=_failures(place, study_id) if counts.failed else (),
    )


def workers(storage: Place = None) -> list[Present]:
    """Every slot of every worker that beats, whatever study it is at, and also those that wait for one."""
    return read(registry.storage_of(storage), present_workers.present)


def curves(
    name: str, storage: Place = None, artifacts: str | Path | None = None, top: int | None = None
) -> list[Curve]:
    """The learning curves of study `name`: complete trials, best first, then pruned ones; `top` limits how many.

    They are read below the folder `artifacts`, by default the one that TRIALYARD_ARTIFACTS or TRIALYARD_HOME names.
    Raises StudyError where there is no such study.
    """
    place = registry.storage_of(storage)
    study_id = registry.study_id(name, place)
    ended = place.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return curves_of(ended, Path(artifacts) if artifacts is not None else settings.load().artifact_folder, top)


def curves_of(trials: Sequence[FrozenTrial], artifacts: Path, top: int | None = None) -> list[Curve]:
    """The same for trials that were read already."""
    complete = _ranked([trial for trial in trials if trial.state == TrialState.COMPLETE])
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    return [_curve(trial, artifacts) for trial in [*complete, *pruned][:top]]


def _curve(trial: FrozenTrial, artifacts: Path) -> Curve:
    records = _history(trial, artifacts)

    def column(key: str) -> tuple[float, ...]:
        return tuple(float(record[key]) for record in records)

    steps = sorted(trial.intermediate_values.items())
    return Curve(
        number=trial.number,
        state=trial.state.name.lower(),
        value=None if trial.values is None else float(trial.values[0]),
        params=trial.params,
        loss=column("loss"),
        accuracy=column("accuracy"),
        val_loss=column("val_loss"),
        val_accuracy=column("val_accuracy") or tuple(value for _, value in steps),
        seconds=column("seconds"),
    )


def _history(trial: FrozenTrial, artifacts: Path) -> list[dict[str, Any]]:
    """What the training wrote, an epoch a record; nothing where its file lies elsewhere, or is no history."""
    below = trial.user_attrs.get("history")
    if below is None:
        return []
    try:
        records = json.loads((artifacts / below).read_text(encoding="utf-8"))
        keys = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")
        return [{key: float(record[key]) for key in keys} for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.debug("trial %d has no history here: %s", trial.number, error)
        return []


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


def _seconds_left(
    storage: RDBStorage, study_id: int, counts: claims.Counts, trials: int, imported: int
) -> float | None:
    left, ran = trials - counts.finished, counts.finished - imported
    if left <= 0:
        return 0.0
    query = select(func.min(TrialModel._datetime_start_utc), func.max(TrialModel._datetime_complete_utc)).where(
        TrialModel.study_id == study_id
    )
    if imported:  # they took no time here
        query = query.join(
            TrialUserAttributeModel,
            and_(TrialUserAttributeModel.trial_id == TrialModel.trial_id, TrialUserAttributeModel.key == "attempts"),
        )
    with storage.engine.connect() as connection:
        began, last = connection.execute(query).one()
    if ran == 0 or not isinstance(began, datetime) or not isinstance(last, datetime):
        return None
    return (last - began).total_seconds() / ran * left
