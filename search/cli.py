"""The ``trialyard`` command: parses, calls one function, prints.

Progress and logs go to standard error, results to standard output. Exit codes: 0 done, 1 a user's mistake or a failed
check, 2 wrong usage, 130 interrupted. No command imports Keras, and what only training needs is imported where it is
used: `trialyard status` is asked again and again.
"""

import dataclasses
import json
import logging
import signal
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import optuna
import typer
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from search import progress
from search.errors import WorkerError
from search.progress import Lines, LiveTable, Watcher
from storage import artifacts, attributes, database, ledger, owners, retention
from storage import settings as environment
from storage.database import PatientStorage
from storage.errors import SettingsError, StorageError, TrialyardError
from storage.owners import SlotStatus
from storage.settings import Settings
from studies import definition as definitions
from studies import exports, imported, notebook, notes, registry, results
from studies.definition import Definition
from studies.errors import DefinitionError, StudyError
from studies.report import SHOWN_ROWS, ReportContent, collect, counts, table
from studies.report import report as report_of
from studies.results import Row, Status

if TYPE_CHECKING:
    from search.devices import Slot

log = logging.getLogger(__name__)

app = typer.Typer(
    name="trialyard",
    help="Hyperparameter search for Keras image classifiers, on Optuna.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
storage_app = typer.Typer(help="The database itself.", no_args_is_help=True)
app.add_typer(storage_app, name="storage")

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True)

StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Database. Default: TRIALYARD_STORAGE, else ./yard/studies.db"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON value on standard output, nothing else there.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Another name for the study.")]
TrialsOption = Annotated[
    int | None, typer.Option("--trials", min=1, envvar="TRIALYARD_TRIALS", help="Budget in trials.")
]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", min=1, envvar="TRIALYARD_EPOCHS", help="Epochs of a trial.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, envvar="TRIALYARD_LIMIT", help="Use only so many training images.")
]
DevicesOption = Annotated[
    str,
    typer.Option(
        "--devices", metavar="auto|cpu|N,N", envvar="TRIALYARD_DEVICES", help="GPUs by number, the processor, or auto."
    ),
]
PerDeviceOption = Annotated[
    int | None,
    typer.Option("--per-device", min=1, envvar="TRIALYARD_PER_DEVICE", help="So many trials share each device."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, envvar="TRIALYARD_WORKERS", help="So many trials at once here, in all."),
]
Form = Literal["html", "markdown", "table"]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A study in the database.")]
SourceArgument = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A ready definition (see `trialyard catalog`), or a TOML file.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"trialyard {version('trialyard')}", markup=False)
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more on standard error.")] = False,
) -> None:
    """Hyperparameter search for Keras image classifiers, on Optuna."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    handler: logging.Handler = logging.StreamHandler()
    # Beside the live table a line must be printed by rich; elsewhere rich would break it at 80 columns.
    if err.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, handlers=[handler], format="%(message)s")
    for noisy in ("filelock", "alembic", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def catalog(as_json: JsonOption = False) -> None:
    """The ready definitions, one line each."""
    ready = definitions.catalog()
    if as_json:
        _print_json([{"name": name, "description": ready[name].description} for name in ready])
        return
    width = max(map(len, ready))
    for name, definition in ready.items():
        out.print(f"{name:<{width}}  {definition.description}", markup=False)


@app.command()
def check(
    file: SourceArgument, trials: TrialsOption = None, epochs: EpochsOption = None, limit: LimitOption = None
) -> None:
    """Is this definition right, and do its data and model fit?"""
    from search import checks

    definition = definitions.load(file, trials=trials, epochs=epochs, limit=limit)
    data = checks.check(definition, environment.load())
    judged = "test" if definition.data.validation == "test" else "validation"
    out.print(
        f"{definition.name} is right: {definition.trials} trials of {definition.budget.epochs} epochs over "
        f"{', '.join(definition.space)}; {data['train']} training and {data[judged]} {judged} images",
        markup=False,
    )


@app.command()
def create(
    source: SourceArgument,
    storage: StorageOption = None,
    name: NameOption = None,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
) -> None:
    """Put a study into the database, for workers to come."""
    settings = _settings(storage)
    definition = definitions.load(source, name=name, trials=trials, epochs=epochs, limit=limit)
    _, new = _create(definition, settings)
    out.print(
        f"study {definition.name}: {definition.trials} trials; `trialyard work {definition.name}` runs them"
        if new
        else f"study {definition.name} stands already, and nothing was changed",
        markup=False,
    )


@app.command()
def run(
    source: SourceArgument,
    storage: StorageOption = None,
    name: NameOption = None,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    chosen_devices: DevicesOption = "auto",
    per_device: PerDeviceOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a study unless it stands, work on it here, and print the result."""
    from search import checks, devices

    settings = _settings(storage)
    slots = devices.slots(chosen_devices, per_device, workers)
    definition = definitions.load(source, name=name, trials=trials, epochs=epochs, limit=limit)
    place, _ = _create(definition, settings, settings.patience_seconds)
    if not results.status(definition.name, place).ended:
        registry.check_software(definition.name, place, checks.software())
    _work([definition.name], place, settings, slots)
    _print_result(definition.name, place, settings, as_json)


