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

from storage import claims, database, ledger, retention, settings
from storage.errors import NotOurStudy, WrongDirection, nearest
from storage.tables import find_study
from studies import definition as definitions
from studies import sampling
from studies.definition import Definition
from studies.errors import StudyError

log = logging.getLogger(__name__)

StorageLike = str | RDBStorage | None  # a database's URL, an open storage, or None for the one that the settings name


def storage_of(place: StorageLike) -> RDBStorage:
    """The open storage at `place`. Raises StorageError where there is no database."""
    if isinstance(place, RDBStorage):
        return place
    return _connected(place or settings.load().url)


@cache
def _connected(url: str) -> RDBStorage:
    return database.connect(url)


def create(
    definition: Definition,
    storage: RDBStorage,
    data: dict[str, Any],
    results: Sequence[ledger.Imported] | None = None,
) -> bool:
    """Creates a study in the database, whole or not at all: its definition, its queued points, its budget.

    `data` describes its images (`fingerprint`, counts); workers compare their own with it. With `results` the study
    has these as imported trials, and nothing is left to run.

    Returns whether anything is new. A study that exists stays as it is, but its budget is raised if the definition's
    is larger.

    Raises StudyError if a study of this name has a definition whose trials would not be comparable, was not made by
    Trialyard and has trials, or does not maximize exactly one value, as one that `optuna create-study` made.
    """
    name = definition.name

    def accept(stored: Mapping[str, Any], stored_data: Mapping[str, Any]) -> None:
        _require_same_definition(definitions.from_json(stored), definition)
        _require_same_data(name, stored_data, data)

    budget = ledger.Budget(trials=definition.trials if results is None else 0, hours=definition.budget.hours)
    with _refusing(name):
        creation = ledger.create_study(
            storage,
            name,
            definition=definition.to_json(),
            data=data,
            budget=budget,
            points=definition.queue() if results is None else (),
            imported=results or (),
            accept=accept,
        )
    if results is None and creation.budget.trials > budget.trials:
        log.warning(
            "study %s keeps its budget of %d trials: `trialyard stop %s` ends it sooner",
            *(name, creation.budget.trials, name),
        )
    return creation.changed


def pause(name: str, storage: StorageLike = None) -> None:
    """No trial of study `name` starts, and those that run go back to the queue, until it is resumed.

    All its workers act within an epoch or a beat (10 s), whichever is sooner.

    >>> studies.pause("digits")
    >>> studies.status("digits").state
    'paused'

    Raises StudyError where there is none.
    """
    _set_state(name, storage, "paused")


def resume(name: str, storage: StorageLike = None) -> None:
    """Lets the workers go on with a study that was paused or stopped.

    >>> studies.resume("digits")
    >>> studies.status("digits").state
    'open'

    Raises StudyError where there is none.
    """
    _set_state(name, storage, "open")


def stop(name: str, storage: StorageLike = None) -> None:
    """Ends study `name` with the trials that it has finished, as `pause` does but for good.

    >>> studies.stop("digits")
    >>> studies.status("digits").state
    'stopped'

    Raises StudyError where there is none.
    """
    _set_state(name, storage, "stopped")


def delete(name: str, storage: StorageLike = None) -> int:
    """Removes study `name` with all its trials from the database, and its files; returns the bytes that these took.

    Killed in the middle it leaves at most files, which `trialyard storage prune` removes.

    >>> freed = studies.delete("digits")
    >>> studies.names(), freed > 100_000
    ([], True)

    Raises StudyError where there is none, and StorageError while a worker runs a trial of it, unless it was stopped.
    """
    place, here = storage_of(storage), settings.load()
    study_id(name, place)
    claims.delete(place, name, here.grace_seconds)
    leftovers = retention.unneeded(place, here.artifact_folder, here.keep_models, study=name)
    return retention.remove(place, here.artifact_folder, here.keep_models, leftovers)


def _set_state(name: str, storage: StorageLike, state: ledger.State) -> None:
    place = storage_of(storage)
    stored_definition(name, place)
    ledger.set_state(place, name, state)


def open(name: str, storage: StorageLike = None) -> optuna.Study:
    """The study `name`, as Optuna's own object, with the sampler and pruner of its definition.

    `storage` is a database's URL, or None for the one that TRIALYARD_STORAGE or TRIALYARD_HOME names.

    >>> study = studies.open("digits")
    >>> study.direction.name, study.best_trial.number == studies.best_trial("digits").number
    ('MAXIMIZE', True)

    Raises StudyError where there is none of that name.
    """
    place = storage_of(storage)
    definition = definition_of(name, place)
    with _quiet():
        return optuna.load_study(
            study_name=name,
            storage=place,
            sampler=sampling.sampler(definition, number=0),
            pruner=sampling.pruner(definition),
        )


