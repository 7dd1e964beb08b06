"""All that the ``trialyard`` command does to run studies, as functions: the command parses, calls one, and prints.

>>> import search, studies
>>> search.run("digits", trials=2, epochs=1)  # trains on this machine
>>> studies.best_model("digits")

What reads studies is in the package `studies`. A `storage` is a database's URL or an open storage; None is the one that
TRIALYARD_STORAGE or TRIALYARD_HOME names.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from search.errors import WorkerError
from search.unneeded_files import leftovers as leftovers
from search.unneeded_files import prune as prune
from storage import database, ledger, promises, settings, slots, transactions
from storage.errors import ObjectStoreError, SettingsError
from storage.ledger import Study
from storage.settings import Settings
from storage.transactions import PatientStorage, require_same_file
from studies import advice, confirmation, draft, registry, results
from studies import definition as definitions
from studies.confirmation import Confirmed
from studies.definition import Definition
from studies.errors import StudyError
from studies.sources import has_test_images
from studies.statistics import seeds_needed

if TYPE_CHECKING:
    from search.devices import Slot
    from search.limits import Limits
    from search.messages import Measured
    from search.progress import Listener
    from search.retraining import Replayed, ReplayedEpoch
    from search.slurm import Submitted

log = logging.getLogger(__name__)

Source = str | Path | Definition  # a name of the catalog, a TOML file, or a definition


class Interrupted(KeyboardInterrupt):
    """A signal (SIGINT, SIGTERM, SIGHUP or SIGUSR1) ended the work.

    `requeued` says whether its trials are back in the queue already. If not, the next worker takes them back. Either
    way the same call continues where this one stopped.
    """

    def __init__(self, *, requeued: bool) -> None:
        super().__init__("the work was interrupted")
        self.requeued = requeued


# --- definitions ------------------------------------------------------------------------------------------


def init(
    data: str | Path,
    file: str | Path | None = None,
    *,
    model: str | None = None,
    name: str | None = None,
    trials: int = 20,
    epochs: int = 10,
    from_script: str | Path | None = None,
) -> list[Path]:
    """Writes a definition with comments to start from, and a model file where `model` is "own"; returns their paths.

    The arguments are those of `studies.draft.draft`. No file is overwritten. Raises DefinitionError.
    """
    texts = draft.draft(
        data,
        None if file is None else Path(file),
        model=model,
        name=name,
        trials=trials,
        epochs=epochs,
        from_script=None if from_script is None else Path(from_script),
    )
    draft.write(texts)
    return list(texts)


def catalog() -> dict[str, str]:
    """The names of the ready definitions, each with its description."""
    return {name: definition.description for name, definition in definitions.catalog().items()}


def catalog_text(name: str) -> str:
    """The ready definition `name` as TOML text with its comments. Raises DefinitionError if there is none."""
    return definitions.catalog_text(name)


# --- studies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A definition that this machine can train."""

    definition: Definition
    data: dict[str, Any]  # a summary of its images: fingerprint, sizes
    space: dict[str, str]  # the range of each hyperparameter in words
    notes: tuple[str, ...]  # what one may not expect, a sentence each
    parameters: tuple[int, int] | None  # weights of the smallest and the largest of a few models of the space
    seconds: float | None  # about how long this machine needs for all trials, if none is pruned
    slots: int  # how many trials this machine runs at once