@app.command()
def work(
    studies: Annotated[list[str] | None, typer.Argument(metavar="[STUDY ...]", help="Default: all of them.")] = None,
    storage: StorageOption = None,
    chosen_devices: DevicesOption = "auto",
    per_device: PerDeviceOption = None,
    workers: WorkersOption = None,
    forever: Annotated[bool, typer.Option("--forever", help="Wait for studies to come, until told to stop.")] = False,
) -> None:
    """Be a worker machine: fill every slot with trials, the oldest study first, until nothing is left."""
    from search import devices, worker

    if studies and forever:
        raise typer.BadParameter("with --forever it takes from all studies: name none")
    settings = _settings(storage)
    slots = devices.slots(chosen_devices, per_device, workers)
    place = database.connect_with_retries(settings.url, settings.patience_seconds)
    if forever:
        _work(None, place, settings, slots)
        return
    names = list(dict.fromkeys(studies or registry.names(place)))
    unended = [name for name in names if not results.status(name, place).ended]
    for name in unended if studies else []:
        worker.check_fit(name, place, settings)
    _work(unended, place, settings, slots, leave=not studies)
    for name in _standing(names, place):
        out.print(progress.progress_line(results.status(name, place)), markup=False)
    if not names:
        out.print("there is no study to work on: `trialyard create digits` makes one", markup=False)


@app.command()
def pause(study: StudyArgument, storage: StorageOption = None) -> None:
    """Have all workers put a study's trials back into the queue, and start no more."""
    registry.pause(study, _connected(storage))
    out.print(f"study {study} is paused: `trialyard resume {study}` lets its workers go on", markup=False)


@app.command()
def resume(study: StudyArgument, storage: StorageOption = None) -> None:
    """Let the workers go on with a study that was paused or stopped."""
    registry.resume(study, _connected(storage))
    out.print(f"study {study} is open: `trialyard work {study}` works on it where no worker waits", markup=False)


@app.command()
def stop(study: StudyArgument, storage: StorageOption = None) -> None:
    """End a study with the trials that it has; those that run go back to the queue and stay there."""
    registry.stop(study, _connected(storage))
    out.print(f"study {study} is stopped: `trialyard leaderboard {study}` shows what it found", markup=False)


@app.command("import")
def import_results(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study in the database, or `notebook`.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE.csv]", help="A column a hyperparameter, and `accuracy`.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Put results that were had elsewhere into a study; `import notebook` makes one of the notebook's own."""
    if file is None:
        _import_notebook(study, storage)
        return
    settings = _settings(storage)
    place = database.connect(settings.url)
    added = imported.import_trials(study, file, place)
    _publish(study, place, settings)
    there = "" if added else "; all were there already"
    out.print(f"study {study}: {added} trials were imported{there}", markup=False)


