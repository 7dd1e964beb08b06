"""The database: Optuna's tables and ours on SQLite or PostgreSQL; connect, create, upgrade, check and back up."""

import contextlib
import functools
import json
import logging
import os
import re
import sqlite3
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

from storage import attempt_table, attributes, deletions, hits, legacy, openings, settings, slots
from storage.artifacts import written_atomically
from storage.errors import StorageError
from storage.mounts import network_kind
from storage.settings import sqlite_url
from storage.tables import ALL_TABLES
from storage.transactions import (
    LOCK_SECONDS,
    PatientStorage,
    cause_of,
    file_identity,
    file_of,
    has_unquoted_password,
    is_transient,
    lock_file,
    lock_study_on_server,
    log_first_failure,
    missing_privilege,
    read,
    read_only_text,
    redact,
    schema_head,
    sqlite_file,
    write,
)

log = logging.getLogger(__name__)


BUSY_SECONDS = 60.0  # how long a statement waits for another process's transaction, on SQLite
MOST_CONNECTIONS = 4  # of a process to a server, such as the dashboard's
POOL_SECONDS = LOCK_SECONDS + 30.0  # for a connection: another thread may wait with it for a study's lock
CONNECTIONS_OF_WORKER = 1  # for all its slots, which take turns: a server allows a hundred connections in all
KINDS = "sqlite:///folder/studies.db or postgresql://user@host/database"

# Optuna counts and looks up trials by scanning a study's; with 10,000 of them a claim took four times as long.
INDEXES = (
    "CREATE INDEX IF NOT EXISTS trialyard_trials_by_state ON trials (study_id, state, number)",
    attempt_table.INDEX,
)
# No number is given twice, whoever adds a trial.
UNIQUE_NUMBERS = "CREATE UNIQUE INDEX IF NOT EXISTS trialyard_unique_numbers ON trials (study_id, number)"
OUR_TABLES = (attempt_table.table, deletions.table, hits.table, slots.table, openings.table)


# --- connecting -------------------------------------------------------------------------------------------


def connect(url: str, patience: float = 0.0, connections: int = MOST_CONNECTIONS) -> PatientStorage:
    """Optuna's storage on the database at `url`, which must exist already (see `create`).

    `patience` is how many seconds a call waits for a database that is away; connecting itself is tried once (but see
    `connect_with_retries`). `connections` is the most that the process has to a server: its threads wait for one.
    Raises StorageError where the URL does not parse, is of no known kind, or there is no database of ours there.
    """
    parsed = _parsed(url)
    path = file_of(parsed)
    if path is not None and not path.exists():
        raise StorageError(
            f"there is no database at {redact(url)}: the file is missing, and {settings.named_by(url)}; correct that "
            "or restore a backup, or `trialyard create digits` makes a new one with a first study"
        )
    if path is not None:
        _require_local_disk(path)
    lacking = _unusable_reason(parsed)
    if lacking:
        raise StorageError(f"the database {redact(url)} {lacking}")
    if _revision(parsed) == schema_head():
        storage = PatientStorage.on_current_tables(_rendered(parsed), _settings(parsed, connections))
    else:
        storage = _storage(parsed)  # which says what is wrong
    storage.patience = patience
    storage.identity = file_identity(path)
    return storage


def _require_local_disk(path: Path) -> None:
    kind = network_kind(path)
    if kind is not None and not settings.load().network_sqlite:
        raise StorageError(
            f"the database {path} is on a network disk ({kind}), where SQLite's locks do not hold and "
            "data may be lost: use PostgreSQL or a local disk, or set TRIALYARD_NETWORK_SQLITE=1 if one machine alone "
            "uses it"
        )


def file_at(url: str) -> Path | None:
    """The SQLite file that `url` names; None for a server's. Raises StorageError if it does not parse."""
    return file_of(_parsed(url))


def connect_with_retries(url: str, patience: float) -> PatientStorage:
    """As `connect`, for a worker: tried again for `patience` seconds while the server is away, which starts later.

    All slots of the worker share CONNECTIONS_OF_WORKER.

    Raises StorageError as `connect` does: at once where waiting would not help, as with a wrong password, a database
    that is not there or was never made ours, and at the end of the patience.
    """
    import tenacity

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_away),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=5.0),
        stop=tenacity.stop_after_delay(patience),
        before_sleep=log_first_failure,
        reraise=True,
    )
    storage: PatientStorage = retrying(connect, url, patience, CONNECTIONS_OF_WORKER)
    _require_writable(storage)
    return storage


