"""The ``trialyard`` command: parses, calls one function, prints.

Progress and logs go to standard error, results to standard output. Exit codes: 0 done, 1 a user's mistake or a failed
check, 2 wrong usage, 130 interrupted. No command imports Keras, and what only training needs is imported where it is
used: `trialyard status` is asked again and again.
"""

import dataclasses
import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from search import (
    interruption,
    look_commands,
    plain_text,
    slurm_command,
    start_commands,
    storage_commands,
    study_commands,
)
from search.completion import study_names
from search.help import DATABASE, HELP_OPTIONS, LOOK, OPERATE, START, TAKE_AWAY, Commands
from search.options import (
    DevicesOption,
    EpochsOption,
    Form,
    GpusOption,
    IdleMinutesOption,
    JsonOption,
    LimitOption,
    MinutesOption,
    NameOption,
    PerDeviceOption,
    PrintOption,
    RayOption,
    SbatchOption,
    SkipBadOption,
    SlurmOption,
    SourceArgument,
    StorageOption,
    StudyArgument,
    TrialsOption,
    WorkersOption,
    YesOption,
    invocation,
    settings_of,
)
from storage.errors import TrialyardError, many

if TYPE_CHECKING:
    from search.service import Interrupted
    from storage.settings import Settings
    from studies.results import Status

log = logging.getLogger(__name__)