def check(
    source: Source,
    *,
    name: str | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Checked:
    """Checks that a definition obeys the rules, that its data load here, and that models can be built and trained.

    A few models of the space are built, and trained for a few batches to estimate the time. `name`, `trials`, `epochs`
    and `limit` (training images) replace what the definition says; `skip_bad` leaves out image files that cannot be
    read. Nothing is written but downloaded or converted images.

    Raises DefinitionError, DataError, ModelError, MachineError where Keras cannot be imported, and ObjectStoreError.
    """
    from search import checks
    from search.devices import slots as slots_of

    definition, here = _definition(source, name, trials, epochs, limit, skip_bad), settings.load()
    here.artifact_store.check()
    slots = slots_of()
    checked = checks.check(definition, here, measure_on=slots[0])
    measured = checked.measured
    return Checked(
        definition=definition,
        data=checked.data,
        space=advice.space_text(definition),
        notes=(*advice.notes(definition), *checked.notes),
        parameters=None if measured is None else measured.parameters,
        seconds=None if measured is None else _estimated_seconds(definition, measured, len(slots)),
        slots=len(slots),
    )


def _estimated_seconds(definition: Definition, measured: "Measured", slots: int) -> float:
    """How long the whole study takes on so many slots, if nothing is pruned."""
    training = measured.start_seconds + definition.budget.epochs * measured.epoch_seconds
    return math.ceil(definition.trials / slots) * definition.budget.repeats * training


def create(
    source: Source,
    *,
    name: str | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    storage: str | None = None,
    patience: float = 0.0,
) -> ledger.Creation:
    """Creates a study for workers to come; the database, too, if there is none. The other arguments are as for `check`.

    A study that exists already stays as it is, but its budget is raised if the definition's is larger. `patience` is
    for how many seconds a database that is away is waited for.

    Raises what `check` raises; StudyError if a study of this name has another definition; StorageError.
    """
    creation, _, _ = _create(_definition(source, name, trials, epochs, limit, skip_bad), _settings(storage), patience)
    return creation


def _create(
    definition: Definition, here: Settings, patience: float
) -> tuple[ledger.Creation, PatientStorage, dict[str, str]]:
    """Also returns the software of this machine, as `registry.check_software` takes it."""
    from search import checks

    # Everything is checked before the database is touched, the data and a user's own model included.
    checked = checks.check(definition, here)
    for note in checked.notes:
        log.warning("study %s: %s", definition.name, note)
    opened = database.create(here.url, patience)
    return registry.create(definition, opened, checked.data), opened, checks.software() | checked.sources


def run(
    source: Source,
    *,
    name: str | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    storage: str | None = None,
    devices: str = "auto",
    per_device: int | None = None,
    workers: int | None = None,
    listeners: "Sequence[Listener] | None" = None,
) -> FrozenTrial:
    """Creates the study if needed, runs it on this machine to its end, and returns its best trial.

    `devices`, `per_device` and `workers` are as for `work`, the others as for `create`.

    Raises what `create` and `work` raise; StudyError if no trial is complete at the end.
    """
    from search.devices import slots as slots_of

    here = _settings(storage)
    places = slots_of(devices, per_device, workers)
    definition = _definition(source, name, trials, epochs, limit, skip_bad)
    here.artifact_store.check(here.patience_seconds)
    creation, opened, software = _create(definition, here, here.patience_seconds)
    if not creation.study.has_ended:
        registry.check_software(creation.study, opened, software)
        _fill([creation.study], opened, here, places, listeners, share=False)
    return results.best_trial(creation.study.name, opened)


@dataclass(frozen=True, kw_only=True)
class _OnRay:
    """Slots on a Ray cluster, as `search.ray_engine.work` takes them."""

    address: str
    workers: int | None
    gpus: float | None


def work(
    *names: str,
    storage: str | None = None,
    devices: str = "auto",
    per_device: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    gpus: float | None = None,
    forever: bool = False,
    minutes: float | None = None,
    idle_minutes: float | None = None,
    listeners: "Sequence[Listener] | None" = None,
) -> list[str]:
    """Fills this machine's slots with trials of the studies `names`, or of all studies, until nothing is left.

    `devices` is "auto", "cpu" or GPU numbers such as "0,1"; `per_device` trials share each device, and `workers` is how
    many run at once in all. With `forever` it waits for studies to come. After `minutes` it puts what runs back into
    the queue, with a checkpoint; it claims no trial that takes longer than what is left of them. It ends once no slot
    has had anything to do for `idle_minutes`. `listeners` learn of every trial and epoch; None shows the progress on
    standard error.

    With `ray`, the address of a Ray cluster or "auto" for the one of this machine, `workers` slots run on its nodes,
    each with `gpus` of one GPU; Ray chooses the devices.

    Returns the names of the studies. Raises Interrupted after a signal; StudyError where there is no such
    study; what `check` raises for a study that was named and that this machine cannot train; StorageError; RayError.
    """
    from search import open_studies
    from search.devices import slots as slots_of
    from search.limits import Limits

    if names and forever:
        raise WorkerError("with forever=True a worker takes trials of all studies: name none")
    if ray is not None and (devices != "auto" or per_device is not None):
        raise WorkerError("with --ray, Ray chooses the devices: give --gpus in place of --devices and --per-device")
    if ray is None and gpus is not None:
        raise WorkerError(
            "--gpus is for jobs of Slurm and slots on Ray: give --slurm or --ray, too, or --per-device in its place"
        )
    limits = Limits(minutes, idle_minutes)
    here = _settings(storage)
    places = slots_of(devices, per_device, workers) if ray is None else _OnRay(address=ray, workers=workers, gpus=gpus)
    opened = database.connect_with_retries(here.url, here.patience_seconds)
    here.artifact_store.check(here.patience_seconds)
    if forever:
        _fill(None, opened, here, places, listeners, share=True, limits=limits)
        return []
    found = [registry.find(name, opened) for name in dict.fromkeys(names)] if names else ledger.studies(opened)
    to_do = [study for study in found if not study.has_ended]
    for study in to_do if names and ray is None else ():  # a node of Ray checks itself
        open_studies.check_fit(study, opened, here)
    _fill(to_do, opened, here, places, listeners, share=not names, limits=limits)
    return [study.name for study in found]


def submit_to_slurm(
    *names: str,
    jobs: int,
    gpus: float = 0,
    sbatch: Sequence[str] = (),
    storage: str | None = None,
    devices: str = "auto",
    per_device: int | None = None,
    workers: int | None = None,
    forever: bool = False,
    minutes: float | None = None,
    idle_minutes: float | None = None,
    submit: bool = True,
) -> "Submitted":
    """Submits an array job of so many `jobs` to Slurm, each a worker with so many whole `gpus` on one node.

    `sbatch` has further options of sbatch without their dashes, such as ``["partition=gpu", "time=4:00:00"]``. The
    others are as for `work`, and hold for each job. With ``submit=False`` only the script is written.

    Returns the script, and the number of the array job. Raises, with nothing submitted, StudyError where there is no
    such study; SlurmError where Slurm cannot run the jobs, or they could not share the database or the files;
    SettingsError if `storage` has a password, which the script would show; StorageError.
    """
    from search import slurm

    if names and forever:
        raise WorkerError("with forever=True a worker takes trials of all studies: name none")
    if storage is not None and transactions.has_password(storage):
        raise SettingsError(
            f"the script would show the password of {transactions.redact(storage)}: put the URL into "
            "TRIALYARD_STORAGE, or into a file that TRIALYARD_STORAGE_FILE names"
        )
    here = _settings(storage)
    given = {"storage": storage, "devices": devices, "per-device": per_device, "workers": workers} | {
        "minutes": minutes,
        "idle-minutes": idle_minutes,
    }
    job = slurm.array_job(jobs, gpus, sbatch, [*names, *(["--forever"] if forever else [])], given)
    if not submit:
        return slurm.Submitted(script=slurm.script(job, here))
    opened = database.connect(here.url)
    for name in names:
        registry.find(name, opened)
    here.artifact_store.check()
    return slurm.submit(job, here)


def _fill(
    found: Sequence[Study] | None,
    opened: PatientStorage,
    here: Settings,
    places: "list[Slot] | _OnRay",
    listeners: "Sequence[Listener] | None",
    *,
    share: bool,
    limits: "Limits | None" = None,
) -> None:
    from search import progress, ray_engine, worker

    names = None if found is None else [study.name for study in found]
    if names == []:
        return
    if isinstance(places, _OnRay):
        given = limits if limits and limits.are_set else None
        is_done = ray_engine.work(found, opened, here, listeners, share=share, limits=given, **vars(places))
    else:
        shown = (
            progress.display(found, opened, places, share=share or found is None) if listeners is None else listeners
        )
        is_done = worker.work(names, opened, here, places, shown, share=share, limits=limits)
    require_same_file(opened)
    if not is_done:
        raise Interrupted(requeued=not opened.shutting_down.is_set())


def confirm(
    study: str,
    *,
    top: int | None = None,
    seeds: int = confirmation.SEEDS,
    storage: str | None = None,
    devices: str = "auto",
    per_device: int | None = None,
    workers: int | None = None,
    listeners: "Sequence[Listener] | None" = None,
) -> Confirmed:
    """Trains the `top` best configurations of `study` again from so many `seeds`, and judges them by the test images.

    None for `top` means three, or fewer if the study has not so many. The trainings are trials of a study of their own,
    so workers of other machines help, and the same call continues where this one stopped. `devices`, `per_device`
    and `workers` are as for `work`. See `studies.confirmation`.

    Raises StudyError if there is no such study, or it has not ended, has no complete trial, or has chosen by the test
    images; DataError if there are no test images; and what `work` raises.
    """
    from search import checks
    from search.devices import slots as slots_of

    here = _settings(storage)
    places = slots_of(devices, per_device, workers)
    opened = database.connect_with_retries(here.url, here.patience_seconds)
    here.artifact_store.check(here.patience_seconds)
    searched = registry.find(study, opened)
    definition = confirmation.definition_of(searched, opened, top, seeds)
    candidates = len(definition.confirm.candidates) if definition.confirm is not None else 0
    if candidates > 1 and seeds < seeds_needed(candidates):
        log.warning(
            "with %d candidates and %d seeds no winner is possible: %d seeds are needed",
            *(candidates, seeds, seeds_needed(candidates)),
        )
    checked = checks.check(definition, here)
    registry.check_data(searched, checked.data)
    registry.check_sources(searched, checked.sources)
    created = confirmation.create(searched, opened, top, seeds, checked.data)
    if not created.has_ended:
        registry.check_software(created, opened, checks.software() | checked.sources)
        _fill([created], opened, here, places, listeners, share=False)
    return confirmation.of_study(registry.find(created.name, opened), opened)


def can_confirm(study: str, *, storage: str | None = None) -> bool:
    """Whether `study` has test images, as far as is known, and they did not choose its trials.

    Raises StudyError if there is no such study.
    """
    found = registry.find(study, database.connect(_settings(storage).url))
    definition = definitions.from_json(found.definition)
    return definition.protocol == "validation" and has_test_images(definition.dataset, found.data)


def replay(
    study: str,
    number: int,
    *,
    storage: str | None = None,
    devices: str = "auto",
    on_difference: Callable[[str], None] = lambda difference: None,
    on_epoch: "Callable[[ReplayedEpoch], None]" = lambda epoch: None,
) -> "Replayed":
    """Trains trial `number` of `study` again from its record, on one device, and compares; nothing is written.

    `on_difference` learns what is not as it was (software, device) before the training begins, `on_epoch` of each epoch
    of both trainings. On the same kind of processor in float32 with the same software they must be the same.

    Raises StudyError if the trial is not complete or was imported, or its images or files are others now; DataError,
    ModelError or MachineError if it cannot be trained here.
    """
    from search import retraining
    from search.devices import slots as slots_of

    here = _settings(storage)
    slot = slots_of(devices, per_device=1)[0]
    opened = database.connect(here.url)
    return retraining.replay(registry.find(study, opened), number, opened, here, slot, on_difference, on_epoch)


def import_results(name: str, rows: Iterable[Mapping[str, Any]] | str | Path, *, storage: str | None = None) -> int:
    """Imports results obtained elsewhere, as `studies.import_trials` does, and renews the study's notes and figures.

    Returns how many were new. Raises StudyError if there is no such study, or a row does not fit its definition;
    StorageError.
    """
    from studies import imported, notes

    here = _settings(storage)
    added = imported.import_trials(name, rows, here.url)
    notes.publish_once(name, here.url, here.artifact_store)
    return added


def import_notebook(*, storage: str | None = None) -> bool:
    """Creates the study ``notebook`` with the 21 results of the notebook; False if it exists already.

    Raises StudyError if another study has that name; StorageError.
    """
    from studies import notebook, notes

    here = _settings(storage)
    created = notebook.create(database.create(here.url))
    notes.publish_once(notebook.NAME, here.url, here.artifact_store)
    return created


def alive(storage: str | None = None) -> float:
    """Seconds since the last heartbeat of a worker of this machine, for health checks.

    Raises WorkerError if there is none, or if it is older than TRIALYARD_GRACE_SECONDS.
    """
    here = _settings(storage)
    silent = transactions.read(database.connect(here.url), slots.silence)
    if silent is None:
        raise WorkerError("there is no worker on this machine that the database knows of: `trialyard work` starts one")
    if silent > here.grace_seconds:
        raise WorkerError(
            f"this machine's worker sent its last heartbeat {silent:.0f} s ago, more than TRIALYARD_GRACE_SECONDS = "
            f"{here.grace_seconds:g}: see what it printed, and start it again"
        )
    return silent


def serve(
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    storage: str | None = None,
    read_only: bool = False,
    on_listening: Callable[[list[str]], None] = lambda addresses: None,
) -> None:
    """Serves optuna-dashboard until SIGINT or SIGTERM; `on_listening` gets the addresses, `port` 0 takes any free one.

    At any address but this machine's own it needs a password (TRIALYARD_DASHBOARD_PASSWORD). `read_only` refuses
    whatever would change something. Raises DashboardError and StorageError.
    """
    from search import dashboard  # it imports scikit-learn, which takes seconds

    here = _settings(storage)
    opened = database.connect(here.url)
    app = dashboard.application(opened, here.artifact_store, host=host, password=here.password, read_only=read_only)
    dashboard.serve(app, host, port, on_listening)


# --- the database -----------------------------------------------------------------------------------------


def create_storage(storage: str | None = None) -> str:
    """Creates the database's tables if needed; returns its URL without a password. Raises StorageError."""
    url = _settings(storage).url
    database.create(url)
    return transactions.redact(url)


def upgrade_storage(storage: str | None = None) -> tuple[str, list[str]]:
    """Brings the database of an older version up to this one. No worker may run meanwhile.

    Returns the version of its tables, and what was repaired, a sentence each. Raises StorageError.
    """
    return database.upgrade(_settings(storage).url)


def check_storage(storage: str | None = None) -> list[str]:
    """What is wrong with the database, its studies and the object store, a sentence each; empty if nothing is.

    Raises StorageError.
    """
    here = _settings(storage)
    opened, of_store = database.connect(here.url), list[str]()
    try:
        here.artifact_store.check()
    except (ObjectStoreError, SettingsError) as error:
        of_store.append(str(error))
    return database.check(opened) + promises.check(opened) + of_store


def backup_storage(file: str | Path, storage: str | None = None) -> int:
    """Copies the database, as it is at this moment, to a new SQLite file; returns how many trials it has.

    Raises StorageError if `file` exists or cannot be written.
    """
    return database.backup(database.connect_any_version(_settings(storage).url), Path(file))


def _definition(
    source: Source, name: str | None, trials: int | None, epochs: int | None, limit: int | None, skip_bad: bool
) -> Definition:
    changes: dict[str, Any] = {"name": name, "trials": trials, "epochs": epochs, "limit": limit}
    changes["skip_bad"] = skip_bad or None
    if not isinstance(source, Definition):
        definition = definitions.load(str(source), **changes)
    elif all(change is None for change in changes.values()):
        definition = source
    else:
        definition = definitions.parse(definitions.to_toml(source), **changes)
    if definition.confirm is not None:
        raise StudyError(
            f"{definition.name!r} is the definition of a confirmation, and these are counted, because they open "
            f"the test images: `trialyard confirm {definition.confirm.study}` creates it"
        )
    return definition


def _settings(storage: str | None) -> Settings:
    return settings.load(storage=storage)