@app.command()
def report(
    study: StudyArgument,
    storage: StorageOption = None,
    form: Annotated[Form, typer.Option("--format", help="A page, text, or a table in the terminal.")] = "html",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Default: STUDY-report.html or .md, here.")
    ] = None,
) -> None:
    """What was found, what made the difference, and what cannot be concluded, in one file."""
    settings = _settings(storage)
    place = database.connect(settings.url)
    if form == "table":
        if output is not None:
            raise typer.BadParameter("--format table is for the terminal: --output goes with html or markdown")
        _print_report(collect(study, place))
        return
    text = report_of(study, place, form, settings.artifact_folder)
    file = output or Path(f"{study}-report.{'html' if form == 'html' else 'md'}")
    _write(file, text)
    out.print(f"the report of {study} is in {file}", markup=False)


@app.command()
def dashboard(
    storage: StorageOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to serve at; any but this machine's own needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8080,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse whatever would change something.")] = False,
) -> None:
    """Serve optuna-dashboard for a browser, until Ctrl-C or SIGTERM."""
    from search import dashboard as pages  # it imports scikit-learn, which takes seconds

    settings = _settings(storage)
    place = database.connect(settings.url)
    application = pages.application(
        place, settings.artifact_folder, host=host, password=settings.password, read_only=read_only
    )
    pages.serve(application, host, port, lambda at: _print_served(at, place))


@app.command()
def export(
    study: StudyArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="tflite|onnx|savedmodel", help="The model in this format, too."),
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Take the best trial away: its model, history and definition, and a README that uses them."""
    target = exports.export(study, folder, None if form is None else exports.format_of(form), _connected(storage))
    out.print(f"the best of {study} is in {target}", markup=False)


@app.command()
def delete(study: StudyArgument, storage: StorageOption = None, yes: YesOption = False) -> None:
    """Remove a study with all its trials, models and histories; asks first."""
    place = _connected(storage)
    found = results.status(study, place)
    done = found.complete + found.pruned + found.failed
    _ask(f"Remove study {study} with its {done} finished trials, and their models and histories?", yes)
    freed = registry.delete(study, place)
    out.print(f"study {study} is gone, and {_bytes(freed)} are free", markup=False)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Default: all of them.")] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Counts, best so far, who is running what, time left."""
    place = _connected(storage)
    found = [results.status(name, place) for name in ([study] if study else registry.names(place))]
    workers = [] if study else results.workers(place)
    if as_json:
        records = [dataclasses.asdict(one) for one in found]
        everything = {"studies": records, "workers": [dataclasses.asdict(one) for one in workers]}
        _print_json(records[0] if study else everything)
        return
    for one in found:
        _print_status(one)
    if not found:
        out.print("there is no study yet: `trialyard create digits` makes one", markup=False)
    _print_workers(workers)


@app.command()
def alive(storage: StorageOption = None) -> None:
    """Does a worker of this machine work? For health checks: exit code 1, and why, where none does."""
    settings = _settings(storage)
    silent = database.read(database.connect(settings.url), owners.silence)
    if silent is None:
        raise WorkerError("there is no worker on this machine that the database knows of: `trialyard work` is one")
    if silent > settings.grace_seconds:
        raise WorkerError(
            f"the last sign of this machine's worker is {silent:.0f} s old, more than TRIALYARD_GRACE_SECONDS = "
            f"{settings.grace_seconds:g}: see what it printed, and start it again"
        )
    out.print(f"a worker of this machine gave its last sign {silent:.0f} s ago", markup=False)


