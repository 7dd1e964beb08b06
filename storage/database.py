"""The database: Optuna's RDBStorage with safe engine settings, and the one lock a study.

SQLite today. Write-ahead logging lets readers (the dashboard, `status`) go on while a worker writes; Optuna
itself sets no pragma and waits 5 s for a lock.
"""

import contextlib
import sqlite3
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import filelock
import sqlalchemy
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from storage.errors import StorageError

LOCK_SECONDS = 120.0  # a claim holds the lock for milliseconds: longer than this means that something hangs
BUSY_SECONDS = 60.0  # how long a statement waits for another process's transaction


def redact(url: str) -> str:
    """`url` with its password masked, fit to be shown."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return "(a URL that does not parse)"


def connect(url: str) -> RDBStorage:
    """Optuna's storage on the database at `url`, which must stand already (see `create`).

    Raises StorageError where the URL does not parse, is no SQLite file, or there is no database there.
    """
    path = _file(url)
    if not path.exists():
        raise StorageError(
            f"there is no database at {redact(url)}: `trialyard create digits` makes it with a first study, "
            "or set TRIALYARD_STORAGE to the one you mean"
        )
    return _storage(url, path)


def create(url: str) -> RDBStorage:
    """Makes the database at `url` unless it stands, its folder too, and connects to it.

    Raises StorageError where it cannot be written.
    """
    path = _file(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two first runs at once would each make half of the tables.
        with _lock(path, "database"):
            if path.exists() and path.stat().st_size > 0:
                return _storage(url, path)
            # The tables are made under another name: a process killed in the middle leaves no half database.
            draft = path.with_name(f".{path.name}.new")
            draft.unlink(missing_ok=True)
            storage = RDBStorage(f"sqlite:///{draft}")
            storage.engine.dispose()
            draft.replace(path)
            return _storage(url, path)
    except (OSError, OptunaError, SQLAlchemyError) as error:
        raise StorageError(
            f"the database {redact(url)} cannot be written ({_cause(error)}): "
            "choose a folder that you may write with TRIALYARD_HOME, or a URL with --storage"
        ) from error


def check(storage: RDBStorage) -> list[str]:
    """What is wrong with the database file itself, a sentence each; empty if nothing is."""
    problems: list[str] = []
    with storage.engine.connect() as connection:
        for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
            if line != "ok":
                problems.append(f"the file is damaged: {line}")
        for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            problems.append(f"row {row} of {table} names a row of {parent} that is gone")
    if storage.get_current_version() != storage.get_head_version():
        found, expected = storage.get_current_version(), storage.get_head_version()
        problems.append(f"its schema is {found} and this Optuna writes {expected}")
    return problems


@contextlib.contextmanager
def exclusive(storage: RDBStorage, study: str) -> Iterator[None]:
    """Holds the one lock of `study` (by name, so that it also guards the study's creation).

    SQLite ignores SELECT ... FOR UPDATE, and two processes were seen to pop one WAITING trial; so a lock file
    beside the database stands in. The kernel lets go of it when its holder dies.

    Raises StorageError if it cannot be had within LOCK_SECONDS.
    """
    path = Path(str(storage.engine.url.database))
    try:
        with _lock(path, f"study-{urllib.parse.quote(study, safe='')}"):
            yield
    except filelock.Timeout as error:
        raise StorageError(
            f"study {study!r} has been locked for {LOCK_SECONDS:.0f} s by another process: "
            f"see who holds {error.lock_file}, end it, and run the command again"
        ) from None


def _lock(path: Path, name: str) -> filelock.BaseFileLock:
    folder = path.with_name(f"{path.name}.locks")
    folder.mkdir(exist_ok=True)
    return filelock.FileLock(
        folder / f"{name}.lock",
        timeout=LOCK_SECONDS,
        poll_interval=0.005,
        # A soft lock would outlive a killed holder for ever.
        fallback_to_soft=False,
        preserve_lock_file=True,
    )


def _file(url: str) -> Path:
    """The file that a ``sqlite:///`` URL names."""
    try:
        parsed = sqlalchemy.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        raise StorageError(
            f"the database URL {_shown(url)!r} does not parse: write it as sqlite:///folder/studies.db"
        ) from None
    if backend != "sqlite":
        raise StorageError(
            f"the database {redact(url)} is of a kind that Trialyard does not know ({backend}): "
            "write sqlite:///folder/studies.db"
        )
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise StorageError(
            f"the database {redact(url)} is no plain file, and workers in several processes must share it: "
            "write sqlite:///folder/studies.db"
        )
    return Path(parsed.database).absolute()


def _shown(url: str) -> str:
    # What does not parse may still hold a password: only what stands before the first "@" could be one.
    return "***@" + url.rpartition("@")[2] if "@" in url else url


def _storage(url: str, path: Path) -> RDBStorage:
    try:
        # The path is made absolute: a process that changes its folder must not find another database.
        return RDBStorage(
            f"sqlite:///{path}",
            engine_kwargs={"creator": partial(_open, str(path))},
            skip_table_creation=True,
        )
    except (OptunaError, SQLAlchemyError, RuntimeError, sqlite3.Error) as error:
        raise StorageError(
            f"the database {redact(url)} cannot be opened ({_cause(error)}): "
            "is it an Optuna database of this version, and may you write it and its folder?"
        ) from error


def _open(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    # With WAL this is safe against a killed process; a power cut may undo the last moments, never damage the
    # file, and what it undoes is a trial that runs again.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _cause(error: BaseException) -> str:
    """The innermost error's own words, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
