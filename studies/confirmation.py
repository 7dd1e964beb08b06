"""The honest estimate of a study's best configurations: trained again from several seeds, judged by the test images.

The best of many trials is also the luckiest: its validation accuracy promises too much. A confirmation trains the best
configurations, the *candidates*, again: each from the same seeds, for the number of epochs that validation chose. A
seed decides the initial weights, the order of the images, the dropout, and the split into training and validation
images. The test images judge each training once, after its last epoch. It is a study of its own (`Definition.confirm`),
whose trials are run as all others are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage import attributes, hits, ledger, openings
from storage.errors import many
from storage.hits import Hits
from storage.ledger import Study
from storage.ranking import is_scored
from storage.transactions import read
from studies import definition as definitions
from studies import findings, registry, results, statistics
from studies.definition import Candidate, Definition
from studies.errors import StudyError, require_whole
from studies.registry import StorageLike
from studies.space import is_whole, key_of
from studies.statistics import MIN_SEEDS, Interval

TOP = 3  # candidates, unless another number is asked for
SEEDS = 8  # with two comparisons, Holm's correction needs 7 seeds for p < 0.05
MOST = 1000  # candidates, and seeds
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a confirmation says of one candidate. Accuracies are those on the test images."""

    trial: int  # its number in the study that is confirmed
    hyperparameters: Mapping[str, Any]
    epochs: int
    parameters: int | None  # weights
    seconds: float | None  # of a training, on average
    searched: float | None  # its accuracy in the search, on the validation images
    accuracies: tuple[float, ...]  # one for each seed; none while nothing is trained
    mean: float | None
    deviation: float | None  # standard deviation over the seeds
    of_mean: Interval | None  # the mean over all possible seeds (see `studies.statistics`)
    of_one_model: Interval | None  # the sampling error of one model of this accuracy: Wilson
    of_new_seed: Interval | None  # where a training with another seed will be

    @property
    def shrinkage(self) -> float | None:
        """By how much the search promised too much: its validation accuracy less the mean test accuracy."""
        return None if self.searched is None or self.mean is None else self.searched - self.mean


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first candidate with another one, paired by seed and image."""

    first: int  # trials of the study that is confirmed
    other: int
    seeds: int  # that both were trained from
    difference: float  # of the mean accuracies
    interval: Interval | None  # over new seeds and new images
    better: float  # how often the first is better with the same seed; a tie counts half
    p: float | None  # of the sign-flip test; None below MIN_SEEDS
    p_holm: float | None  # corrected for the number of comparisons

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0, and the corrected p is below 0.05."""
        excludes = self.interval is not None and self.interval.low > 0
        return excludes and self.p_holm is not None and self.p_holm < ALPHA


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """The result of a confirmation, as far as it is."""

    study: str  # that is confirmed
    confirmation: str  # the study that trains the candidates
    seeds: int  # of each candidate
    trained: int  # trainings that are complete
    trainings: int  # in all
    images: int | None  # test images
    openings: int  # how often confirmations, of any study that the database has or had, opened these test images
    chosen_by: tuple[str, ...]  # studies of the same data that choose by these test images, as the notebook did
    estimates: tuple[Estimate, ...]  # the highest mean first
    comparisons: tuple[Comparison, ...]  # of the first with each other one
    winner: int | None  # the trial that is better than every other candidate; None: a tie, or not known yet
    tied: tuple[int, ...]  # trials that may be as good as the first, the first included; empty if there is a winner
    smallest: int | None  # of the tied: the one with the fewest weights


