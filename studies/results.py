"""Results of a study: the best trial and model, the leaderboard, the curves, the status. Only reads the database."""

import importlib
import json
import logging
import math
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Select, and_, select

from storage import artifact_store, attributes, claims, ledger, settings
from storage.artifact_store import ArtifactStore
from storage.artifacts import inside
from storage.attempt_table import Attempt, durations, of_trial, started_outside
from storage.claims import RunningTrial
from storage.errors import error_text, many, named_error, trials_text
from storage.ledger import Study
from storage.metric import protocol_of
from storage.ranking import is_scored, rank_key, ranked
from storage.slots import SlotStatus, present
from storage.tables import IDS_IN_CLAUSE, TrialModel, TrialParamModel, TrialUserAttributeModel
from storage.transactions import read
from studies import model_file, registry
from studies.errors import StudyError, require_whole
from studies.registry import StorageLike
from studies.rows import Leaderboard
from studies.wording import one_line

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

LAST_TRIALS = 50  # whose durations the time left is estimated from
SHOWN_TIES = 10  # trials that are as good as the best one
LEADERBOARD_ATTRIBUTES = ("deviation", "epochs", "parameters", "seconds")  # user attributes that a leaderboard shows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished trial of a leaderboard."""

    rank: int  # from 1; trials of equal value share it (1, 1, 3): the lower loss comes first
    number: int
    value: float  # validation accuracy of its best epoch, 0 to 1; with repeats their mean
    deviation: float | None  # the sample standard deviation of the repeats; None: it was trained once
    params: dict[str, Any]
    epochs: int | None
    parameters: int | None  # weights in the model
    seconds: float | None  # trained, not counting the start
    imported: bool  # it was run elsewhere, and has no model


@dataclass(frozen=True, kw_only=True)
class Status:
    """The progress of a study."""

    study: str
    description: str
    protocol: str  # what trials are judged by: "validation" images, "test" ones as in the notebook, or "confirmation"
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    budget: int  # trials, including imported ones
    state: ledger.State  # open, paused or stopped
    priority: int  # see `studies.set_priority`; 0 is the default
    pause_reason: str | None  # why Trialyard paused it; None: it did not
    ended: bool
    best: float | None  # the best value so far
    best_number: int | None
    trial_seconds: float | None  # the mean time of the last finished trials; None before one has finished
    hours_left: float | None  # until no trial starts any more, 0 if that was before; None: no such limit
    seconds_left: float | None  # estimated from these two and the slots that are free for the study
    workers: tuple[RunningTrial, ...]
    outside: tuple[int, ...]  # numbers of RUNNING trials that no worker started, but for example a `study.ask()`
    failures: tuple[str, ...]  # why trials failed, as "kind: message", each reason once

    @property
    def finished(self) -> int:
        """How many trials count against the budget for good."""
        return self.complete + self.pruned + self.failed


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One trial, epoch by epoch: the n-th entry of each tuple is epoch n. An unknown column is empty.

    Losses are mean cross-entropies, accuracies are from 0 to 1. Either is NaN where a user's own model measured no
    finite value. `loss` and `accuracy` are those of the training images.
    """

    number: int
    state: str  # Optuna's own, in small letters
    value: float | None
    params: dict[str, Any]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    val_loss: tuple[float, ...]
    val_accuracy: tuple[float, ...]  # known also if the trial's files are on another machine: the database has it
    seconds: tuple[float, ...]


def best_trial(name: str, storage: StorageLike = None) -> FrozenTrial:
    """The complete trial with the highest validation accuracy; of equal ones that with the lowest validation loss.

    Pruned and failed trials, and trials that violate a constraint, never win.

    >>> trial = studies.best_trial("digits")
    >>> trial.state.name, sorted(trial.params)
    ('COMPLETE', ['depth', 'dropout'])
    >>> 0 <= trial.value <= 1
    True

    Raises StudyError if there is no such study, or no complete trial yet.
    """
    opened = registry.storage_of(storage)
    return best_trial_of(registry.find(name, opened), opened)


def best_trial_of(study: Study, storage: RDBStorage) -> FrozenTrial:
    """As `best_trial`, for a study that has been read already."""
    best = read(storage, lambda connection: ranked(connection, study.id, top=1))
    if not best:
        raise StudyError(why_no_best(study, storage))
    return storage.get_trial(best[0].trial_id)


def as_good_as_best(name: str, storage: StorageLike = None) -> list[int]:
    """The numbers of the trials of study `name` whose value equals that of its best trial; it is not among them.

    Raises StudyError if there is no such study.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    first = read(opened, lambda connection: ranked(connection, study.id, top=SHOWN_TIES + 1))
    return [trial.number for trial in first[1:] if trial.rank == 1]


