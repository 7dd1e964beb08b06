"""The commands below ``trialyard storage``: the database itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.help import Commands
from search.options import StorageOption, YesOption, settings_of
from storage.errors import StorageError, many

if TYPE_CHECKING:
    from storage.retention import UnneededFile
    from storage.trainer_logs import OldLog

app = typer.Typer(help="Create, check, upgrade, copy or tidy up the database.", no_args_is_help=True, cls=Commands)


@app.command("create")
def storage_create(storage: StorageOption = None) -> None:
    """Make the database's tables if needed."""
    from search import service
    from search.terminal import say

    say(f"the database {service.create_storage(settings_of(storage).url)} is ready")


@app.command("upgrade")
def storage_upgrade(storage: StorageOption = None) -> None:
    """Bring the database of an older version up to this one.

    No worker may run meanwhile. Make a backup before.
    """
    from search import service
    from search.terminal import say
    from storage.transactions import redact

    url = settings_of(storage).url
    revision, repaired = service.upgrade_storage(url)
    for sentence in repaired:
        say(sentence)
    say(f"the database {redact(url)} has the tables of this version ({revision})")


@app.command("check")
def storage_check(storage: StorageOption = None) -> None:
    """Check the database, and what each study promises."""
    from search import service
    from search.terminal import say
    from storage.transactions import redact
    from studies import registry

    url = settings_of(storage).url
    problems = service.check_storage(url)
    if problems:
        raise StorageError(f"{many(len(problems), 'problem')} in {redact(url)}: {'; '.join(problems)}")
    say(f"the database {redact(url)} has no problems, and {many(len(registry.names(url)), 'study', 'studies')}")


@app.command("backup")
def storage_backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")], storage: StorageOption = None
) -> None:
    """Copy the whole database to a new SQLite file.

    As it is at this moment; workers may go on.
    """
    from search import service
    from search.terminal import say
    from storage.settings import sqlite_url

    trials = service.backup_storage(file, settings_of(storage).url)
    say(f"{many(trials, 'trial is', 'trials are')} in {file}: `--storage {sqlite_url(file)}` reads them")


@app.command("prune")
def storage_prune(storage: StorageOption = None, yes: YesOption = False) -> None:
    """Remove files that no trial of this database needs, and old logs; asks first."""
    from search import service
    from search.terminal import ask, say, size_text, warn

    here = settings_of(storage)
    found = service.leftovers(here.url)
    for folder in found.of_others:
        warn(f"{here.artifact_store.name(folder)}: kept, since it may be another database's: this one never had it")
    listed: list[UnneededFile | OldLog] = [*found.files, *found.logs]
    for file in listed:
        warn(f"{file.path}: {size_text(file.size)}, {file.why}")
    if listed:
        files = "this file" if len(listed) == 1 else f"these {len(listed)} files"
        ask(f"Remove {files}, {size_text(sum(file.size for file in listed))}?", yes)
    logs = f" and in {here.log_folder}" if found.logs else ""
    say(f"{size_text(service.prune(found, here.url))} were freed below {here.artifact_store.name('')}{logs}")
