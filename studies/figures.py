"""The figures of a study by kind, for the report, the dashboard and Jupyter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from storage import settings
from storage.artifact_store import ArtifactStore
from studies import (
    answer_figures,
    confirmation,
    findings,
    notebook,
    notebook_figures,
    registry,
    results,
    search_figures,
    space_figures,
)
from studies.confirmation import Confirmed
from studies.confirmation_figure import confirmed_estimates
from studies.definition import Definition, from_json
from studies.errors import StudyError, require_whole
from studies.predictions import Answered, class_names, of_trial
from studies.registry import StorageLike
from studies.results import Curve

CURVES = 5  # trials in the figure of learning curves
LOOKED_AT = 20  # of the best trials, for one whose predictions are on this machine


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What figures are drawn of."""

    trials: Sequence[FrozenTrial]
    definition: Definition
    curves: Sequence[Curve] = ()
    replays: Sequence[notebook.Replay] = ()
    confirmed: Confirmed | None = None
    answered: Answered | None = None


def _of_answers(draw: Callable[[Answered], go.Figure | None]) -> Callable[[Subject], go.Figure | None]:
    return lambda subject: None if subject.answered is None else draw(subject.answered)


_DRAW: Mapping[str, Callable[[Subject], go.Figure | None]] = {
    "confirmed": lambda subject: confirmed_estimates(subject.confirmed),
    "learning-curves": lambda subject: search_figures.learning_curves(subject.curves, subject.definition),
    "confusion": _of_answers(answer_figures.confusion),
    "classes": _of_answers(answer_figures.accuracy_by_class),
    "mistakes": _of_answers(answer_figures.mistakes),
    "dropout": lambda subject: search_figures.against_hyperparameter(subject.trials, subject.definition),
    "hyperparameters": lambda subject: space_figures.hyperparameters(subject.trials, subject.definition),
    "parallel": lambda subject: space_figures.parallel(subject.trials, subject.definition),
    "cost": lambda subject: search_figures.against_cost(subject.trials, subject.definition),
    "progress": lambda subject: search_figures.best_so_far(subject.trials, subject.definition),
    "notebook": lambda subject: (
        notebook_figures.notebook_comparison(subject.trials, subject.definition)
        or notebook_figures.replay_comparison(subject.replays)
    ),
    "samples": _of_answers(answer_figures.samples),
}
KINDS = tuple(_DRAW)
OF_A_TRIAL = ("learning-curves", "confusion", "classes", "mistakes", "samples")


def all_figures(subject: Subject, kinds: Sequence[str] = KINDS) -> dict[str, go.Figure]:
    """The figures of these kinds that have data; a kind is a valid HTML id."""
    figures = {kind: _DRAW[kind](subject) for kind in kinds}
    return {kind: figure for kind, figure in figures.items() if figure is not None}


def figure(
    name: str, kind: str, trial: int | None = None, storage: StorageLike = None, artifacts: str | Path | None = None
) -> go.Figure:
    """A figure of study `name` as a `plotly.graph_objects.Figure`, which Jupyter shows.

    `kind` is one of `studies.figures.KINDS`: "confirmed", "learning-curves", "confusion", "classes", "mistakes",
    "dropout", "hyperparameters", "parallel", "cost", "progress", "notebook" or "samples". `trial` is the number of the
    trial whose curves or answers are drawn, by default the best. Files are read from `artifacts`, a folder or the URL
    of an object store, by default that of the settings.

    >>> studies.figure("digits", "confusion").layout.title.text
    'Confusion matrix of trial ..., validation images'

    Raises StudyError if there is no such study, kind or trial, or nothing to draw.
    """
    if kind not in KINDS:
        raise StudyError(f"there is no figure of the kind {kind!r}: choose one of {', '.join(KINDS)}")
    if trial is not None and kind not in OF_A_TRIAL:
        raise StudyError(f"the figure {kind!r} is of the whole study: leave the trial out, or choose {OF_A_TRIAL}")
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    trials = opened.get_all_trials(study.id, deepcopy=False)
    store = settings.load(artifacts=artifacts).artifact_store
    chosen = trials if trial is None else _numbered(trials, trial, name)
    definition = from_json(study.definition)
    subject = Subject(
        trials=trials,
        definition=definition,
        curves=results.curves_of(chosen, store, CURVES),
        replays=notebook.replays(definition, opened) if kind == "notebook" else (),
        confirmed=confirmation.last_of(study, opened) if kind == "confirmed" else None,
        answered=best_answers(chosen, store, class_names(study.data)),
    )
    drawn = _DRAW[kind](subject)
    if drawn is None:
        raise StudyError(f"study {name!r} has nothing to draw as {kind!r}{_why_nothing(kind, trial, subject.answered)}")
    return drawn


def _why_nothing(kind: str, trial: int | None, answered: Answered | None) -> str:
    if answered is not None and kind == "mistakes":
        return f": the model of trial {answered.trial} made no mistake on these images"
    if answered is not None and kind == "confusion":
        return f": it has more than {answer_figures.MOST_CLASSES} classes, and no matrix of so many can be read"
    of_trial = "" if trial is None else f" of trial {trial}"
    return (
        f"{of_trial} yet: it needs finished trials, and those that are drawn of a model need its files, which the best "
        "trials keep on the machine that trained them"
    )


def _numbered(trials: Sequence[FrozenTrial], number: int, name: str) -> list[FrozenTrial]:
    require_whole("trial", number)
    if not 0 <= number < len(trials):
        raise StudyError(f"study {name!r} has no trial {number}: it has the trials 0 to {len(trials) - 1}")
    return [trials[number]]


def best_answers(
    trials: Sequence[FrozenTrial], artifacts: ArtifactStore | Path, names: Sequence[str] = ()
) -> Answered | None:
    """The answers of the best model whose file is on this machine; None if it has none of the best."""
    for trial in findings.ranked(trials)[:LOOKED_AT]:
        found = of_trial(trial, artifacts)
        if found is not None:
            return Answered(trial=trial.number, predictions=found, class_names=names)
    return None