def best_with_model(study: Study, storage: RDBStorage) -> FrozenTrial:
    """The best trial that has a model: an imported one, or one that another program added, has none.

    Raises StudyError if there is none.
    """
    best = read(storage, lambda connection: ranked(connection, study.id, top=1, with_model=True))
    # Without one, the error says why the best trial has no model.
    return storage.get_trial(best[0].trial_id) if best else best_trial_of(study, storage)


def with_model(study: Study, storage: RDBStorage, number: int | None = None) -> FrozenTrial:
    """Trial `number` of a study, which must have its model on this machine; None: the best trial that has a model.

    Raises StudyError if there is none; for a `number` it names the trials that have a model here.
    """
    if number is None:
        return best_with_model(study, storage)
    trial, store = trial_of(study, number, storage), settings.load().artifact_store
    if _with_models([trial], store):
        return trial
    complete = storage.get_all_trials(study.id, deepcopy=False, states=(TrialState.COMPLETE,))
    numbers = [other.number for other in _with_models(complete, store)]
    have = "no trial has one" if not numbers else f"{trials_text(numbers)} {'has' if len(numbers) == 1 else 'have'} one"
    raise StudyError(
        f"trial {number} of study {study.name!r} has no model {_where(store)}, and {have}: complete trials keep one "
        "while they are among the best"
    )


def _with_models(trials: Sequence[FrozenTrial], store: ArtifactStore) -> list[FrozenTrial]:
    """Those of `trials` whose models exist."""
    named = {trial.number: trial.user_attrs.get("model") for trial in trials}
    paths = {number: PurePosixPath(path) for number, path in named.items() if inside(Path(), path) and path is not None}
    existing = store.existing(list(paths.values()))
    return [trial for trial in trials if paths.get(trial.number) in existing]


def _where(store: ArtifactStore) -> str:
    return f"in {store.name('')}" if store.is_far else "on this machine"


def why_no_best(study: Study, storage: RDBStorage) -> str:
    """A sentence for people: why the study has no best trial, and what to do."""
    name, counts = study.name, ledger.counts(storage, study.id)
    if counts.complete:
        return (
            f"study {name!r} has {many(counts.complete, 'complete trial')}, and none has a finite score and satisfies "
            f"its constraints: `trialyard trials {name}` says why; loosen the constraints, or search further"
        )
    if study.state == "stopped":
        return (
            f"study {name!r} was stopped before any of its trials was complete: `trialyard resume {name}` opens it, "
            f"and `trialyard work {name}` continues it"
        )
    if study.pause_reason is not None:
        return (
            f"study {name!r} is paused and has no complete trial yet: correct what made its trials fail, then "
            f"`trialyard resume {name}` and `trialyard retry {name}`"
        )
    if study.has_ended:
        return (
            f"study {name!r} has ended without a complete trial ({counts.failed} failed, {counts.pruned} pruned): "
            f"`trialyard status {name}` says why; correct its definition and give it another name"
        )
    return (
        f"study {name!r} has no complete trial yet: `trialyard work {name}` continues it, "
        f"`trialyard status {name}` shows its progress"
    )