def confirmed(name: str, storage: StorageLike = None) -> Confirmed:
    """The last confirmation of study `name`.

    >>> found = studies.confirmed("digits")
    >>> found.trained, [estimate.trial for estimate in found.estimates]
    (2, [1])
    >>> found.winner is None
    True

    Raises StudyError if there is no such study, or it was never confirmed (`search.confirm` does that).
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    found = last_of(study, opened)
    if found is None:
        raise StudyError(f"study {name!r} was not confirmed yet: `trialyard confirm {name}` does it")
    return found


def last_of(study: Study, storage: RDBStorage) -> Confirmed | None:
    """The last confirmation of `study`, if there is one; of a study that is a confirmation, its own result."""
    if study.definition.get("confirm") is not None:
        return of_study(study, storage)
    own = confirmations(study, storage)
    return of_study(own[-1], storage) if own else None


def confirmations(study: Study, storage: RDBStorage) -> list[Study]:
    """The studies that confirm `study`, the oldest first."""
    return [
        other
        for other, definition in registry.with_definitions(storage)
        if definition.confirm is not None and definition.confirm.incarnation == study.incarnation
    ]


# --- which candidates, and the study that trains them ------------------------------------------------------


def definition_of(study: Study, storage: RDBStorage, top: int | None, seeds: int) -> Definition:
    """The definition that confirms the `top` best configurations of `study` with so many `seeds`; None means TOP.

    If a confirmation with these candidates and seeds exists, it is that one's. Raises StudyError.
    """
    definition = definitions.from_json(study.definition)
    _check(study, definition, top, seeds)
    found = _candidates(study, storage, definition)
    if not found:
        results.best_trial_of(study, storage)  # which says why there is none
        raise StudyError(
            f"no complete trial of study {study.name!r} has exactly the hyperparameters that it searches, so none "
            "can be trained again: other programs added them"
        )
    if top is not None and top > len(found):
        raise StudyError(
            f"study {study.name!r} has {many(len(found), 'complete configuration')}, and {many(top, 'candidate')} were "
            "asked for: ask for fewer with --top, or search further"
        )
    chosen = found[: top or TOP]
    numbers = [candidate.trial for candidate in chosen]
    confirm = {
        "study": study.name,
        "incarnation": study.incarnation,
        "candidates": [candidate.model_dump(mode="json") for candidate in chosen],
    }
    stored = definition.to_json() | {
        "description": f"The best of {study.name}, trained again from {seeds} seeds and judged by the test images",
        "budget": {"epochs": max(candidate.epochs for candidate in chosen)},
        # The seeds come first, so that a confirmation that is cut off has pairs.
        "space": {"seed": {"choices": list(range(1, seeds + 1))}, "candidate": {"choices": numbers}},
        "sampler": {"kind": "grid", "seed": definition.sampler.seed},
        "pruner": {},
        "points": [],
        "confirm": confirm,
    }
    same = [other for other in confirmations(study, storage) if _is_same(other, stored)]
    name = same[0].name if same else _free_name(study, storage)
    return definitions.from_json(stored | {"name": name})


def create(study: Study, storage: RDBStorage, top: int | None, seeds: int, data: dict[str, Any]) -> Study:
    """Creates the study that confirms `study`, and counts that it opens the test images; or finds it, if it exists.

    `data` describes the images, as for `registry.create`. Raises StudyError.
    """
    while True:
        definition = definition_of(study, storage, top, seeds)
        try:
            return registry.create(definition, storage, data, opens_tests_of=study.name).study
        except StudyError:
            # Another confirmation may have taken this free name in the same moment; then there is a next one.
            if definition_of(study, storage, top, seeds).name == definition.name:
                raise


def _check(study: Study, definition: Definition, top: int | None, seeds: int) -> None:
    name = study.name
    for option, value in (("--top", top), ("--seeds", seeds)):
        if value is None:
            continue
        require_whole(option, value)
        if not 1 <= value <= MOST:
            raise StudyError(f"{option} = {value}: it must be from 1 to {MOST}")
    if definition.confirm is not None:
        raise StudyError(f"study {name!r} is a confirmation itself: confirm {definition.confirm.study} again")
    if definition.protocol == "test":
        raise StudyError(
            f"study {name!r} has chosen by the test images, as the notebook did, so they cannot confirm its choice: "
            "search with a share of the training images as data.validation"
        )
    if not study.has_ended:
        raise StudyError(
            f"study {name!r} has not ended ({study.finished} of {many(study.budget.total, 'trial')}): "
            f"`trialyard work {name}` finishes it, or `trialyard stop {name}` ends it now"
        )


def _candidates(study: Study, storage: RDBStorage, definition: Definition) -> list[Candidate]:
    """Every configuration that a complete trial has, the best first; of equal ones the best trial."""
    complete = storage.get_all_trials(study.id, deepcopy=False, states=(TrialState.COMPLETE,))
    by_configuration: dict[str, FrozenTrial] = {}
    for trial in findings.ranked(complete):
        if not is_whole(trial.params, definition.space):
            continue  # another program added it, and does not say all
        by_configuration.setdefault(key_of(trial.params), trial)
    return [
        Candidate(
            trial=trial.number,
            # An imported trial does not say which epoch was its best.
            epochs=_epochs(trial, definition.budget.epochs),
            schedule_epochs=_schedule_epochs(trial, definition),
            hyperparameters=trial.params,
        )
        for trial in by_configuration.values()
    ]


def _schedule_epochs(trial: FrozenTrial, definition: Definition) -> int | None:
    given = {**definition.fixed, **trial.params}
    warmup, most = attributes.number(given.get("warmup_epochs")) or 0, definition.budget.epochs
    chosen = _epochs(trial, most)
    # A constant rate depends on the number of epochs only where the training ends within its warm-up.
    is_same = given.get("schedule", "constant") == "constant" and (warmup <= chosen or chosen == most)
    return None if is_same else most


def _epochs(trial: FrozenTrial, most: int) -> int:
    best = attributes.number(trial.user_attrs.get("best_epoch"))
    return most if best is None or not 1 <= best <= most else int(best)


def _is_same(other: Study, stored: Mapping[str, Any]) -> bool:
    left, right = other.definition["confirm"]["candidates"], stored["confirm"]["candidates"]
    return bool(left == right and other.definition["space"]["seed"]["choices"] == stored["space"]["seed"]["choices"])


def _free_name(study: Study, storage: RDBStorage) -> str:
    # Other programs may have studies in the same database.
    taken, base = optuna.get_all_study_names(storage), f"{study.name[:88]}-confirm"
    names = (base if number == 1 else f"{base}-{number}" for number in range(1, 10_000))
    return next(name for name in names if name not in taken)


# --- the result ---------------------------------------------------------------------------------------------


def of_study(confirmation: Study, storage: RDBStorage) -> Confirmed:
    """The result of the study `confirmation`, as far as it is. Also after the study that it confirms was deleted."""
    definition = definitions.from_json(confirmation.definition)
    assert definition.confirm is not None
    complete = storage.get_all_trials(confirmation.id, deepcopy=False, states=(TrialState.COMPLETE,))
    scored = [trial for trial in complete if is_scored(trial)]
    candidates = definition.confirm.candidates
    runs, searched = _runs(candidates, scored, storage), _searched(definition, storage)
    estimates = [_estimate(each, runs[each.trial], searched.get(each.trial)) for each in candidates]
    # A stable sort: equal ones stay in the order of the search.
    estimates.sort(key=lambda each: -(each.mean if each.mean is not None else -1.0))
    order = [each.trial for each in estimates if each.mean is not None]
    compared = comparisons(order, runs)
    winner, tied = verdict(order, compared) if confirmation.has_ended and scored else (None, ())
    known = [each for each in estimates if each.trial in tied and each.parameters is not None]
    by_size = sorted(known, key=lambda each: each.parameters or 0)
    return Confirmed(
        study=definition.confirm.study,
        confirmation=confirmation.name,
        seeds=len(definition.space["seed"].points() or ()),
        trained=sum(map(len, runs.values())),
        trainings=definition.trials,
        images=next((run.hits.images for side in runs.values() for run in side.values() if run.hits), None),
        openings=_openings(confirmation, storage),
        chosen_by=_chosen_by(confirmation, storage),
        estimates=tuple(estimates),
        comparisons=tuple(compared),
        winner=winner,
        tied=tied,
        smallest=by_size[0].trial if by_size else None,
    )


def _openings(confirmation: Study, storage: RDBStorage) -> int:
    # Whoever searches again after a confirmation does so under another name, and may have chosen by what it showed.
    return max(1, openings.count(storage, str(confirmation.data.get("fingerprint"))))


def _chosen_by(confirmation: Study, storage: RDBStorage) -> tuple[str, ...]:
    fingerprint = confirmation.data.get("fingerprint")
    return tuple(
        study.name
        for study, definition in registry.with_definitions(storage)
        if definition.protocol == "test" and study.finished and study.data.get("fingerprint") == fingerprint
    )


def _searched(definition: Definition, storage: RDBStorage) -> dict[int, float]:
    """The validation accuracies of the candidates in the search; empty if the study is gone."""
    assert definition.confirm is not None
    incarnation = definition.confirm.incarnation
    study = next((study for study in ledger.studies(storage) if study.incarnation == incarnation), None)
    if study is None:
        return {}
    numbers = {candidate.trial for candidate in definition.confirm.candidates}
    complete = storage.get_all_trials(study.id, deepcopy=False, states=(TrialState.COMPLETE,))
    return {trial.number: float(trial.values[0]) for trial in complete if trial.number in numbers and is_scored(trial)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a candidate from one seed."""

    accuracy: float  # on the test images
    hits: Hits | None = None
    parameters: int | None = None
    seconds: float | None = None


