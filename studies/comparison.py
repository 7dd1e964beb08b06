"""Two studies side by side, and a study beside the notebook's results that it repeats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage import attempt_table, attributes, hits
from storage.hits import Hits
from storage.ledger import Study
from storage.transactions import read
from studies import definition as definitions
from studies import notebook, registry, results, statistics
from studies.errors import StudyError
from studies.registry import StorageLike
from studies.statistics import Interval

NOTEBOOK_IMAGES = 10_000  # by which the notebook measured each of its accuracies


# --- two studies --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one of two studies found, and what it took."""

    study: str
    trial: int  # the best one
    params: Mapping[str, Any]
    value: float
    judged_on: str  # "validation" or "test"
    images: int | None  # that it was judged by
    interval: Interval | None  # the sampling error of that accuracy: Wilson; None of a mean of several repeats
    finished: int  # trials
    epochs: int  # that were trained, of all finished trials
    seconds: float  # of training, of all finished trials; of a failed one, of all its attempts


@dataclass(frozen=True, kw_only=True)
class StudyComparison:
    """Two studies on the same images."""

    first: Side
    second: Side
    difference: float  # of the best accuracies
    # The sampling error of the difference; paired where both have the same images. None unless both were measured once.
    interval: Interval | None
    p: float | None  # McNemar's test; None unless both were judged by the very same images


def compare(first: str, second: str, storage: StorageLike = None) -> StudyComparison:
    """The studies `first` and `second`, which must have the same images.

    The interval and the test are about the two best *models*: how they were chosen is not part of them, nor what
    another seed would give. `search.confirm` answers those questions.

    >>> found = studies.compare("digits", "digits")
    >>> found.difference, found.first.finished, found.first.epochs
    (0.0, 2, 2)

    Raises StudyError if there is no such study, one has no complete trial, or their images differ.
    """
    opened = registry.storage_of(storage)
    left, right = registry.find(first, opened), registry.find(second, opened)
    fingerprints = [study.data.get("fingerprint") for study in (left, right)]
    if fingerprints[0] != fingerprints[1]:
        raise StudyError(
            f"the studies {first!r} and {second!r} have different images (their fingerprints are {fingerprints[0]} and "
            f"{fingerprints[1]}), so their accuracies cannot be compared"
        )
    (ours, our_hits), (theirs, their_hits) = _side(left, opened), _side(right, opened)
    interval, p = None, None
    if our_hits is not None and their_hits is not None and our_hits.fingerprint == their_hits.fingerprint:
        pair = our_hits.array(), their_hits.array()
        interval, p = statistics.difference_of_models(*pair), statistics.mcnemar_p(*pair)
    elif ours.images and theirs.images and ours.interval and theirs.interval:
        interval = statistics.difference_of_two(ours.value, theirs.value, ours.images, theirs.images)
    return StudyComparison(first=ours, second=theirs, difference=ours.value - theirs.value, interval=interval, p=p)


def _side(study: Study, storage: RDBStorage) -> tuple[Side, Hits | None]:
    best = results.best_trial_of(study, storage)
    definition = definitions.from_json(study.definition)
    own = read(storage, lambda connection: hits.of_trials(connection, [best._trial_id])).get(best._trial_id)
    counted = study.data.get(definition.judged_on)
    # An imported result does not say on how many images it was measured.
    known = own.images if own is not None else counted if not best.user_attrs.get("imported") else None
    value = float(best.values[0])
    # Other programs may store percent.
    images = known if isinstance(known, int) and known > 0 and 0.0 <= value <= 1.0 else None
    was_measured_once = len(attributes.numbers(best.user_attrs.get("repeats"))) < 2
    trials = storage.get_all_trials(study.id, deepcopy=False)
    finished = [trial for trial in trials if trial.state.is_finished()]
    attempts = read(storage, lambda connection: attempt_table.spent(connection, study.id))
    took = [_took(trial, attempts.get(trial._trial_id, (0, 0.0))) for trial in finished]
    side = Side(
        study=study.name,
        trial=best.number,
        params=best.params,
        value=value,
        judged_on=definition.judged_on,
        images=images,
        interval=statistics.wilson(round(value * images), images) if images is not None and was_measured_once else None,
        finished=len(finished),
        epochs=sum(epochs for epochs, _ in took),
        seconds=sum(seconds for _, seconds in took),
    )
    return side, own


