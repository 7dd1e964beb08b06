"""The options that several commands have, and the settings that they lead to."""

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from search.completion import study_names
from storage.errors import SettingsError

if TYPE_CHECKING:
    from storage.settings import Settings

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
    int | None, typer.Option("--limit", min=1, envvar="TRIALYARD_LIMIT", help="How many training images to use.")
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out image files that cannot be read.")]
DevicesOption = Annotated[
    str,
    typer.Option(
        "--devices", metavar="auto|cpu|N,N", envvar="TRIALYARD_DEVICES", help="GPUs by number, the processor, or auto."
    ),
]
PerDeviceOption = Annotated[
    int | None,
    typer.Option("--per-device", min=1, envvar="TRIALYARD_PER_DEVICE", help="How many trials share each device."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, envvar="TRIALYARD_WORKERS", help="How many trials run at once, in all."),
]
SlurmOption = Annotated[
    int | None,
    typer.Option("--slurm", metavar="N", min=1, help="Submit an array job of N such workers to Slurm, and exit."),
]
SbatchOption = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="OPTION", help="An option of sbatch, such as partition=gpu; may be repeated."),
]
PrintOption = Annotated[bool, typer.Option("--print", help="Print the script for Slurm, and submit nothing.")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", metavar="auto|ADDRESS", help="Run the --workers on a Ray cluster, not on this machine."),
]
GpusOption = Annotated[
    float | None,
    typer.Option("--gpus", min=0.0, metavar="N", help="GPUs of each worker with --slurm; of each slot with --ray."),
]
MinutesOption = Annotated[
    float | None,
    typer.Option("--minutes", metavar="M", help="Requeue what runs after M minutes; start none that takes longer."),
]
IdleMinutesOption = Annotated[
    float | None, typer.Option("--idle-minutes", metavar="M", help="Exit after M minutes without work.")
]
Form = Literal["html", "markdown", "table"]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study in the database.", autocompletion=study_names)
]
SourceArgument = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A ready definition (see `trialyard catalog`), or a TOML file.")
]


def invocation(text: str, storage: str | None) -> str:
    """The command ``trialyard {text}``, to be copied from a message: with the database that this one was given.

    `storage` is the option's value. It has no password, see `settings_of`.
    """
    return f"`trialyard {text}`" if storage is None else f"`trialyard {text} --storage {shlex.quote(storage)}`"


def settings_of(storage: str | None) -> "Settings":
    """The settings, with this database if one is given. Raises SettingsError for a URL with a password in it."""
    from storage import settings
    from storage.transactions import has_password, redact

    if storage is not None and has_password(storage):
        raise SettingsError(
            f"--storage {redact(storage)} has a password in it, which everybody sees in the process list: put the URL "
            "into TRIALYARD_STORAGE, or into a file that TRIALYARD_STORAGE_FILE names"
        )
    return settings.load(storage=storage)