Runs = Mapping[int, Mapping[int, Run]]  # by candidate, then by seed


def _runs(candidates: Sequence[Candidate], trials: Sequence[FrozenTrial], storage: RDBStorage) -> Runs:
    measured = read(storage, lambda connection: hits.of_trials(connection, [trial._trial_id for trial in trials]))
    runs: dict[int, dict[int, Run]] = {candidate.trial: {} for candidate in candidates}
    for trial in trials:
        candidate, seed = trial.params.get("candidate"), trial.params.get("seed")
        if candidate not in runs or seed is None or trial.user_attrs.get("imported"):
            continue  # another program added it
        weights = attributes.number(trial.user_attrs.get("parameters"))
        runs[candidate][seed] = Run(
            accuracy=float(trial.values[0]),
            hits=measured.get(trial._trial_id),
            parameters=None if weights is None else int(weights),
            seconds=attributes.number(trial.user_attrs.get("seconds")),
        )
    return runs


def _estimate(candidate: Candidate, runs: Mapping[int, Run], searched: float | None) -> Estimate:
    own = [runs[seed] for seed in sorted(runs)]
    accuracies = tuple(run.accuracy for run in own)
    mean = float(np.mean(accuracies)) if accuracies else None
    images = next((run.hits.images for run in own if run.hits is not None), None)
    seconds = [run.seconds for run in own if run.seconds is not None]
    return Estimate(
        trial=candidate.trial,
        hyperparameters=candidate.hyperparameters,
        epochs=candidate.epochs,
        parameters=next((run.parameters for run in own if run.parameters is not None), None),
        seconds=float(np.mean(seconds)) if seconds else None,
        searched=searched,
        accuracies=accuracies,
        mean=mean,
        deviation=float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        of_mean=statistics.of_mean(accuracies),
        of_one_model=None if mean is None or not images else statistics.wilson(round(mean * images), images),
        of_new_seed=statistics.of_new_seed(accuracies),
    )


