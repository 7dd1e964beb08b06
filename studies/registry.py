"""The studies in a database: create, open, list, delete."""

import builtins
import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import optuna
from optuna.storages import RDBStorage

from storage import claims, database, ledger, retention, settings, transactions
from storage.artifact_store import ArtifactStore
from storage.errors import NotOurStudy, StudyGone, WrongDirection, many, nearest
from storage.transactions import file_identity
from studies import definition as definitions
from studies import sampling
from studies.definition import Definition
from studies.errors import DefinitionError, StudyError
from studies.model_rules import STORED_FUNCTION
from studies.wording import SAME_SOURCE

log = logging.getLogger(__name__)

MAX_PRIORITY = 1_000_000

StorageLike = str | RDBStorage | None  # a database's URL, an open storage, or None for the one that the settings name


def storage_of(storage: StorageLike) -> RDBStorage:
    """The open storage. Raises StorageError if there is no database."""
    if isinstance(storage, RDBStorage):
        return storage
    url = storage or settings.load().url
    return _connected(url, file_identity(database.file_at(url)))


@cache
def _connected(url: str, identity: tuple[int, int] | None) -> RDBStorage:
    return database.connect(url)


def create(
    definition: Definition,
    storage: RDBStorage,
    data: dict[str, Any],
    results: Sequence[ledger.Imported] | None = None,
    opens_tests_of: str | None = None,
) -> ledger.Creation:
    """Creates a study in the database, whole or not at all: its definition, its queued points, its budget.

    `data` describes its images (`fingerprint`, counts); workers compare their own images with it. With `results` the
    study has these as imported trials, and nothing is left to run. A confirmation names the study that it confirms as
    `opens_tests_of`, and it is counted that it opens the test images.

    A study that exists stays as it is, but its budget is raised if the definition's
    is larger.

    Raises StudyError if a study of this name has a definition that makes trials not comparable, was not made by
    Trialyard and has trials, or does not maximize exactly one value (`optuna create-study` makes such studies).
    """
    name = definition.name

    def accept(stored: Mapping[str, Any], stored_data: Mapping[str, Any]) -> None:
        _require_same_definition(definitions.from_json(stored), definition)
        _require_same_data(name, stored_data, data)

    budget = ledger.Budget(trials=definition.trials if results is None else 0, hours=definition.budget.hours)
    with _as_study_errors(name):
        creation = ledger.create_study(
            storage,
            name,
            definition=definition.to_json(),
            data=data,
            budget=budget,
            points=definition.queue() if results is None else (),
            imported=results or (),
            accept=accept,
            opens_tests_of=opens_tests_of,
        )
    wanted = definition.budget.trials
    if results is None and wanted is not None and definition.size is not None and definition.size < wanted:
        log.warning(
            "study %s: its space has only %s, so it ends after %s",
            *(name, many(definition.size, "point"), many(definition.size, "trial")),
        )
    # The budget of a confirmation grows only where failed trainings are repeated.
    if results is None and definition.confirm is None and creation.study.budget.trials > budget.trials:
        log.warning(
            "study %s keeps its larger budget of %d trials: `trialyard stop %s` ends it sooner",
            *(name, creation.study.budget.trials, name),
        )
    return creation


def pause(name: str, storage: StorageLike = None) -> None:
    """Pauses study `name`: running trials go back to the queue, and no trial starts until `resume`.

    All its workers react within an epoch or a heartbeat (10 s), whichever is sooner.

    >>> studies.pause("digits")
    >>> studies.status("digits").state
    'paused'

    Raises StudyError if there is no such study.
    """
    _set_state(name, storage, "paused")


def resume(name: str, storage: StorageLike = None) -> None:
    """Lets workers continue a study that was paused or stopped.

    >>> studies.resume("digits")
    >>> studies.status("digits").state
    'open'

    Raises StudyError if there is no such study.
    """
    _set_state(name, storage, "open")