def _require_writable(storage: PatientStorage) -> None:
    """Raises StorageError where this user may only read. A standby may be about to become the server that writes."""
    if sqlite_file(storage) is not None:
        return  # the first change says so
    query = text("SELECT current_setting('transaction_read_only') = 'on' AND NOT pg_is_in_recovery()")
    if read(storage, lambda connection: connection.execute(query).scalar()):
        raise StorageError(read_only_text(storage.engine.url, "its transactions are read-only"))


# What a server that is there says of a connection that it will never accept. Nothing else tells it from one that is
# just starting: libpq gives no error code before the connection exists (psycopg 3.3).
REFUSALS = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|does not exist|not permitted to log in"
    r"|permission denied"
)


def _is_away(error: BaseException) -> bool:
    return is_transient(error) and REFUSALS.search(cause_of(error)) is None


def create(url: str, patience: float = 0.0) -> PatientStorage:
    """Makes the tables at `url` if needed (on SQLite the file and its folder, too), and connects to it.

    Raises StorageError where it cannot be written.
    """
    parsed = _parsed(url)
    path = file_of(parsed)
    try:
        if path is not None:
            _require_local_disk(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two first runs at once would each make half of the tables.
            with lock_file(path, "database"):
                if not path.exists() or path.stat().st_size == 0:
                    # Made under another name: a process killed in the middle leaves no half database.
                    draft = path.with_name(f".{path.name}.new")
                    draft.unlink(missing_ok=True)
                    _make_tables(_parsed(sqlite_url(draft)))
                    draft.replace(path)
        elif _unusable_reason(parsed):
            engine = _engine(parsed)
            tables = set(sqlalchemy.inspect(engine).get_table_names())
            engine.dispose()
            if {slots.OLD_TABLE, slots.table.name} & tables and attempt_table.table.name not in tables:
                raise StorageError(
                    f"the database {redact(url)} was made by an older Trialyard: run `trialyard storage upgrade`"
                )
            # Doing it twice is harmless, so a creation that was cut off is completed.
            with _advisory_lock(parsed):
                _make_tables(parsed)
    except (OSError, OptunaError, SQLAlchemyError) as error:
        missing = missing_privilege(error, parsed)
        if missing is not None:
            raise StorageError(f"the database {redact(url)} {missing}") from error
        way_out = (
            "choose a folder that you may write with TRIALYARD_HOME, or a URL with --storage"
            if path is not None
            else "is the server up, and may this user create tables in it?"
        )
        raise StorageError(f"the database {redact(url)} cannot be written ({cause_of(error)}): {way_out}") from error
    storage = connect(url, patience)
    _require_writable(storage)
    return storage


def spare(storage: PatientStorage) -> PatientStorage:
    """The database `storage` for a transaction that must not wait until others give their connections back.

    It connects for each transaction and disconnects after it. On SQLite it is `storage` itself: who writes there waits
    for the file, and not for a connection.
    """
    url = storage.engine.url
    if sqlite_file(storage) is not None:
        return storage
    options = {name: value for name, value in _settings(url).items() if not name.startswith(("pool", "max_overflow"))}
    other = PatientStorage.on_current_tables(_rendered(url), {**options, "poolclass": NullPool})
    other.patience, other.shutting_down = storage.patience, storage.shutting_down
    return other


def is_exhausted(storage: PatientStorage) -> bool:
    """Whether all connections to a server are in use, so that the next transaction waits for one of them."""
    pool, options = storage.engine.pool, storage.engine_kwargs
    if not isinstance(pool, QueuePool) or sqlite_file(storage) is not None:
        return False
    most: int = options["pool_size"] + options["max_overflow"]
    return pool.checkedout() >= most


def connect_any_version(url: str) -> PatientStorage:
    """As `connect`, also for a database of an older version: for a copy of it. Raises StorageError."""
    parsed = _parsed(url)
    path = file_of(parsed)
    if path is not None and not path.exists():
        raise StorageError(f"there is no database at {redact(url)} to be copied")
    reason = _unusable_reason(parsed)
    if reason is not None and "storage create" in reason:
        raise StorageError(f"the database {redact(url)} {reason}")
    return _storage(parsed, skip_compatibility_check=True)


def upgrade(url: str) -> tuple[str, list[str]]:
    """Brings the tables of an older Optuna or Trialyard up to this one's, and repairs what is in them.

    Returns the schema's version, and what was repaired, a sentence each.

    Raises StorageError where that fails. Nothing else may use the database meanwhile.
    """
    parsed = _parsed(url)
    path = file_of(parsed)
    if path is not None and not path.exists():
        raise StorageError(f"there is no database at {redact(url)} to be upgraded: `trialyard storage create` makes it")
    try:
        # Two upgrades at once would each make half of a table.
        with lock_file(path, "database") if path is not None else _advisory_lock(parsed):
            storage = _storage(parsed, skip_compatibility_check=True)
            storage.upgrade()
            with storage.engine.begin() as connection:
                connection.execute(text(f"DROP TABLE IF EXISTS {slots.OLD_TABLE}"))  # workers fill the new one
            _add_ours(storage)
            repaired = write(storage, None, legacy.upgrade)
    except (OSError, OptunaError, SQLAlchemyError, RuntimeError) as error:
        reason = missing_privilege(error, parsed) or f"cannot be upgraded ({cause_of(error)})"
        raise StorageError(f"the database {redact(url)} {reason}") from error
    return storage.get_current_version(), repaired


def _make_tables(url: URL) -> None:
    path = file_of(url)
    if path is not None:
        path.touch()  # `_open` makes no file: where one was removed, it would be an empty database
    made = _storage(url, skip_table_creation=False)
    _add_ours(made)
    made.engine.dispose()


@contextlib.contextmanager
def _advisory_lock(url: URL) -> Iterator[None]:
    engine = _engine(url)
    with engine.begin() as connection:
        lock_study_on_server(connection, "")
        # A large database takes its time, and this connection does nothing meanwhile.
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        yield
    engine.dispose()


def _add_ours(storage: RDBStorage) -> None:
    with storage.engine.begin() as connection:
        for table in OUR_TABLES:
            table.create(connection, checkfirst=True)
        for statement in INDEXES:
            connection.execute(text(statement))
        if sqlite_file(storage) is not None:
            for trigger in (attempt_table.SQLITE_CASCADE, hits.SQLITE_CASCADE):
                connection.execute(text(trigger))
    _make_numbers_unique(storage)


def _make_numbers_unique(storage: RDBStorage) -> None:
    try:
        with storage.engine.begin() as connection:
            connection.execute(text(UNIQUE_NUMBERS))
            connection.execute(text("DROP INDEX IF EXISTS trialyard_trials_by_number"))  # earlier builds had it
    except IntegrityError:
        log.warning("some trials have the number of another one: see `trialyard storage check`")


def _unusable_reason(url: URL) -> str | None:
    """Why the database at `url` cannot be used yet, in words that follow its name; None if it can.

    Raises StorageError if it does not answer.
    """
    engine = _engine(url)
    outdated: dict[int, str] = {}
    try:
        with engine.connect() as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            if {"studies", attempt_table.table.name} <= tables:
                outdated = legacy.outdated(connection)
                current = attributes.of_studies(connection, ("definition",)) if outdated else []
    except (SQLAlchemyError, sqlite3.Error) as error:
        missing = missing_privilege(error, url)
        if missing is not None:
            raise StorageError(f"the database {redact(str(url))} {missing}") from error
        raise StorageError(
            f"the database {redact(str(url))} does not answer ({cause_of(error)}): {_hint(url, error)}"
        ) from error
    finally:
        engine.dispose()
    if "studies" not in tables:
        return "has no studies' tables: `trialyard storage create` makes them"
    if any(table.name not in tables for table in OUR_TABLES):
        return "was made by an older Trialyard or by plain Optuna: run `trialyard storage upgrade`"
    if outdated and not current:
        return f"has studies of an older Trialyard ({', '.join(outdated.values())}): run `trialyard storage upgrade`"
    if outdated:
        log.warning(
            "these studies were made by an older Trialyard and are left out: %s; see `trialyard storage check`",
            ", ".join(outdated.values()),
        )
    return None


def _hint(url: URL, error: BaseException) -> str:
    """What to do where the database at `url` does not answer."""
    if file_of(url) is None:
        return (
            "is its server up, and are the user and the password right? In a URL @ : / # ? and % of a password are "
            "quoted, such as %40 for @"
        )
    if _is_damaged(error):
        return "the file is damaged, or of another program: restore a backup, or choose another file with --storage"
    return "is its disk full, or may you not write it and its folder?"


def _is_damaged(error: BaseException) -> bool:
    return any(words in cause_of(error) for words in ("is not a database", "is malformed"))


def _revision(url: URL) -> str | None:
    """The version of the tables at `url`, in Optuna's words; None if it is not known."""
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return found
    except SQLAlchemyError:
        return None
    finally:
        engine.dispose()


def _engine(url: URL) -> Engine:
    return sqlalchemy.create_engine(url, **_settings(url))


def _storage(url: URL, *, skip_table_creation: bool = True, skip_compatibility_check: bool = False) -> PatientStorage:
    """Optuna's storage with our engine settings."""
    try:
        return PatientStorage(
            _rendered(url),
            patience=0.0,
            engine_kwargs=_settings(url),
            skip_compatibility_check=skip_compatibility_check,
            skip_table_creation=skip_table_creation,
        )
    except (OptunaError, SQLAlchemyError, RuntimeError, sqlite3.Error) as error:
        missing = missing_privilege(error, url)
        if missing is not None:
            raise StorageError(f"the database {redact(str(url))} {missing}") from error
        hint = (
            _hint(url, error)
            if _is_damaged(error)
            else "is it an Optuna database of this version? If it is of an older one, `trialyard storage upgrade` helps"
        )
        raise StorageError(f"the database {redact(str(url))} cannot be opened ({cause_of(error)}): {hint}") from error


def _rendered(url: URL) -> str:
    path = file_of(url)
    # The path is made absolute: a process that changes its folder must not find another database.
    return sqlite_url(path) if path is not None else url.render_as_string(hide_password=False)


def _parsed(url: str) -> URL:
    if has_unquoted_password(url):
        raise StorageError(
            "the database's URL has more than one @, so its password is not quoted: write @ in it as %40, : as %3A, / "
            "as %2F, # as %23, ? as %3F and % as %25, or put it into a file that TRIALYARD_STORAGE_PASSWORD_FILE names"
        )
    try:
        parsed = sqlalchemy.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        raise StorageError(f"the database URL {_shown(url)!r} does not parse: write it as {KINDS}") from None
    if backend in ("postgres", "postgresql"):
        if not parsed.database:
            raise StorageError(f"the URL {redact(url)} names no database: write it as {KINDS}")
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StorageError(
            f"the database {redact(url)} is of a kind that Trialyard does not know ({backend}): write {KINDS}"
        )
    if not parsed.database or parsed.database == ":memory:" or "?" in url:
        raise StorageError(
            f"the database {redact(url)} is not a plain file, and workers in several processes must share it: "
            "write sqlite:///folder/studies.db, and a ? in a path as %3F"
        )
    return parsed


def _shown(url: str) -> str:
    # What does not parse may still hold a password: only the part before the first "@" could be one.
    return "***@" + url.rpartition("@")[2] if "@" in url else url


def _uri(path: str) -> str:
    """The file's URI, with an empty host, since what follows the two slashes of a path //x would be one."""
    return "file://" + urllib.parse.quote(os.path.abspath(path))


def _open(path: str) -> sqlite3.Connection:
    file = Path(path)
    if file.exists() and not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        return _open_read_only(path)
    connection = sqlite3.connect(f"{_uri(path)}?mode=rw", uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    # With WAL this is safe against a killed process; a power cut may undo the last moments, never damage the
    # file, and what it undoes is a trial that runs again.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _open_read_only(path: str) -> sqlite3.Connection:
    """A connection to a file on a read-only mount, or in another user's folder."""
    uri = f"{_uri(path)}?mode=ro"
    wal = Path(f"{path}-wal")
    # SQLite wants to make a log, unless `immutable` says that the file does not change, as it does while a log exists.
    unchanging = not wal.exists() or wal.stat().st_size == 0
    return sqlite3.connect(
        f"{uri}&immutable=1" if unchanging else uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False
    )


def _settings(url: URL, connections: int = MOST_CONNECTIONS) -> dict[str, Any]:
    """What an engine on `url` is made with."""
    path = file_of(url)
    if path is not None:
        return {"creator": functools.partial(_open, str(path))}
    return {
        # What the lock makes visible must be seen: the default of a server, a database or a user may be another.
        "isolation_level": "READ COMMITTED",
        "pool_pre_ping": True,  # a restarted server leaves dead connections in the pool
        "pool_size": 1,  # an idle process holds one connection
        "max_overflow": connections - 1,
        "pool_timeout": POOL_SECONDS,
        "connect_args": {
            "connect_timeout": 10,
            "prepare_threshold": None,  # prepared statements do not pass a transaction-pooling proxy
            "application_name": "trialyard",
            # A machine that vanished must not hold a lock, nor a worker wait for it, for the kernel's two hours.
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,
        },
    }


# --- check and backup -------------------------------------------------------------------------------------


def check(storage: RDBStorage) -> list[str]:
    """What is wrong with the database itself, a sentence each; empty if nothing is."""
    problems: list[str] = []
    if sqlite_file(storage) is not None:
        with storage.engine.connect() as connection:
            for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
                if line != "ok":
                    problems.append(f"the file is damaged: {line}")
            for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
                problems.append(f"row {row} of {table} names a row of {parent} that is gone")
    if storage.get_current_version() != storage.get_head_version():
        found, expected = storage.get_current_version(), storage.get_head_version()
        problems.append(f"its schema is {found} and this Optuna writes {expected}: `trialyard storage upgrade`")
    return problems


def backup(storage: RDBStorage, path: Path) -> int:
    """Copies the whole database, as of one moment, to a new SQLite file; returns how many trials it has.

    The file is a database of its own: ``--storage sqlite:///FILE`` reads it. Workers may go on meanwhile.
    Raises StorageError if `path` exists already or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path} exists already: give the backup another name")
    try:
        with written_atomically(path) as draft:
            if sqlite_file(storage) is not None:
                _copy_file(storage, draft)
            else:
                _copy_rows(storage, draft)
            with contextlib.closing(sqlite3.connect(draft)) as copied:
                _renew_incarnations(copied)
                _stop_what_runs(copied)
                copied.execute("PRAGMA journal_mode = DELETE")  # one file, without a separate log
                (trials,) = copied.execute("SELECT count(*) FROM trials").fetchone()
    except (OSError, SQLAlchemyError, sqlite3.Error) as error:
        raise StorageError(f"{path} cannot be written ({cause_of(error)}): give a file in a folder of yours") from error
    return int(trials)


def _renew_incarnations(copied: sqlite3.Connection) -> None:
    """Gives the studies of a copy identities of their own: what it writes or deletes is not the original's.

    A confirmation names the identity of the study that it confirms, in its definition.
    """
    table, row_id = "study_user_attributes", "study_user_attribute_id"
    names = (f"{attributes.PREFIX}incarnation", f"{attributes.PREFIX}definition")
    rows = copied.execute(f"SELECT {row_id}, key, value_json FROM {table} WHERE key IN (?, ?)", names).fetchall()
    renewed = {value_json: json.dumps(uuid.uuid4().hex) for _, key, value_json in rows if key == names[0]}
    for row, key, value_json in rows:
        new = renewed[value_json] if key == names[0] else value_json
        if key == names[1]:
            for before, after in renewed.items():
                new = new.replace(f'"incarnation": {before}', f'"incarnation": {after}')
        copied.execute(f"UPDATE {table} SET value_json = ? WHERE {row_id} = ?", (new, row))
    copied.commit()


def _stop_what_runs(copied: sqlite3.Connection) -> None:
    """Puts the running trials of a copy back into the queue: their workers go on with the original alone."""
    existing = {name for (name,) in copied.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if attempt_table.table.name in existing:  # else it is of an older version
        ours = f"trial_id IN (SELECT trial_id FROM {attempt_table.table.name} WHERE ended IS NULL)"
        copied.execute(f"UPDATE trials SET state = 'WAITING' WHERE state = 'RUNNING' AND {ours}")
        copied.execute(
            f"UPDATE {attempt_table.table.name} SET ended = beat, outcome = 'interrupted', "
            "reason = 'the database was copied while it ran' WHERE ended IS NULL"
        )
    if slots.table.name in existing:
        copied.execute(f"DELETE FROM {slots.table.name}")
    copied.commit()


def _copy_file(storage: RDBStorage, path: Path) -> None:
    with storage.engine.connect() as connection, contextlib.closing(sqlite3.connect(path)) as copy:
        connection.connection.driver_connection.backup(copy)  # type: ignore[union-attr]


def _copy_rows(storage: RDBStorage, path: Path) -> None:
    """Every row of Optuna's tables, as of one moment, in an order in which a row follows those that it names."""
    url = _parsed(sqlite_url(path))
    _make_tables(url)
    target = _storage(url)
    existing = set(sqlalchemy.inspect(storage.engine).get_table_names())
    one_moment = storage.engine.execution_options(isolation_level="REPEATABLE READ")
    with one_moment.connect() as source, target.engine.begin() as sink:
        # Optuna wrote its version into the new database; the copied row takes its place.
        sink.execute(text("DELETE FROM version_info"))
        sink.execute(text("DROP INDEX IF EXISTS trialyard_unique_numbers"))  # there may be two trials of one number
        for table in (*ALL_TABLES, attempt_table.table, deletions.table, hits.table, openings.table):
            if table.name not in existing:
                continue  # of an older version
            for part in source.execution_options(yield_per=1000).execute(table.select()).mappings().partitions():
                sink.execute(table.insert(), [dict(row) for row in part])
        found = source.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        sink.execute(text("UPDATE alembic_version SET version_num = :found"), {"found": found})
    _make_numbers_unique(target)
    target.engine.dispose()
