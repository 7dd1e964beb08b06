"""Adds trials to a study that exists: a point that a person wants to be tried, and failed trials once more."""

from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from storage import attributes, queue
from storage.ledger import Study
from storage.queue import Queued
from studies import definition as definitions
from studies import registry
from studies.definition import Definition
from studies.errors import DefinitionError, StudyError
from studies.registry import StorageLike
from studies.space import is_whole, key_of


def enqueue(name: str, point: Mapping[str, Any], storage: StorageLike = None) -> int:
    """Adds a trial with the hyperparameters `point` to study `name`, to be run after what waits already; returns its
    number. Where more waits than the budget has room for, as of a grid, it comes first.

    The sampler gives the hyperparameters that `point` leaves out. The trial is one of the budget's, which grows if it
    has no room for all that waits.

    >>> studies.enqueue("digits", {"depth": 3, "dropout": 0.1})
    3

    Raises StudyError if there is no such study, no trial of it would start, the point does not fit its space, or
    another trial has it already.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    confirm = definitions.from_json(study.definition).confirm
    if confirm is not None:
        raise StudyError(
            f"study {study.name!r} is a confirmation, whose trials are fixed: `trialyard confirm {confirm.study} "
            "--seeds N` makes one with more seeds"
        )
    definition = _open_for_more(study)
    checked = _checked(definition, point)
    for key in checked:
        missing = [other for other in definition.space[key].when if other not in checked]
        if missing:
            raise StudyError(
                f"study {name!r}: {key} applies only to some values of {missing[0]}: give {missing[0]}, too, or leave "
                f"{key} out"
            )
    for trial in opened.get_all_trials(study.id, deepcopy=False):
        if trial.state != TrialState.FAIL and key_of(_point_of(trial)) == key_of(checked):
            raise StudyError(f"trial {trial.number} of study {name!r} has these hyperparameters already")
    (number,) = queue.enqueue(opened, study, [Queued(point=checked)])
    return number


def retry(name: str, storage: StorageLike = None) -> list[int]:
    """Adds a trial for each failed one of study `name`, with the same hyperparameters; returns their numbers.

    The failed trials stay as they are, and the budget grows by the new ones. A trial that was repeated already is left
    out, as is one that had no hyperparameters yet.

    >>> studies.retry("digits")
    []

    Raises StudyError if there is no such study, or no trial of it would start.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    definition = _open_for_more(study)
    failed = opened.get_all_trials(study.id, deepcopy=False, states=(TrialState.FAIL,))
    whole = [trial for trial in failed if is_whole(trial.params, definition.space)]
    return queue.enqueue(opened, study, [Queued(point=trial.params, retry_of=trial.number) for trial in whole])


def _open_for_more(study: Study) -> Definition:
    """The study's definition. Raises StudyError if none of its waiting trials would ever start."""
    definition = definitions.from_json(study.definition)
    if study.state == "stopped":
        raise StudyError(f"study {study.name!r} is stopped: `trialyard resume {study.name}` first")
    if study.is_late:
        raise StudyError(
            f"study {study.name!r} is out of time: give it more budget.hours with `trialyard create` first"
        )
    return definition


def _checked(definition: Definition, point: Mapping[str, Any]) -> dict[str, Any]:
    """`point` with its values as the space has them. Raises StudyError."""
    if not point:
        raise StudyError(f"a point needs at least one of {', '.join(definition.space)}")
    try:
        alone = definitions.from_json(definition.to_json() | {"points": [dict(point)]})
    except DefinitionError as error:
        sentence = str(error).partition(": ")[2].replace("points[1].", "").replace("points[1] ", "the point ")
        raise StudyError(f"study {definition.name!r}: {sentence}") from None
    return dict(alone.queue()[0])


def _point_of(trial: FrozenTrial) -> dict[str, Any]:
    return trial.params or attributes.listed_point(trial)
