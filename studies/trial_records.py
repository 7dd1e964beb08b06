"""Every trial of a study as a record, whatever became of it, and all that is known of one. Only reads."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage import attributes, settings
from storage.artifact_store import ArtifactStore, ObjectFile
from storage.artifacts import ALL, attempt_folder, inside
from storage.attempt_table import Attempt, last_of_unfinished, of_trial
from storage.errors import nearest
from storage.ledger import Study
from storage.metric import JudgedOn, epochs_judged_on, judged_on, protocol_of
from storage.ranking import is_feasible, is_scored, ranked
from storage.settings import Settings
from storage.transactions import read
from studies import registry
from studies.errors import StudyError, require_whole
from studies.registry import StorageLike
from studies.results import Curve, curve_of, trial_of
from studies.statistics import sampling_error

if TYPE_CHECKING:
    import pandas

State = Literal["complete", "imported", "pruned", "failed", "running", "waiting"]

_FIELDS = ("number", "state", "rank", "score", "error", "epochs", "seconds")  # columns of a table, before the others

LOG_LINES = 10  # of a trial's log that are shown
LOG_BYTES = 1_000_000  # of a log file that are searched, from its end
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study, in whatever state."""

    number: int
    state: State
    rank: int | None  # of a complete and feasible trial; trials of equal score share it (1, 1, 3)
    # Accuracy from 0 to 1 that it is judged by; of an unfinished or pruned trial the last one, or the repeats' mean.
    score: float | None
    # The score's sampling error: half of its 95 % interval. None for an unknown number of images, and for the mean of
    # several repeats, whose error is another one.
    error: float | None
    epochs: int | None  # that were trained
    seconds: float | None  # of training, without the start
    params: dict[str, Any]  # of a trial that waits, those that it was enqueued with: the sampler gives the others
    reason: str | None  # why it failed, was pruned or waits again; where it runs

    @property
    def score_text(self) -> str:
        """The score with the digits that its sampling error supports, such as "0.986 ± 0.014"; "" without a score."""
        if self.score is None:
            return ""
        if self.error is None or self.error <= 0:
            return f"{self.score:.4f}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.score:.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class TrialDetails:
    """All that is known of one trial."""

    study: str
    record: TrialRecord
    attempts: tuple[Attempt, ...]  # the first one first
    curve: Curve
    attributes: dict[str, Any]  # what was recorded of its training: device, precision, seed, versions and more
    log: tuple[str, ...]  # the end of what its trainer printed, if this machine has the file
    files: tuple[Path | ObjectFile, ...]  # those on this machine, or in the object store

    def to_json(self) -> dict[str, Any]:
        """The same as JSON; times are in UTC."""
        attempts = [asdict(attempt) for attempt in self.attempts]
        for attempt in attempts:
            for name in ("began", "beat", "ended"):
                moment = attempt[name]
                attempt[name] = moment and moment.replace(tzinfo=UTC).isoformat(timespec="seconds")
        return {
            "study": self.study,
            **asdict(self.record),
            "attempts": attempts,
            "curve": {name: getattr(self.curve, name) for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
            "attributes": self.attributes,
            "log": self.log,
            "files": [str(path) for path in self.files],
        }


def trials(
    name: str, storage: StorageLike = None, *, state: State | None = None, limit: int | None = None
) -> list[TrialRecord]:
    """All trials of study `name`, by number: complete, imported, pruned, failed, running and waiting ones.

    `state` chooses those in one state; `limit` the last ones of them.

    >>> [(trial.number, trial.state) for trial in studies.trials("digits", state="complete")]
    [(0, 'complete'), (1, 'complete')]

    Raises StudyError if there is no such study.
    """
    if state is not None and state not in get_args(State):
        known = get_args(State)
        raise StudyError(f"state = {state!r} must be one of {', '.join(known)}{nearest(str(state), known)}")
    if limit is not None:
        require_whole("limit", limit)
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    found = opened.get_all_trials(study.id, deepcopy=False)
    records = [record for record in _records(study, found, opened) if state in (None, record.state)]
    return records if limit is None else records[len(records) - min(limit, len(records)) :]


def trial(name: str, number: int, storage: StorageLike = None, artifacts: str | Path | None = None) -> TrialDetails:
    """All that is known of trial `number` of study `name`: its attempts, curve, files, and the end of its log.

    Files and logs are those of this machine; other machines may have more. Files are looked for in
    `artifacts`, a folder or the URL of an object store, by default that of the settings.

    >>> details = studies.trial("digits", 0)
    >>> details.record.state, len(details.attempts), len(details.curve.val_accuracy)
    ('complete', 1, 1)

    Raises StudyError if there is no such study or trial.
    """
    opened, here = registry.storage_of(storage), settings.load(artifacts=artifacts)
    store = here.artifact_store
    study = registry.find(name, opened)
    found = trial_of(study, number, opened)
    attempts = read(opened, lambda connection: of_trial(connection, found._trial_id))
    (record,) = _records(study, [found], opened)
    return TrialDetails(
        study=name,
        record=record,
        attempts=tuple(attempts),
        curve=curve_of(found, store),
        attributes=found.user_attrs,
        log=_log(study, number, attempts[-1], here) if attempts else (),
        files=_files(study, found, attempts, store),
    )


def best_so_far(name: str, storage: StorageLike = None) -> list[float]:
    """The highest score among the complete and feasible trials of study `name` up to each of them, by number.

    Raises StudyError if there is no such study.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    trials = read(opened, lambda connection: ranked(connection, study.id))
    return list(accumulate((trial.value for trial in sorted(trials, key=lambda trial: trial.number)), max))


def dataframe(name: str, storage: StorageLike = None) -> "pandas.DataFrame":
    """All trials of study `name` as a table of pandas: a row a trial, and a column ``params_<name>`` a hyperparameter.

    >>> table = studies.dataframe("digits")
    >>> table[table.state == "complete"].number.tolist()
    [0, 1]

    Raises StudyError if there is no such study, or pandas is not installed.
    """
    records = trials(name, storage)
    try:
        import pandas
    except ImportError:
        raise StudyError(
            "studies.dataframe needs pandas, which is not installed: `pip install pandas`, or use studies.trials"
        ) from None
    return pandas.DataFrame(flat(records), columns=columns(records))


def flat(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """A row for each record, all with the same columns. A hyperparameter that a trial does not have is None.

    >>> flat([])
    []
    """
    names = _params_of(records)
    return [
        {field: getattr(record, field) for field in _FIELDS}
        | {f"params_{name}": record.params.get(name) for name in names}
        | {"reason": record.reason}
        for record in records
    ]


def columns(records: Sequence[TrialRecord]) -> list[str]:
    """The columns of `flat`, also where there is no row.

    >>> columns([])
    ['number', 'state', 'rank', 'score', 'error', 'epochs', 'seconds', 'reason']
    """
    return [*_FIELDS, *(f"params_{name}" for name in _params_of(records)), "reason"]


def _params_of(records: Sequence[TrialRecord]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.params))


def _records(study: Study, found: Sequence[FrozenTrial], storage: RDBStorage) -> list[TrialRecord]:
    ranks = {trial.trial_id: trial.rank for trial in read(storage, lambda connection: ranked(connection, study.id))}
    last = read(storage, lambda connection: last_of_unfinished(connection, study.id))
    of_values, of_epochs = _images(study, judged_on), _images(study, epochs_judged_on)
    return [
        _record(
            trial, ranks.get(trial._trial_id), last.get(trial._trial_id), of_values if is_scored(trial) else of_epochs
        )
        for trial in sorted(found, key=lambda trial: trial.number)
    ]


def _images(study: Study, kind: Callable[[object], JudgedOn]) -> int | None:
    """How many images judge the trials that Trialyard ran, or their epochs; None where it is not recorded."""
    images = attributes.number(study.data.get(kind(protocol_of(study.definition))))
    return int(images) if images else None


def _record(trial: FrozenTrial, rank: int | None, last: Attempt | None, images: int | None) -> TrialRecord:
    attrs, state = trial.user_attrs, _STATES[trial.state]
    if state == "complete" and attrs.get("imported") is True:
        state = "imported"
    score = float(trial.values[0]) if is_scored(trial) else _last_score(trial)
    was_measured_once = state != "imported" and len(attributes.numbers(attrs.get("repeats"))) < 2
    is_known = score is not None and 0.0 <= score <= 1.0 and images is not None and was_measured_once
    epochs = attributes.number(attrs.get("epochs"))
    if epochs is None and last is not None:
        epochs = last.epoch
    elif epochs is None and "repeats" not in attrs:
        epochs = trial.last_step
    return TrialRecord(
        number=trial.number,
        state=state,
        rank=rank,
        score=score,
        error=sampling_error(score, images) if is_known and score is not None and images is not None else None,
        epochs=None if epochs is None else int(epochs),
        seconds=attributes.number(attrs.get("seconds")),
        params=trial.params or _enqueued(trial),
        reason=_reason(trial, last),
    )


def _enqueued(trial: FrozenTrial) -> dict[str, Any]:
    """The hyperparameters that a waiting trial will have; other programs may have written anything there."""
    listed = attributes.listed_point(trial) if trial.state == TrialState.WAITING else {}
    return {name: value for name, value in listed.items() if isinstance(value, (str, int, float))}


def _last_score(trial: FrozenTrial) -> float | None:
    mean = attributes.mean_of_repeats(trial)
    if mean is not None or trial.last_step is None:
        return mean
    return attributes.number(trial.intermediate_values[trial.last_step])


def _reason(trial: FrozenTrial, last: Attempt | None) -> str | None:
    if trial.state == TrialState.FAIL:
        failure = attributes.failure(trial.user_attrs.get("failure"))
        return f"{failure['kind']}: {failure['message']}"
    if trial.state == TrialState.PRUNED:
        return "by the pruner" if trial.last_step is None else f"after {attributes.last_step_text(trial)}"
    if trial.state == TrialState.RUNNING:
        return "started outside Trialyard" if last is None else f"on {last.owner.slot} of {last.owner.host}"
    if trial.state == TrialState.WAITING:
        return None if last is None else ": ".join(filter(None, (last.outcome, last.reason)))
    if not is_scored(trial):
        return "its score is not a finite number"
    return None if is_feasible(trial) else "it violates a constraint"


def _files(
    study: Study, trial: FrozenTrial, attempts: Sequence[Attempt], store: ArtifactStore
) -> tuple[Path | ObjectFile, ...]:
    folders = [attempt_folder(study.name, study.incarnation, trial.number, attempt.attempt) for attempt in attempts]
    paths = [folder / name for folder in folders for name in ALL]
    # Those of older versions, and of a copied study, are elsewhere.
    recorded = (inside(Path(), trial.user_attrs.get(key)) for key in ("model", "history"))
    paths += [PurePosixPath(path) for path in recorded if path is not None]
    return tuple(store.existing(list(dict.fromkeys(paths))).values())


def _log(study: Study, number: int, attempt: Attempt, here: Settings) -> tuple[str, ...]:
    """The last lines that the attempt's trainer printed; empty if this machine does not have the file."""
    try:
        with here.trainer_log(attempt.owner.slot, attempt.owner.pid).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return ()
    # One file has the trials of a slot, one after the other.
    begins = [at for at, line in enumerate(lines) if " begins in " in line]
    title = f" {study.name} trial {number} attempt {attempt.attempt} begins in "
    own = [at for at in begins if title in lines[at]]
    if not own:
        return ()
    end = next((at for at in begins if at > own[-1]), len(lines))
    return tuple(lines[own[-1] : end][-LOG_LINES:])
