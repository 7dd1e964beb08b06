"""What `trialyard storage prune` lists and removes: files that no trial needs, and old logs."""

from dataclasses import dataclass

from storage import database, retention, settings, trainer_logs
from storage.retention import UnneededFile
from storage.trainer_logs import OldLog


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """The files below the artifacts folder that this database does not need, and this machine's old logs."""

    files: list[UnneededFile]
    of_others: list[str]  # folders of studies that this database does not know: another one may
    logs: list[OldLog]


def leftovers(storage: str | None = None) -> Leftovers:
    """The files that no trial needs, and old logs, which `prune` removes. Raises StorageError."""
    here = settings.load(storage=storage)
    opened = database.connect(here.url)
    files, of_others = retention.leftovers(opened, here.artifact_store, here.keep_models)
    return Leftovers(files=files, of_others=of_others, logs=trainer_logs.unneeded(here.log_folder, opened))


def prune(found: Leftovers, storage: str | None = None) -> int:
    """Removes those of the files `found` that are still not needed; returns how many bytes that freed.

    Raises StorageError.
    """
    here = settings.load(storage=storage)
    opened = database.connect(here.url)
    freed = retention.remove(opened, here.artifact_store, here.keep_models, found.files)
    return freed + trainer_logs.remove(found.logs, opened)