@app.command()
def best(study: StudyArgument, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """The best trial: value, hyperparameters, where its model lies."""
    settings = _settings(storage)
    trial = results.best_trial(study, database.connect(settings.url))
    if as_json:
        _print_json(_record(study, trial, settings))
    else:
        _print_best(study, trial, settings)


@app.command()
def leaderboard(
    study: StudyArgument,
    storage: StorageOption = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="Only so many.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Trials as a table, best first."""
    rows = results.leaderboard(study, _connected(storage), top)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
    else:
        _print_rows(rows)


@storage_app.command("create")
def storage_create(storage: StorageOption = None) -> None:
    """Make the database's tables unless they stand."""
    url = _settings(storage).url
    database.create(url)
    out.print(f"the database {database.redact(url)} stands", markup=False)


@storage_app.command("upgrade")
def storage_upgrade(storage: StorageOption = None) -> None:
    """Bring the database of an older version up to this one, with no worker running; make a backup before."""
    url = _settings(storage).url
    revision, repaired = database.upgrade(url)
    for sentence in repaired:
        out.print(sentence, markup=False)
    out.print(f"the database {database.redact(url)} has the tables of this version ({revision})", markup=False)


@storage_app.command("check")
def storage_check(storage: StorageOption = None) -> None:
    """Is the database whole, and does each study keep its promises?"""
    place = _connected(storage)
    url = database.redact(place.url)
    problems = database.check(place) + ledger.check(place)
    if problems:
        raise StorageError(f"{len(problems)} problems in {url}: {'; '.join(problems)}")
    out.print(f"the database {url} is whole, with {len(registry.names(place))} studies", markup=False)


@storage_app.command("backup")
def storage_backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")], storage: StorageOption = None
) -> None:
    """Copy the whole database, as it is at this moment, to a new SQLite file; workers may go on."""
    trials = database.backup(_connected(storage), file)
    out.print(f"{trials} trials are in {file}: `--storage sqlite:///{file}` reads them", markup=False)


@storage_app.command("prune")
def storage_prune(storage: StorageOption = None, yes: YesOption = False) -> None:
    """Remove files that no trial of this database needs; lists them, and asks first."""
    settings = _settings(storage)
    place, keep = database.connect(settings.url), settings.keep_models
    files = retention.unneeded(place, settings.artifact_folder, keep)
    for file in files:
        err.print(f"{file.path}: {_bytes(file.size)}, {file.why}", markup=False, highlight=False, soft_wrap=True)
    if files:
        _ask(f"Remove these {len(files)} files, {_bytes(sum(file.size for file in files))}?", yes)
    freed = retention.remove(place, settings.artifact_folder, keep, files)
    out.print(f"{_bytes(freed)} are free, below {settings.artifact_folder}", markup=False)


# --- what several commands do -----------------------------------------------------------------------------


def _settings(storage: str | None) -> Settings:
    if storage is not None and database.has_password(storage):
        raise SettingsError(
            f"--storage {database.redact(storage)} has a password in it, which everybody sees in the process list: "
            "put the URL into TRIALYARD_STORAGE, or into a file that TRIALYARD_STORAGE_FILE names"
        )
    return environment.load(storage=storage)


def _connected(storage: str | None) -> PatientStorage:
    return database.connect(_settings(storage).url)


def _create(definition: Definition, settings: Settings, patience: float = 0.0) -> tuple[PatientStorage, bool]:
    from search import checks

    # Everything is checked before the database is touched, the data and a user's own model included.
    data = checks.check(definition, settings)
    place = database.create(settings.url, patience)
    return place, registry.create(definition, place, data)


def _work(
    names: list[str] | None, place: PatientStorage, settings: Settings, slots: "list[Slot]", *, leave: bool = False
) -> None:
    """Works on the studies here, showing progress. Exits with 130 when a signal ended it."""
    from search import worker
    from search.devices import precision_for

    if names is not None and all(results.status(name, place).ended for name in names):
        for name in names:
            _print_closed(name, place)
        return
    for name in names or []:
        try:
            definition = registry.definition_of(name, place)
        except DefinitionError:
            if leave:
                continue  # the worker will say why it leaves this study
            raise
        precision, reason = precision_for(slots[0].device, definition.precision)
        err.print(f"{name}: {_told(slots)} in {precision}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if names is None:
        err.print(f"waiting for studies, {_told(slots)}", markup=False, highlight=False, soft_wrap=True)
    watcher = _watcher(names, [slot.name for slot in slots], place)
    if not worker.work(names, place, settings, slots, watcher, leave=leave):
        left = "is taken back by the next worker" if place.shutting_down.is_set() else "is back in the queue"
        again = "the same command goes on where it stopped"
        err.print(f"interrupted: what ran {left}; {again}", markup=False, soft_wrap=True)
        raise typer.Exit(130)
    for name in _standing(names or [], place):
        _print_closed(name, place)


def _print_closed(name: str, place: PatientStorage) -> None:
    """Says of a study that is not open that it is not, and how it is opened."""
    state = results.status(name, place).state
    if state != "open":
        told = f"study {name} is {state}: `trialyard resume {name}`, and the same command goes on"
        err.print(told, markup=False, soft_wrap=True)


def _standing(names: list[str], place: PatientStorage) -> list[str]:
    """Those that were not deleted meanwhile."""
    there = registry.names(place)
    return [name for name in names if name in there]


def _told(slots: "list[Slot]") -> str:
    """For the first line: the slots, and the threads of each."""
    threads = f" of {slots[0].threads} threads" if slots[0].threads > 1 else ""
    return f"on {', '.join(slot.name for slot in slots)}{threads}"


def _watcher(names: list[str] | None, slots: list[str], place: PatientStorage) -> Watcher:
    def ask(name: str) -> Status:
        return results.status(name, place)

    return LiveTable(err, names, slots, ask) if err.is_terminal else Lines(err, ask)


def _print_result(study: str, place: PatientStorage, settings: Settings, as_json: bool) -> None:
    found = results.status(study, place)
    if found.failures:
        err.print(_failed(found), markup=False, highlight=False, soft_wrap=True)
    trial = results.best_trial(study, place)
    if as_json:
        _print_json(_record(study, trial, settings))
        return
    _print_rows(results.leaderboard(study, place))
    out.print()
    _print_best(study, trial, settings)


def _failed(found: Status) -> str:
    return f"{found.failed} of {found.study}'s trials failed ({'; '.join(found.failures)})"


def _record(study: str, trial: FrozenTrial, settings: Settings) -> dict[str, Any]:
    return {
        "study": study,
        "number": trial.number,
        "value": trial.values[0],
        "params": trial.params,
        "user_attrs": trial.user_attrs,
        # A model may be on another machine.
        "model": model if (model := _path(trial, "model", settings)) and Path(model).is_file() else None,
        "history": _path(trial, "history", settings),
        "began": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
    }


def _path(trial: FrozenTrial, artifact: str, settings: Settings) -> str | None:
    path = artifacts.inside(settings.artifact_folder, trial.user_attrs.get(artifact))
    return None if path is None else str(path)


def _time(moment: datetime | None) -> str | None:
    # Optuna gives naive local time; a reader elsewhere needs the offset.
    return None if moment is None else moment.astimezone().isoformat(timespec="seconds")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _print_best(study: str, trial: FrozenTrial, settings: Settings) -> None:
    told = trial.user_attrs
    judged = "test (the notebook's protocol)" if told.get("protocol") == "test" else "validation"
    out.print(f"best of {study}: trial {trial.number}, {judged} accuracy {trial.values[0]:.4f}", markup=False)
    out.print(f"  hyperparameters  {progress.shown(trial.params)}", markup=False)
    best_epoch, epochs, parameters, seconds, speed = numbers = [
        attributes.number(told.get(key))
        for key in ("best_epoch", "epochs", "parameters", "seconds", "images_per_second")
    ]
    if None not in numbers:  # else others added it
        out.print(
            f"  training         best epoch {best_epoch} of {epochs}, {parameters:,} weights, "
            f"{seconds:.1f} s, {speed:,.0f} images/s in {told.get('precision')}",
            markup=False,
        )
    model = _path(trial, "model", settings)
    if model is not None:
        where = "" if Path(model).is_file() else " (not on this machine)"
        out.print(f"  model            {model}{where}", markup=False)


def _print_rows(rows: list[Row]) -> None:
    if not rows:
        out.print("no trial is complete yet", markup=False)
        return
    titles, cells = table(rows)
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    head, *lines = ("  ".join(map(str.rjust, line, widths)) for line in (titles, *cells))
    out.print(head, style="bold", markup=False)
    # Not as a table of rich's, which takes a millisecond a row.
    out.file.writelines(f"{line}\n" for line in lines)


def _print_workers(workers: list[SlotStatus]) -> None:
    for one in workers:
        doing = "waits" if one.study is None else f"{one.study} trial {one.trial}, epoch {one.epoch}"
        out.print(
            f"{one.slot} of {one.host} (process {one.pid}, {one.device}): {doing}, last sign "
            f"{one.silent_seconds:.0f} s ago",
            markup=False,
        )


def _print_status(found: Status) -> None:
    if found.state != "open":
        line = f"{found.study}: {found.state}"
    else:
        line = f"{found.study}: ended" if found.ended else progress.progress_line(found)
    out.print(line, style="bold", markup=False)
    if found.protocol == "test":
        out.print("  judged on the test set: the notebook's protocol, for comparison only", markup=False)
    out.print(
        f"  {found.complete} complete, {found.pruned} pruned, {found.failed} failed, {found.running} running, "
        f"{found.waiting} waiting, budget {found.budget}",
        markup=False,
    )
    if (found.ended or found.state != "open") and found.best is not None:
        out.print(f"  best {found.best:.4f} (trial {found.best_number})", markup=False)
    if found.failures:
        out.print(f"  {_failed(found)}", markup=False)
    if found.outside:
        out.print(f"  {ledger.started_outside_text(found.outside)}", markup=False)
    for one in found.workers:
        out.print(
            f"  trial {one.number} on {one.slot} of {one.host} (process {one.pid}), attempt {one.attempt}, "
            f"epoch {one.epoch}, last sign "
            f"{one.silent_seconds:.0f} s ago",
            markup=False,
        )


def _print_served(addresses: list[str], place: PatientStorage) -> None:
    shown = database.redact(place.url)
    err.print(
        f"the dashboard of {shown} is at {', '.join(addresses)} until Ctrl-C",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _import_notebook(study: str, storage: str | None) -> None:
    if study != notebook.NAME:
        raise typer.BadParameter(f"a file is missing: `trialyard import {study} results.csv`")
    settings = _settings(storage)
    place = database.create(settings.url)
    new = notebook.create(place)
    _publish(study, place, settings)
    told = "has the notebook's 21 results" if new else "stands already, and nothing was added"
    out.print(f"study {study} {told}: `trialyard leaderboard {study}` shows them", markup=False)


def _publish(study: str, place: PatientStorage, settings: Settings) -> None:
    """Writes the notes and figures of a study that no worker may ever work on."""
    notes.publish(study, place, settings.artifact_folder, optuna.storages.get_storage(place), last=True)


def _write(file: Path, text: str) -> None:
    try:
        with artifacts.written_atomically(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{file} cannot be written ({error.strerror}): give another file with --output") from None


def _print_report(told: ReportContent) -> None:
    out.print(told.definition.name, style="bold", markup=False)
    out.print(f"  {counts(told.status)}", markup=False)
    for title, sentences in (
        ("found", told.findings.best),
        ("made the difference", told.findings.influences),
        ("cannot be concluded", told.findings.cautions),
    ):
        for number, sentence in enumerate(sentences):
            out.print(f"  {title if number == 0 else '':<19}  {sentence}", markup=False)
    out.print()
    _print_rows(told.rows[:SHOWN_ROWS])


def _ask(question: str, yes: bool) -> None:
    """Exits with 1 unless the answer is yes."""
    if yes:
        return
    # On standard error, unlike typer's own prompt: standard output is for results.
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        sys.stderr.write("nothing was removed\n")
        raise typer.Exit(1)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def main() -> None:
    """The program's entry: a user's mistake is one line, and never a traceback."""
    # While a worker works it has a handler of its own; else Ctrl-C ends the command, and nothing is half done. SIGTERM,
    # too: the first process of a container would not hear it otherwise.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        app(prog_name="trialyard")
    except TrialyardError as error:
        _end(str(error))
    except (OptunaError, SQLAlchemyError) as error:
        log.debug("the whole error", exc_info=error)
        _end(f"the database did not answer ({error.__cause__ or error}): is it there, whole, and writable?")


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    sys.stderr.write("interrupted\n")
    sys.exit(130)


def _end(message: str) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
