"""What a report and a note say about a study, as data. `studies.text` renders it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage import attributes, hits
from storage.errors import many
from storage.ledger import Counts, State, Study
from storage.transactions import read
from studies import confirmation, findings, notebook, registry, results
from studies.confirmation import Confirmed
from studies.definition import Definition, from_json
from studies.findings import Findings
from studies.predictions import class_names
from studies.registry import StorageLike
from studies.results import Row
from studies.wording import names_text


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a report says, before it is rendered."""

    definition: Definition
    counts: Counts  # of the trials by state
    budget: int  # trials
    state: State
    has_ended: bool  # nothing is left to run: also where the hours are over
    findings: Findings
    failures: tuple[str, ...]  # why trials failed, the most frequent reason first, each with its number of trials
    environment: Mapping[str, str]  # what the trials ran on: different values with their numbers of trials
    trials: Sequence[FrozenTrial]
    rows: Sequence[Row] = ()  # complete trials, best first; a note has none
    confirmed: Confirmed | None = None  # the last confirmation of the study, or the study itself if it is one
    class_names: Sequence[str] = ()  # of the images; none if the data have only numbers
    replays: Sequence[notebook.Replay] = ()  # for the study that has the notebook's own results
    made: datetime


def collect(name: str, storage: StorageLike = None) -> Content:
    """The content of a report of study `name`. Raises StudyError if there is no such study."""
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    content = of_trials(study, opened.get_all_trials(study.id, deepcopy=False), opened)
    return replace(
        content,
        rows=results.leaderboard(name, opened),
        confirmed=confirmation.last_of(study, opened),
        replays=notebook.replays(content.definition, opened),
    )


def of_trials(study: Study, trials: Sequence[FrozenTrial], storage: RDBStorage) -> Content:
    """The content of a note of `study`, whose `trials` have been read already."""
    definition = from_json(study.definition)
    best = [trial._trial_id for trial in findings.ranked(trials)[: findings.NEAR + 1]]
    hits_of_best = read(storage, lambda connection: hits.of_trials(connection, best))
    states = Counter(trial.state for trial in trials)
    return Content(
        definition=definition,
        counts=Counts(
            complete=states[TrialState.COMPLETE],
            pruned=states[TrialState.PRUNED],
            failed=states[TrialState.FAIL],
            running=states[TrialState.RUNNING],
            waiting=states[TrialState.WAITING],
        ),
        budget=study.budget.total,
        state=study.state,
        has_ended=study.has_ended,
        findings=findings.findings(trials, definition, study.data, hits_of_best),
        failures=_failures(trials),
        class_names=class_names(study.data),
        environment=_environment(trials, definition, study.data),
        trials=trials,
        made=datetime.now().astimezone(),
    )


def _failures(trials: Sequence[FrozenTrial]) -> tuple[str, ...]:
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    reasons = (attributes.failure(trial.user_attrs.get("failure")) for trial in failed)
    counted = Counter(f"{reason['kind']}: {reason['message']}" for reason in reasons)
    return tuple(f"{reason} ({count})" for reason, count in counted.most_common(20))


def _environment(trials: Sequence[FrozenTrial], definition: Definition, data: Mapping[str, Any]) -> dict[str, str]:
    images = ", ".join(
        f"{data[key]:,} {key}" for key in ("train", "validation", "test") if isinstance(data.get(key), int)
    )
    fingerprint = data.get("fingerprint", "unknown")
    environment = {"images": f"{definition.dataset}: {images or 'unknown'}; fingerprint {fingerprint}"}
    if names := class_names(data):
        environment["classes"] = names_text(names, limit=100)
    for key, title in (("device", "device"), ("precision", "precision"), ("precision_reason", "why that precision")):
        environment[title] = _with_counts(trial.user_attrs[key] for trial in trials if key in trial.user_attrs)
    versions: dict[str, list[str]] = {}
    for trial in trials:
        of_trial = trial.user_attrs.get("versions")
        for package, number in (of_trial if isinstance(of_trial, dict) else {}).items():
            versions.setdefault(str(package), []).append(str(number))
    environment |= {package: _with_counts(numbers) for package, numbers in sorted(versions.items())}
    return {key: value for key, value in environment.items() if value}


def _with_counts(values: Iterable[Any]) -> str:
    """The different values, with how often each occurs if there are several."""
    counted = Counter(map(str, values))
    if len(counted) <= 1:
        return next(iter(counted), "")
    return ", ".join(f"{value} ({many(count, 'trial')})" for value, count in counted.most_common())