def best_model(name: str, storage: StorageLike = None, *, trial: int | None = None) -> "keras.Model":
    """The trained model of the best trial, with the weights of its best epoch, ready to predict.

    A trial without a model, such as an imported one, is passed over. With `trial` it is the model of the trial with
    this number.

    It takes images of (n, height, width, channels) on the scale 0 to 255, and gives class probabilities of
    (n, classes), float32; logits, if the study's own model has a loss of logits. On a processor they are the same, to
    the bit, as at the end of the training. The model is compiled, so that ``model.evaluate(images, labels)`` gives its
    loss and accuracy; the labels are class numbers.

    >>> model = studies.best_model("digits")
    >>> model.predict(np.zeros((5, 28, 28, 1)), verbose=0).shape
    (5, 10)
    >>> len(model.evaluate(np.zeros((5, 28, 28, 1)), np.arange(5), verbose=0))  # loss and accuracy
    2

    It imports Keras. If the study's model is a user's own function, the function's module is imported first, so that
    Keras knows the layers that the module registers.

    Raises StudyError as `best_trial` does, and if there is no such trial, the file is not on this machine, or Keras
    cannot load it.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    chosen = with_model(study, opened, trial)
    path = file_of(study, chosen, "model", opened)
    import keras

    function = str(study.definition["model"])
    registry.fetch_function(function, settings.load().artifact_store)
    import_problem = _import_problem(function.partition(":")[0]) if ":" in function else None
    try:
        return model_file.compiled(keras.models.load_model(path, compile=False), path)
    except (TypeError, ValueError, OSError, ImportError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise StudyError(
            f"the model of trial {chosen.number} of study {name!r}, {path}, cannot be loaded "
            f"({error_text(error)}): "
            + (
                import_problem
                or "if it has layers of your own, decorate each with "
                "@keras.saving.register_keras_serializable() and import their module first, or call "
                "keras.models.load_model(file, custom_objects={...}) yourself"
            )
        ) from error


def _import_problem(module: str) -> str | None:
    """Imports a user's `module`; returns what to do if that fails. A model of Keras's own layers does not need it."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - importing runs a user's code, or loads a file that may be damaged
        reason = named_error(error, 300)
        return f"its layers may be in {module}, which cannot be imported ({reason}); correct that first"
    return None


def class_names(name: str, storage: StorageLike = None) -> list[str] | None:
    """The names of the classes of study `name`, in the order of the model's outputs; None if its data have none.

    >>> studies.class_names("digits") is None
    True

    Raises StudyError if there is no such study.
    """
    from studies.predictions import class_names as recorded

    return recorded(registry.find(name, registry.storage_of(storage)).data) or None


def file_of(study: Study, trial: FrozenTrial, artifact: Literal["model", "history"], storage: RDBStorage) -> Path:
    """The path of the trial's `artifact` on this machine.

    Raises StudyError if neither this machine nor the object store has it, and ObjectStoreError.
    """
    store, below = settings.load().artifact_store, trial.user_attrs.get(artifact)
    named = inside(Path(), below)
    if named is None and artifact == "model" and "model_unsaved" in trial.user_attrs:
        reason = one_line(trial.user_attrs["model_unsaved"], 300)
        raise StudyError(
            f"the model of trial {trial.number} of study {study.name!r} could not be saved ({reason}): correct the "
            "function that builds it, and train these hyperparameters as a point of another study"
        )
    if named is None:
        raise StudyError(
            f"trial {trial.number} of study {study.name!r} has no {artifact}, because Trialyard did not train it: "
            "train its hyperparameters as a point of another study"
        )
    path = store.fetch(below)
    if path is None and store.is_far:
        raise StudyError(
            f"the {artifact} of trial {trial.number} of study {study.name!r} was removed from "
            f"{store.name(str(below))}: set TRIALYARD_ARTIFACTS to the store or the folder that has it"
        )
    if path is None:
        attempts = read(storage, lambda connection: of_trial(connection, trial._trial_id))
        host = attempts[-1].owner.host if attempts else "another machine"
        raise StudyError(
            f"the {artifact} of trial {trial.number} of study {study.name!r} is not on this machine "
            f"({store.folder / named} does not exist, or this user may not see it; it was trained on {host}): set "
            "TRIALYARD_ARTIFACTS to the folder that has it, or copy it to that path"
        )
    return path


def attempts(name: str, number: int, storage: StorageLike = None) -> list[Attempt]:
    """The attempts at trial `number` of study `name`, the first one first: who ran it, when, and how each run ended.

    >>> [attempt.outcome for attempt in studies.attempts("digits", 0)]
    ['finished']

    Raises StudyError if there is no such study or trial.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    trial_id = trial_of(study, number, opened)._trial_id
    return read(opened, lambda connection: of_trial(connection, trial_id))


def trial_of(study: Study, number: int, storage: RDBStorage) -> FrozenTrial:
    """Trial `number` of a study. Raises StudyError if it has none."""
    require_whole("trial", number)
    try:
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study.id, number))
    except KeyError:
        raise StudyError(no_trial_text(study, number)) from None


def no_trial_text(study: Study, number: int) -> str:
    """A sentence for people: the study has no trial of this number."""
    return (
        f"study {study.name!r} has no trial {number}: its {many(study.size, 'trial is', 'trials are')} numbered from 0"
    )


def leaderboard(name: str, storage: StorageLike = None, top: int | None = None) -> Leaderboard:
    """The complete and feasible trials of study `name`, best first; only the first `top` if it is given.

    >>> for row in studies.leaderboard("digits"):
    ...     print(row.rank, row.params["depth"], row.epochs, row.parameters)
    1 ... 1 ...
    2 ... 1 ...

    Raises StudyError if there is no such study.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    return Leaderboard(read(opened, lambda connection: _rows(connection, study.id, top)))