app = typer.Typer(
    name="trialyard",
    help="Hyperparameter search for Keras image classifiers, on Optuna.",
    no_args_is_help=True,
    cls=Commands,
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(storage_commands.app, name="storage", rich_help_panel=DATABASE)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from search.terminal import say

        say(f"trialyard {version('trialyard')}")
        raise typer.Exit


def _log_more(wanted: bool) -> None:
    if wanted:
        logging.getLogger().setLevel(logging.DEBUG)


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    # Its callback does it: every command has this option, too (`search.help.Commands`).
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", expose_value=False, callback=_log_more, help="Say more on standard error."),
    ] = False,
) -> None:
    """Hyperparameter search for Keras image classifiers, on Optuna."""
    import optuna

    from search.terminal import err

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    handler: logging.Handler = logging.StreamHandler()
    # Beside the live table a line must be printed by rich; elsewhere rich would break it at 80 columns.
    if err.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.basicConfig(handlers=[handler], format="%(message)s")  # from warnings on, unless `_log_more` was asked
    for noisy in ("filelock", "alembic", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


for look_command in look_commands.COMMANDS:
    app.command(rich_help_panel=LOOK)(look_command)

for start_command in (start_commands.init, start_commands.catalog):
    app.command(rich_help_panel=START)(start_command)


@app.command(rich_help_panel=START)
def check(
    file: SourceArgument,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    skip_bad: SkipBadOption = False,
) -> None:
    """Check a definition, its data and its model on this machine."""
    from search import service
    from search.terminal import print_check

    print_check(service.check(file, trials=trials, epochs=epochs, limit=limit, skip_bad=skip_bad))


@app.command(rich_help_panel=START)
def create(
    source: SourceArgument,
    storage: StorageOption = None,
    name: NameOption = None,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    skip_bad: SkipBadOption = False,
) -> None:
    """Put a study into the database, for workers to come."""
    from search import service
    from search.terminal import say

    url = settings_of(storage).url
    creation = service.create(
        source, name=name, trials=trials, epochs=epochs, limit=limit, skip_bad=skip_bad, storage=url
    )
    study, budget = creation.study.name, creation.study.budget
    say(
        f"study {study}: {many(budget.trials, 'trial')}; {invocation(f'work {study}', storage)} runs them"
        if creation.changed
        else f"study {study} exists already, and nothing was changed"
    )


@app.command(rich_help_panel=START)
def run(
    source: SourceArgument,
    storage: StorageOption = None,
    name: NameOption = None,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    skip_bad: SkipBadOption = False,
    chosen_devices: DevicesOption = "auto",
    per_device: PerDeviceOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create the study if needed, run it here, print the result."""
    from search import service
    from search.terminal import out, print_best, print_end, print_json, print_not_shown, print_rows, record
    from studies import definition as definitions
    from studies import results
    from studies.errors import StudyError

    here = settings_of(storage)
    changes = {"name": name, "trials": trials, "epochs": epochs, "limit": limit, "skip_bad": skip_bad or None}
    definition = definitions.load(source, **changes)
    try:
        trial = service.run(
            definition, storage=here.url, devices=chosen_devices, per_device=per_device, workers=workers
        )
    except service.Interrupted as stop:
        _exit_after(stop)
    except StudyError:
        _print_problems(definition.name, here, storage)
        raise
    _print_problems(definition.name, here, storage)
    if as_json:
        print_json(record(definition.name, trial, here))
        return
    rows = results.leaderboard(definition.name, here.url)
    print_rows(rows)
    print_not_shown(results.status(definition.name, here.url), len(rows), storage)
    out.print()
    print_best(definition.name, trial, here, results.as_good_as_best(definition.name, here.url))
    can_confirm = service.can_confirm(definition.name, storage=here.url)
    print_end(definition.name, here.url, storage=storage, can_confirm=can_confirm)


@app.command(rich_help_panel=OPERATE)
def work(
    studies: Annotated[
        list[str] | None,
        typer.Argument(metavar="STUDY ...", help="Default: all of them.", autocompletion=study_names),
    ] = None,
    storage: StorageOption = None,
    chosen_devices: DevicesOption = "auto",
    per_device: PerDeviceOption = None,
    workers: WorkersOption = None,
    forever: Annotated[bool, typer.Option("--forever", help="Wait for studies to come, until asked to stop.")] = False,
    ray: RayOption = None,
    slurm: SlurmOption = None,
    gpus: GpusOption = None,
    sbatch: SbatchOption = None,
    print_script: PrintOption = False,
    minutes: MinutesOption = None,
    idle_minutes: IdleMinutesOption = None,
) -> None:
    """Fill every slot of this machine with trials.

    Of all studies, shared fairly, until nothing is left.
    """
    from search import service
    from search.summary import progress_line
    from search.terminal import say
    from studies import registry, results

    if studies and forever:
        raise typer.BadParameter("with --forever it takes trials of all studies: name none")
    if ray is not None and slurm is not None:
        raise typer.BadParameter("--ray and --slurm place the workers in two ways: give one of them")
    here = settings_of(storage)
    if slurm_command.submit(
        *(studies or ()),
        asked=slurm_command.Asked(jobs=slurm, gpus=gpus, sbatch=sbatch or (), only_print=print_script),
        storage=storage,
        devices=chosen_devices,
        per_device=per_device,
        workers=workers,
        forever=forever,
        minutes=minutes,
        idle_minutes=idle_minutes,
    ):
        return
    try:
        names = service.work(
            *(studies or ()),
            storage=here.url,
            devices=chosen_devices,
            per_device=per_device,
            workers=workers,
            ray=ray,
            gpus=gpus,
            forever=forever,
            minutes=minutes,
            idle_minutes=idle_minutes,
        )
    except service.Interrupted as stop:
        _exit_after(stop)
    existing = registry.names(here.url)  # some may have been deleted meanwhile
    for status in [results.status(name, here.url) for name in names if name in existing]:
        _print_closed(status, storage)
        say(progress_line(status))
    if not names and not forever:
        say(f"there is no study to work on: {invocation('create digits', storage)} makes one")


@app.command(rich_help_panel=START)
def confirm(
    study: StudyArgument,
    top: Annotated[int | None, typer.Option("--top", help="How many of the best configurations. Default: 3.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds to train each from.")] = 8,
    storage: StorageOption = None,
    chosen_devices: DevicesOption = "auto",
    per_device: PerDeviceOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the best again from 8 seeds; judge them by test images."""
    from search import service
    from search.terminal import print_confirmed, print_json

    try:
        found = service.confirm(
            study,
            top=top,
            seeds=seeds,
            storage=settings_of(storage).url,
            devices=chosen_devices,
            per_device=per_device,
            workers=workers,
        )
    except service.Interrupted as stop:
        _exit_after(stop)
    if as_json:
        content = dataclasses.asdict(found)
        for record, estimate in zip(content["estimates"], found.estimates, strict=True):
            record["shrinkage"] = estimate.shrinkage
        print_json(content)
    else:
        print_confirmed(found)


@app.command(rich_help_panel=LOOK)
def replay(
    study: StudyArgument,
    number: Annotated[int, typer.Argument(metavar="NUMBER", min=0, help="A complete trial.")],
    storage: StorageOption = None,
    chosen_devices: DevicesOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a trial again from its record, and compare the numbers.

    Exit code 1 if they do not confirm the record.
    """
    from search import service
    from search.terminal import print_json, print_replayed, replayed_epoch_text, warn

    found = service.replay(
        study,
        number,
        storage=settings_of(storage).url,
        devices=chosen_devices,
        on_difference=lambda difference: warn(f"not as it was: {difference}"),
        on_epoch=lambda epoch: warn(replayed_epoch_text(epoch)),
    )
    if as_json:
        print_json(dataclasses.asdict(found) | {"exact": found.is_exact, "holds": found.holds})
    else:
        print_replayed(found)
    if not found.holds:
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def compare(
    study: StudyArgument,
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER", help="Another study. Default: the notebook's results.", autocompletion=study_names
        ),
    ] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put two studies side by side, or one beside the notebook."""
    from search.terminal import print_compared, print_json, print_notebook_rows
    from studies import comparison

    url = settings_of(storage).url
    if other is not None:
        found = comparison.compare(study, other, url)
        if as_json:
            print_json(dataclasses.asdict(found))
        else:
            print_compared(found)
        return
    rows = comparison.compare_notebook(study, url)
    if as_json:
        print_json([dataclasses.asdict(row) | {"difference": row.difference, "agrees": row.agrees} for row in rows])
    else:
        print_notebook_rows(rows)


for command in (study_commands.pause, study_commands.resume, study_commands.stop):
    app.command(rich_help_panel=OPERATE)(command)
app.command(rich_help_panel=OPERATE)(study_commands.enqueue)
app.command(rich_help_panel=OPERATE)(study_commands.retry)
# -5 is a number here, and no option.
app.command(rich_help_panel=OPERATE, context_settings={"ignore_unknown_options": True})(study_commands.priority)


@app.command("import", rich_help_panel=OPERATE)
def import_results(
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="A study in the database, or `notebook`.", autocompletion=study_names),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE.csv", help="One column per hyperparameter, and `accuracy`.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Import results obtained elsewhere.

    `import notebook` creates a study of the notebook's own.
    """
    from search import service
    from search.terminal import say
    from studies import notebook

    url = settings_of(storage).url
    if file is not None:
        added = service.import_results(study, file, storage=url)
        already = "" if added else "; all of them existed already"
        line = f"study {study}: {many(added, 'trial was', 'trials were')} imported{already}"
    elif study == notebook.NAME:
        new = service.import_notebook(storage=url)
        content = "has the notebook's 21 results" if new else "exists already, and nothing was added"
        line = f"study {study} {content}: {invocation(f'leaderboard {study}', storage)} shows them"
    else:
        raise typer.BadParameter(f"a file is missing: `trialyard import {study} results.csv`")
    say(line)


@app.command(rich_help_panel=LOOK)
def report(
    study: StudyArgument,
    storage: StorageOption = None,
    form: Annotated[Form, typer.Option("--format", help="A page, text, or a table in the terminal.")] = "html",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Default: STUDY-report.html or .md, here.")
    ] = None,
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="Of this trial, in whatever state.")] = None,
) -> None:
    """What was found, and what cannot be concluded, in one file."""
    from search.terminal import print_report, say
    from storage import artifacts
    from studies.errors import StudyError
    from studies.rendering import report as report_of

    here = settings_of(storage)
    if form == "table":
        if output is not None:
            raise typer.BadParameter("--format table is for the terminal: --output goes with html or markdown")
        print_report(report_of(study, here.url, "markdown", trial=trial))
        return
    text = report_of(study, here.url, form, trial=trial)
    what = "report" if trial is None else f"trial-{trial}"
    file = output or Path(f"{study}-{what}.{'html' if form == 'html' else 'md'}")
    try:
        with artifacts.written_atomically(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a path without a file's name
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"{file} cannot be written ({reason}): give another file with --output") from None
    say(f"the report of {study if trial is None else f'trial {trial} of {study}'} is in {file}")


@app.command(rich_help_panel=LOOK)
def dashboard(
    storage: StorageOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to serve at; any but this machine's own needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8080,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse whatever would change something.")] = False,
) -> None:
    """Serve optuna-dashboard for a browser, until Ctrl-C."""
    from search import service
    from search.terminal import warn
    from storage.transactions import redact

    url = settings_of(storage).url
    service.serve(
        host,
        port,
        storage=url,
        read_only=read_only,
        on_listening=lambda addresses: warn(
            f"the dashboard of {redact(url)} is at {', '.join(addresses)} until Ctrl-C"
        ),
    )


@app.command(rich_help_panel=TAKE_AWAY)
def export(
    study: StudyArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="tflite|onnx|savedmodel", help="The model in this format, too."),
    ] = None,
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="This trial. Default: the best.")] = None,
    storage: StorageOption = None,
) -> None:
    """Copy the best model and what belongs to it to a folder.

    Its history and definition, and a README that uses them.
    """
    from search.terminal import say
    from studies import exports

    chosen = None if form is None else exports.format_of(form)
    target = exports.export(study, folder, chosen, settings_of(storage).url, trial=trial)
    say(f"the {'best model' if trial is None else f'model of trial {trial}'} of {study} is in {target}")


@app.command(rich_help_panel=OPERATE)
def delete(study: StudyArgument, storage: StorageOption = None, yes: YesOption = False) -> None:
    """Remove a study with its trials and files; asks first."""
    from search.terminal import ask, say, size_text
    from studies import registry, results

    url = settings_of(storage).url
    status = results.status(study, url)
    ask(f"Remove study {study} with its {status.finished} finished trials, and their models and histories?", yes)
    freed = registry.delete(study, url)
    say(f"study {study} was deleted, and {size_text(freed)} were freed")


@app.command(rich_help_panel=OPERATE)
def alive(storage: StorageOption = None) -> None:
    """Check that a worker of this machine works.

    For health checks: if none does, exit code 1 and the reason.
    """
    from search import service
    from search.terminal import say

    silent = service.alive(settings_of(storage).url)
    say(f"a worker of this machine sent its last heartbeat {silent:.0f} s ago")


# --- what several commands do -----------------------------------------------------------------------------


def _exit_after(stop: "Interrupted") -> NoReturn:
    from search.terminal import warn

    requeued, not_yet = "any running trials are back in the queue", "the next worker takes any running trials back"
    warn(f"interrupted: {requeued if stop.requeued else not_yet}; run the same command again to continue")
    raise typer.Exit(130) from None


def _print_problems(study: str, here: "Settings", storage: str | None) -> None:
    """Says that a study is not open, and why trials of it failed."""
    from search.terminal import failures_text, warn
    from studies import results

    try:
        status = results.status(study, here.url)
    except TrialyardError:
        return  # there is none: the error that follows says so
    _print_closed(status, storage)
    if status.failures:
        warn(failures_text(status))


def _print_closed(status: "Status", storage: str | None) -> None:
    from search.terminal import pause_text, warn

    if status.pause_reason is not None:
        warn(f"study {status.study} is {pause_text(status, storage)}")
    elif status.state != "open":
        resume = invocation(f"resume {status.study}", storage)
        warn(f"study {status.study} is {status.state}: {resume}, and the same command goes on")


def main() -> None:
    """The program's entry: a user's mistake is one line, and never a traceback."""
    interruption.end_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may know ASCII alone, and a study's description may be in any language.
            stream.reconfigure(errors=plain_text.ERRORS)
    try:
        app(prog_name="trialyard")
    except TrialyardError as error:
        _end(str(error))
    except Exception as error:
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        if isinstance(error, UnicodeEncodeError):  # of what the shell gave
            _end(f"{error.object!r} is not valid UTF-8: type it in UTF-8")
        if not isinstance(error, (OptunaError, SQLAlchemyError)):
            raise
        log.debug("the whole error", exc_info=error)
        _end(
            f"the database did not answer ({error.__cause__ or error}): does it exist, is it undamaged, and may you "
            "write to it?"
        )


def _end(message: str) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