def set_priority(name: str, priority: int, storage: StorageLike = None) -> None:
    """Sets the priority of study `name`, a whole number; 0 is the default.

    A worker that was started without study names gives its free slots to the open studies of the highest priority, and
    to the others only where these have nothing to claim. Trials that run are not interrupted. Raises StudyError if
    there is no such study, or if `priority` is not a whole number within MAX_PRIORITY.

    >>> studies.set_priority("digits", 5)
    >>> studies.status("digits").priority
    5
    """
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise StudyError(
            f"a priority is a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}, and {priority!r} is not: "
            "0 is the default, and higher ones go first"
        )
    opened = storage_of(storage)
    ledger.set_priority(opened, find(name, opened), priority)


def stop(name: str, storage: StorageLike = None) -> None:
    """Ends study `name` with the trials that have finished. Workers react as to `pause`.

    >>> studies.stop("digits")
    >>> studies.status("digits").state
    'stopped'

    Raises StudyError if there is no such study.
    """
    _set_state(name, storage, "stopped")


def delete(name: str, storage: StorageLike = None) -> int:
    """Removes study `name` with its trials and files; returns how many bytes the files had.

    If the process is killed meanwhile, at most files are left, and `trialyard storage prune` removes them.

    >>> freed = studies.delete("digits")
    >>> studies.names(), freed > 100_000
    ([], True)

    Raises StudyError if there is no such study, and StorageError if a worker runs one of its trials and the study was
    not stopped.
    """
    opened, here = storage_of(storage), settings.load()
    claims.delete(opened, find(name, opened), here.grace_seconds)
    leftovers = retention.unneeded(opened, here.artifact_store, here.keep_models, study=name)
    return retention.remove(opened, here.artifact_store, here.keep_models, leftovers)


def fetch_function(model: str, store: ArtifactStore) -> None:
    """Has Python find the function `model` on this machine, if it was stored from a notebook into an object store.

    Nothing happens for other models. Raises ObjectStoreError.
    """
    if model.startswith(STORED_FUNCTION):
        package, _, module = model.partition(":")[0].rpartition(".")
        # The module last: it needs the other.
        for suffix in (".pickle", ".py"):
            store.fetch(f"{package.rpartition('.')[2]}/{module}{suffix}")


def _set_state(name: str, storage: StorageLike, state: ledger.State) -> None:
    opened = storage_of(storage)
    ledger.set_state(opened, find(name, opened), state)


def open(name: str, storage: StorageLike = None) -> optuna.Study:
    """The Optuna study `name`, with the sampler and pruner of its definition.

    `storage` is a database's URL; None means the database of the settings (TRIALYARD_STORAGE, TRIALYARD_HOME).

    >>> study = studies.open("digits")
    >>> study.direction.name, study.best_trial.number == studies.best_trial("digits").number
    ('MAXIMIZE', True)

    Raises StudyError if there is no such study.
    """
    opened = storage_of(storage)
    definition = definitions.from_json(find(name, opened).definition)
    with _quiet():
        return optuna.load_study(
            study_name=name,
            storage=opened,
            sampler=sampling.sampler(definition, number=0),
            pruner=sampling.pruner(definition),
        )


def names(storage: StorageLike = None) -> list[str]:
    """The names of the studies that Trialyard made, oldest first. An unreadable one is left out, with a warning.

    >>> studies.names()
    ['digits']
    """
    return [study.name for study in ledger.studies(storage_of(storage))]


def find(name: str, storage: RDBStorage) -> ledger.Study:
    """The study `name` as the database has it now.

    Raises StudyError if there is none, or if it is not usable: its message says why, and what to do.
    """
    if not isinstance(name, str):
        raise StudyError(f"the name of a study is a string, not {name!r}: give the name, as studies.names() has it")
    try:
        return ledger.find(storage, name)
    except StudyGone:
        known = names(storage)
        shown_url = transactions.redact(str(storage.engine.url))
        ready = name in definitions.catalog()
        create = f"`trialyard create {name if ready else 'FILE'}` creates {'it' if ready else 'one'}"
        if not known:
            raise StudyError(f"there is no study {name!r} in {shown_url}, nor any other: {create}") from None
        raise StudyError(
            f"there is no study {name!r} in {shown_url}{nearest(name, known)}: it has {', '.join(known)}; {create}"
        ) from None
    except NotOurStudy as error:
        raise StudyError(str(error)) from None