def _rows(connection: Connection, study_id: int, top: int | None) -> list[Row]:
    trials = ranked(connection, study_id, top)
    # The length of a statement is limited. So the ids of a few trials are named, and for many all rows are read.
    trial_ids = [trial.trial_id for trial in trials] if len(trials) <= IDS_IN_CLAUSE else None

    def query(stored: type[TrialParamModel] | type[TrialUserAttributeModel], *columns: Any) -> Select[Any]:
        selected = select(stored.trial_id, *columns)
        if trial_ids is not None:
            return selected.where(stored.trial_id.in_(trial_ids))
        complete = (TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE)
        return selected.join(TrialModel, TrialModel.trial_id == stored.trial_id).where(*complete)

    params: dict[int, dict[str, Any]] = defaultdict(dict)
    stored = TrialParamModel
    columns = (stored.param_name, stored.param_value, stored.distribution_json)
    for trial_id, name, value, distribution in connection.execute(query(stored, *columns).order_by(stored.param_id)):
        params[trial_id][name] = _distribution(distribution).to_external_repr(value)
    stored_values: dict[int, dict[str, Any]] = defaultdict(dict)
    attribute = TrialUserAttributeModel
    shown_attributes = attribute.key.in_((*LEADERBOARD_ATTRIBUTES, "imported"))
    rows = connection.execute(query(attribute, attribute.key, attribute.value_json).where(shown_attributes))
    for trial_id, key, value_json in rows:
        stored_values[trial_id][key] = attributes.decoded(value_json)
    numbers: dict[int, dict[str, Any]] = {
        trial.trial_id: {
            key: attributes.number(stored_values[trial.trial_id].get(key)) for key in LEADERBOARD_ATTRIBUTES
        }
        for trial in trials
    }
    return [
        Row(
            rank=trial.rank,
            number=trial.number,
            value=trial.value,
            params=params[trial.trial_id],
            imported=stored_values[trial.trial_id].get("imported") is True,
            **numbers[trial.trial_id],
        )
        for trial in trials
    ]


@cache
def _distribution(as_json: str) -> BaseDistribution:
    return json_to_distribution(as_json)  # a study has few distributions, and each trial repeats them


def status(name: str, storage: StorageLike = None) -> Status:
    """The progress of study `name`.

    >>> state = studies.status("digits")
    >>> state.complete, state.budget, state.ended, state.workers
    (2, 2, True, ())

    Raises StudyError if there is no such study.
    """
    opened = registry.storage_of(storage)
    return status_of(registry.find(name, opened), opened)


def statuses(storage: StorageLike = None) -> list[Status]:
    """The status of each study, oldest first; a study that is not readable is left out, with a warning.

    >>> [state.study for state in studies.statuses()]
    ['digits']
    """
    opened = registry.storage_of(storage)
    return [status_of(study, opened) for study in ledger.studies(opened)]


def status_of(study: Study, storage: RDBStorage) -> Status:
    """As `status`, for a study that has been read already."""
    counts = ledger.counts(storage, study.id)
    best = read(storage, lambda connection: ranked(connection, study.id, top=1))
    seconds = read(storage, lambda connection: durations(connection, study.id, LAST_TRIALS))
    trial_seconds = sum(seconds) / len(seconds) if seconds else None
    return Status(
        study=study.name,
        description=study.definition["description"],
        protocol=protocol_of(study.definition),
        complete=counts.complete,
        pruned=counts.pruned,
        failed=counts.failed,
        running=counts.running,
        waiting=counts.waiting,
        budget=study.budget.total,
        state=study.state,
        priority=study.priority,
        pause_reason=study.pause_reason,
        ended=study.has_ended,
        best=best[0].value if best else None,
        best_number=best[0].number if best else None,
        trial_seconds=trial_seconds,
        hours_left=_hours_left(study),
        seconds_left=_seconds_left(storage, study, trial_seconds),
        workers=tuple(claims.running_trials(storage, study.id)) if counts.running else (),
        outside=_outside(storage, study) if study.outside else (),
        failures=_failures(storage, study.id) if counts.failed else (),
    )