def names(storage: StorageLike = None) -> list[str]:
    """The studies that Trialyard made, oldest first. One that is not readable is left out, with a warning.

    >>> studies.names()
    ['digits']
    """
    return ledger.names(storage_of(storage))


def study_id(name: str, storage: RDBStorage) -> int:
    """The database's own number of study `name`. Raises StudyError where there is none."""
    found = database.read(storage, lambda connection: find_study(connection, name))
    if found is None:
        known = names(storage)
        place = database.redact(str(storage.engine.url))
        if not known:
            raise StudyError(f"there is no study {name!r} in {place}, nor any other: `trialyard create {name}`")
        raise StudyError(
            f"there is no study {name!r} in {place}{nearest(name, known)}: it has {', '.join(known)}; "
            f"`trialyard create {name}` would make it"
        )
    return found


def definition_of(name: str, storage: RDBStorage) -> Definition:
    """The definition of study `name`. Raises StudyError where there is none."""
    return definitions.from_json(stored_definition(name, storage))


def stored_definition(name: str, storage: RDBStorage) -> dict[str, Any]:
    """The same as it is stored: the checked JSON. Raises StudyError where there is none."""
    stored: dict[str, Any] | None = ledger.attribute(storage, study_id(name, storage), "definition")
    if stored is None:
        if ledger.is_outdated(storage, name):
            raise StudyError(f"study {name!r} is of an older Trialyard: run `trialyard storage upgrade`")
        raise StudyError(f"study {name!r} is not one of Trialyard's, it has no definition: open it with plain Optuna")
    return stored


def data_of(name: str, storage: RDBStorage) -> dict[str, Any]:
    """What is recorded of the images of study `name`. Raises StudyError where there is none."""
    stored: dict[str, Any] | None = ledger.attribute(storage, study_id(name, storage), "data")
    return stored or {}


def check_data(name: str, storage: RDBStorage, data: Mapping[str, Any]) -> None:
    """Raises StudyError unless `data` are the images that study `name` started with."""
    _require_same_data(name, data_of(name, storage), data)


def _require_same_data(name: str, stored: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if stored.get("fingerprint") != data["fingerprint"]:
        raise StudyError(
            f"study {name!r} started with other images (their fingerprint is {stored.get('fingerprint')}, and here it "
            f"is {data['fingerprint']}): put the same data in place"
        )


def check_direction(name: str, storage: RDBStorage) -> None:
    """Raises StudyError unless study `name` maximizes exactly one value: older versions took over any empty study."""
    with _refusing(name):
        ledger.check_direction(storage, study_id(name, storage))


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except WrongDirection as wrong:
        raise StudyError(
            f"study {name!r} {wrong}, and Trialyard maximizes exactly one, the accuracy: choose another name with "
            f"--name, or remove it with `optuna delete-study --study-name {name}`"
        ) from None
    except NotOurStudy:
        raise StudyError(
            f"there is a study {name!r} already, and it is not one of Trialyard's: choose another name with --name"
        ) from None


def check_software(name: str, storage: RDBStorage, here: dict[str, str]) -> None:
    """Raises StudyError unless study `name` began with software that gives the same numbers as that `here`.

    Both are what `search.checks.software` tells; what only one of them tells is not compared. A study that has not
    begun yet, or did before this was recorded, takes `here` for its own.
    """
    began = ledger.record_software(storage, name, here)
    different = [part for part in began if part in here and began[part] != here[part]]
    if different:
        raise StudyError(
            f"study {name!r} began with {_listed(began, different)}, and here is {_listed(here, different)}, whose "
            "numbers may be others: install the same here, or begin another study with `trialyard create` and --name"
        )


def _listed(software: dict[str, str], parts: list[str]) -> str:
    return " and ".join(f"{part} {software[part]}" for part in parts)


def _require_same_definition(stored: Definition, wanted: Definition) -> None:
    different = definitions.differences(stored, wanted)
    if different:
        raise StudyError(
            f"study {wanted.name!r} exists with another definition ({'; '.join(different)}), and its trials "
            "would not be comparable: make the definition the same, or give this one its own name with --name"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # "A new study created in RDB" goes to standard error by Optuna's own handler, beside our progress.
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
    "names",
    "open",
    "pause",
    "resume",
    "stop",
    "storage_of",
    "study_id",
]