def with_definitions(storage: RDBStorage) -> list[tuple[ledger.Study, Definition]]:
    """The studies whose definition this version understands, oldest first. A later version may have made the others."""
    found = []
    for study in ledger.studies(storage):
        with contextlib.suppress(DefinitionError):  # the commands of that study say what is wrong
            found.append((study, definitions.from_json(study.definition)))
    return found


def definition_of(name: str, storage: RDBStorage) -> Definition:
    """The definition of study `name`. Raises StudyError if there is none."""
    return definitions.from_json(find(name, storage).definition)


def check_data(study: ledger.Study, data: Mapping[str, Any]) -> None:
    """Raises StudyError unless `data` are the images that the study started with."""
    _require_same_data(study.name, study.data, data)


def _require_same_data(name: str, stored: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if stored.get("fingerprint") != data["fingerprint"]:
        raise StudyError(
            f"study {name!r} started with other images (their fingerprint is {stored.get('fingerprint')}, and that of "
            f"the images here is {data['fingerprint']}): use the same data"
        )


def check_direction(study: ledger.Study, storage: RDBStorage) -> None:
    """Raises StudyError unless the study maximizes exactly one value: older versions took over any empty study."""
    with _as_study_errors(study.name):
        ledger.check_direction(storage, study)


@contextlib.contextmanager
def _as_study_errors(name: str) -> Iterator[None]:
    try:
        yield
    except WrongDirection as wrong:
        raise StudyError(
            f"study {name!r} {wrong}, and Trialyard maximizes exactly one, the accuracy: choose another name with "
            f"--name, or remove it with `optuna delete-study --study-name {name}`"
        ) from None
    except NotOurStudy:
        raise StudyError(
            f"there is a study {name!r} already, and Trialyard did not make it: choose another name with --name"
        ) from None


def check_software(study: ledger.Study, storage: RDBStorage, installed: Mapping[str, str]) -> None:
    """Raises StudyError unless the study started with software that gives the same results as `installed`.

    Both have the form of `search.checks.software`, and a digest of the source file for each function of the user's own
    (``{"own:build": "90b1..."}``). A part that only one of them has is not compared. A study without
    recorded software takes `installed` for its own.
    """
    recorded = ledger.record_software(storage, study, installed)
    different = [part for part in recorded if part in installed and recorded[part] != installed[part]]
    _require_same_sources(study.name, recorded, installed)
    if different:
        raise StudyError(
            f"study {study.name!r} started with {_versions_text(recorded, different)}, and this machine has "
            f"{_versions_text(installed, different)}, so results may differ: install the same versions, or start "
            "another study with `trialyard create` and --name"
        )


def check_sources(study: ledger.Study, installed: Mapping[str, str]) -> None:
    """Raises StudyError unless the user's own functions are in the files that the study began with.

    `installed` has the form of `sources`. A study without recorded digests is not compared.
    """
    _require_same_sources(study.name, sources(study), installed)


def _require_same_sources(name: str, recorded: Mapping[str, str], installed: Mapping[str, str]) -> None:
    edited = [part for part in recorded if ":" in part and recorded[part] != installed.get(part, recorded[part])]
    if edited:
        raise StudyError(
            f"study {name!r} began with another file of {' and '.join(edited)} than this machine has, so trials would "
            f"not be comparable: {SAME_SOURCE}"
        )


def sources(study: ledger.Study) -> dict[str, str]:
    """The digest of the source file of each of the user's own functions that the study began with, by function."""
    return {part: digest for part, digest in (study.software or {}).items() if ":" in part}


def _versions_text(software: Mapping[str, str], parts: list[str]) -> str:
    return " and ".join(f"{part} {software[part]}" for part in parts)


def _require_same_definition(stored: Definition, wanted: Definition) -> None:
    different = definitions.differences(stored, wanted)
    if different:
        raise StudyError(
            f"study {wanted.name!r} exists with another definition ({'; '.join(different)}), so trials would not be "
            "comparable: use the same definition, or another name with --name"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Optuna logs to standard error, in the middle of our progress display.
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


__all__: builtins.list[str] = [
    "StorageLike",
    "create",
    "definition_of",
    "find",
    "names",
    "open",
    "pause",
    "resume",
    "set_priority",
    "stop",
    "storage_of",
]