def _took(trial: FrozenTrial, attempts: tuple[int, float]) -> tuple[int, float]:
    """The epochs and seconds that a finished trial took. A failed one has only the record of its `attempts`."""
    epochs, seconds = (attributes.number(trial.user_attrs.get(key)) for key in ("epochs", "seconds"))
    return int(attempts[0] if epochs is None else epochs), float(attempts[1] if seconds is None else seconds)


def _epochs(trial: FrozenTrial) -> int:
    return int(attributes.number(trial.user_attrs.get("epochs")) or max(trial.intermediate_values, default=0))


# --- a study and the notebook -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NotebookRow:
    """One result of the notebook, and the trial that repeats it."""

    source: str  # the notebook's table
    label: str  # as the notebook printed it
    rate: float | None  # the dropout rate that it ran with; None without dropout layers
    notebook: float
    trial: int | None  # None: no complete trial repeats it yet
    epochs: int | None  # of that trial; the notebook's had 20
    limit: int | None  # training images of the study, if it has fewer than all 60,000, which the notebook had
    ours: float | None  # after the last epoch for its conclusions, of the best one for its sweeps: as the notebook did
    interval: Interval | None  # of our accuracy less the notebook's, from sampling alone

    @property
    def difference(self) -> float | None:
        """Our accuracy less the notebook's."""
        return None if self.ours is None else self.ours - self.notebook

    @property
    def agrees(self) -> bool | None:
        """Whether the number of test images alone explains the difference. Another seed would add to it."""
        return None if self.interval is None else self.interval.low <= 0.0 <= self.interval.high


def compare_notebook(name: str, storage: StorageLike = None) -> list[NotebookRow]:
    """The notebook's results that study `name` repeats, each beside its own, measured as the notebook measured.

    >>> studies.compare_notebook("digits")
    Traceback (most recent call last):
    studies.errors.StudyError: study 'digits' repeats no results of the notebook as they ran: ...

    Raises StudyError if there is no such study, or it repeats nothing of the notebook as it ran.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    definition = definitions.from_json(study.definition)
    if definition.budget.repeats > 1:
        raise StudyError(
            f"study {name!r} trains each configuration {definition.budget.repeats} times (budget.repeats), and the "
            "notebook trained each once: compare a study without repeats"
        )
    rows = notebook.reference_results(definition)
    if not rows or notebook.is_labelled(rows):
        raise StudyError(
            f"study {name!r} repeats no results of the notebook as they ran: name two studies, or one made from "
            f"{', '.join(notebook.AS_RUN)}"
        )
    complete = opened.get_all_trials(study.id, deepcopy=False, states=(TrialState.COMPLETE,))
    by_params: dict[tuple[Any, ...], FrozenTrial] = {}
    for trial in notebook.trained(complete):
        by_params.setdefault(tuple(sorted(trial.params.items())), trial)
    limit = definition.data.limit
    return [_notebook_row(result, by_params.get(tuple(sorted(point.items()))), limit) for point, result in rows]


def _notebook_row(result: notebook.Result, trial: FrozenTrial | None, limit: int | None) -> NotebookRow:
    ours = None if trial is None else notebook.measured(result, trial)
    rate = result.dense_dropout if result.source == "sweep of depth 3" else result.conv_dropout
    return NotebookRow(
        source=result.source,
        label=result.label,
        rate=rate,
        notebook=result.accuracy,
        trial=None if trial is None else trial.number,
        epochs=None if trial is None else _epochs(trial),
        limit=limit,
        ours=ours,
        interval=None
        if ours is None
        else statistics.difference_of_two(ours, result.accuracy, NOTEBOOK_IMAGES, NOTEBOOK_IMAGES),
    )