def comparisons(order: Sequence[int], runs: Runs) -> list[Comparison]:
    """The first candidate of `order` with each other one, over the seeds that both have."""
    found: list[Comparison] = []
    for first, other in ((order[0], other) for other in order[1:]):
        seeds = sorted(runs[first].keys() & runs[other].keys())
        if not seeds:
            continue
        ours, theirs = ([runs[number][seed] for seed in seeds] for number in (first, other))
        values = [[run.accuracy for run in side] for side in (ours, theirs)]
        found.append(
            Comparison(
                first=first,
                other=other,
                seeds=len(seeds),
                difference=float(np.mean(values[0]) - np.mean(values[1])),
                interval=_interval(ours, theirs),
                better=statistics.probability_better(*values),
                p=statistics.sign_flip_p(*values),
                p_holm=None,
            )
        )
    tested = [comparison.p for comparison in found if comparison.p is not None]
    corrected = iter(statistics.holm(tested))
    return [each if each.p is None else replace(each, p_holm=next(corrected)) for each in found]


def _interval(ours: Sequence[Run], theirs: Sequence[Run]) -> Interval | None:
    """None if the hits of a training are not known, or are of other images."""
    known = [run.hits for run in (*ours, *theirs) if run.hits is not None]
    same_images = len({(each.fingerprint, each.images) for each in known}) == 1
    if len(known) < len(ours) + len(theirs) or not same_images:
        return None
    arrays = [each.array() for each in known]
    return statistics.difference(np.stack(arrays[: len(ours)]), np.stack(arrays[len(ours) :]))


def verdict(order: Sequence[int], compared: Sequence[Comparison]) -> tuple[int | None, tuple[int, ...]]:
    """The winner, or those that are tied; neither where there is nothing to compare.

    A winner is better than *every* other candidate. The rule finds one among equal candidates in at most 5 % of the
    confirmations (tests/test_simulations.py).
    """
    if len(order) < 2:
        return None, ()
    worse = {comparison.other for comparison in compared if comparison.is_significant}
    tied = tuple(number for number in order if number not in worse)
    return (order[0], ()) if len(tied) == 1 else (None, tied)


__all__ = ["MIN_SEEDS", "SEEDS", "TOP", "Comparison", "Confirmed", "Estimate", "confirmed"]