def _outside(storage: RDBStorage, study: Study) -> tuple[int, ...]:
    return tuple(read(storage, lambda connection: started_outside(connection, study.id)))


def workers(storage: StorageLike = None) -> list[SlotStatus]:
    """Every slot of every live worker, also the idle ones.

    >>> [slot.device for slot in studies.workers()]
    []
    """
    return read(registry.storage_of(storage), present)


def curves(
    name: str, storage: StorageLike = None, artifacts: str | Path | None = None, top: int | None = None
) -> list[Curve]:
    """The learning curves of study `name`: complete trials, best first, then pruned ones; `top` limits how many.

    They are read from `artifacts`, a folder or the URL of an object store, by default that of the settings.

    >>> curve = studies.curves("digits", top=1)[0]
    >>> len(curve.loss) == len(curve.val_accuracy) == 1
    True

    Raises StudyError if there is no such study.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    ended = opened.get_all_trials(study.id, deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return curves_of(ended, settings.load(artifacts=artifacts).artifact_store, top)


def curves_of(trials: Sequence[FrozenTrial], artifacts: ArtifactStore | Path, top: int | None = None) -> list[Curve]:
    """The learning curves of `trials`: complete ones, best first, then pruned ones; `top` limits how many."""
    complete = sorted((trial for trial in trials if is_scored(trial)), key=rank_key)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    chosen = [*complete, *pruned][:top]
    artifact_store.of(artifacts).fetch_all([trial.user_attrs.get("history") for trial in chosen])
    return [curve_of(trial, artifacts) for trial in chosen]


def curve_of(trial: FrozenTrial, artifacts: ArtifactStore | Path) -> Curve:
    """The learning curve of one trial, in whatever state it is."""
    records = history_of(trial, artifacts)

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


def history_of(trial: FrozenTrial, artifacts: ArtifactStore | Path) -> list[dict[str, Any]]:
    """The records of a training's epochs; empty if this machine does not have the file, or it is not a history."""
    path = artifact_store.of(artifacts).fetch(trial.user_attrs.get("history"))
    if path is None:
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        keys = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")
        # The file has null for a number that is not finite.
        return [{key: math.nan if record[key] is None else float(record[key]) for key in keys} for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.debug("trial %d has no history on this machine: %s", trial.number, error)
        return []


def _failures(storage: RDBStorage, study_id: int) -> tuple[str, ...]:
    reason = and_(TrialUserAttributeModel.trial_id == TrialModel.trial_id, TrialUserAttributeModel.key == "failure")

    def work(connection: Connection) -> list[str | None]:
        return list(
            connection.execute(
                select(TrialUserAttributeModel.value_json)
                .select_from(TrialModel)
                .outerjoin(TrialUserAttributeModel, reason)
                .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.FAIL)
                .order_by(TrialModel.number)
            ).scalars()
        )

    failures = (attributes.failure(attributes.decoded(stored)) for stored in dict.fromkeys(read(storage, work)))
    return tuple(dict.fromkeys(f"{failure['kind']}: {failure['message']}" for failure in failures))


def _hours_left(study: Study) -> float | None:
    hours = study.budget.hours
    if hours is None or study.first_began is None:
        return hours
    return max(0.0, hours - (study.read_at - study.first_began).total_seconds() / 3600.0)


def _seconds_left(storage: RDBStorage, study: Study, trial_seconds: float | None) -> float | None:
    """How long the rest of the budget takes: trials take as long as the last ones did, in the slots that are free."""
    left, hours = study.budget.total - study.finished, _hours_left(study)
    if left <= 0 or study.has_ended:
        return 0.0
    if trial_seconds is None:
        return None
    grace = settings.load().grace_seconds
    usable = [slot for slot in workers(storage) if slot.closed is None and slot.silent_seconds <= grace]
    slots = sum(slot.study in (study.name, None) for slot in usable)
    # A trial that starts within the hours runs to its end.
    longest = math.inf if hours is None else 3600.0 * hours + trial_seconds
    return min(longest, trial_seconds * left / max(1, min(slots, left)))
