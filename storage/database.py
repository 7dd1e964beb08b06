"""The database: Optuna's RDBStorage on SQLite or PostgreSQL with safe engine settings, and the one lock a study.

Everything that Trialyard itself reads or writes is a function of one connection in one transaction (`read`, `write`),
so that a database that goes away in the middle undoes it whole, and it is done again when the database is back. What
Optuna does for us (suggestions, its own queries) is retried call by call (`PatientStorage`).
"""

import contextlib
import functools
import hashlib
import logging
import math
import re
import sqlite3
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import optuna.storages._rdb
import sqlalchemy
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.storages._rdb.storage import _VersionManager
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, Connection, Engine, orm, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from storage import attributes, legacy
from storage.artifacts import written_atomically
from storage.errors import StorageError
from storage.owners import table as workers_table
from storage.tables import ALL_TABLES, TrialModel, TrialValueModel

if TYPE_CHECKING:  # imported where they are used: reading needs neither, and they bring asyncio along
    import filelock
    import tenacity

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCK_SECONDS = 120.0  # a claim holds the lock for milliseconds: longer than this means that something hangs
IDLE_SECONDS = 60.0  # a transaction whose process does nothing for so long is ended by the server, its lock freed
BUSY_SECONDS = 60.0  # how long a statement waits for another process's transaction, on SQLite
KINDS = "sqlite:///folder/studies.db or postgresql://user@host/database"

# Optuna counts and looks up trials by scanning a study's; with 10,000 of them a claim took four times as long.
INDEXES = (
    "CREATE INDEX IF NOT EXISTS trialyard_trials_by_state ON trials (study_id, state, number)",
    "CREATE INDEX IF NOT EXISTS trialyard_trials_by_number ON trials (study_id, number)",
)


class _Versions(_VersionManager):
    """Optuna's, for tables that stand: it does not look at them before it is asked."""

    def __init__(self, url: str, engine: Engine, sessions: orm.scoped_session[orm.Session]) -> None:
        self.url, self.engine, self.scoped_session = url, engine, sessions


class PatientStorage(RDBStorage):
    """Optuna's storage, each of whose calls is tried again while the database is away.

    `patience` is for how many seconds; 0 tries once. Setting `shutting_down` ends all waiting. A call that still fails
    after that ends in StorageError.
    """

    def __init__(self, url: str, *, patience: float, **options: Any) -> None:
        self.patience, self.shutting_down = patience, threading.Event()
        super().__init__(url, **options)

    @classmethod
    def on_current_tables(cls, url: str, engine_kwargs: dict[str, Any]) -> "PatientStorage":
        """The same on tables that are known to be of this very version of Optuna.

        Optuna's own constructor looks for itself, with Alembic, whose import takes as long as the rest of a query.
        """
        storage = cls.__new__(cls)
        engine = sqlalchemy.create_engine(url, **engine_kwargs)
        sessions = orm.scoped_session(orm.sessionmaker(bind=engine))
        vars(storage).update(
            patience=0.0,
            shutting_down=threading.Event(),
            engine_kwargs=engine_kwargs,
            url=url,
            skip_compatibility_check=False,
            heartbeat_interval=None,
            grace_period=None,
            heartbeat_stale_trial_callback=None,
            failed_trial_callback=None,
            engine=engine,
            scoped_session=sessions,
            _version_manager=_Versions(url, engine, sessions),
        )
        return storage

    def _build_frozen_trial_from_trial_model(self, trial: TrialModel) -> FrozenTrial:
        """As Optuna, but a trial whose stored value is NaN is read as a failed one.

        Older versions of Trialyard stored such values (`storage.legacy` repairs them). On SQLite they are NULL, and
        Optuna's own reading of any trial of the study ends in an AssertionError.
        """
        return super()._build_frozen_trial_from_trial_model(
            _WithoutValue(trial) if any(map(_is_nan, trial.values)) else trial  # type: ignore[arg-type]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "shutting_down"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shutting_down = threading.Event()
        super().__setstate__(state)

    def with_retries(self, call: Callable[[], T]) -> T:
        """What `call` gives, tried again as long as the database is away. It may be done twice."""
        if self.patience <= 0:
            return call()
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            # The jitter keeps a hundred workers from knocking all at once when the database is back.
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=5.0),
            stop=tenacity.stop_any(
                tenacity.stop_after_delay(self.patience), tenacity.stop_when_event_set(self.shutting_down)
            ),
            sleep=tenacity.sleep_using_event(self.shutting_down),
            before_sleep=_told,
        )
        try:
            return retrying(call)
        except tenacity.RetryError as error:
            cause = error.last_attempt.exception()
            assert cause is not None
            raise StorageError(
                f"the database {redact(self.url)} has been away for too long ({cause_of(cause)}): bring it back, and "
                "run the command again; what was trained is in the checkpoints"
            ) from cause


class _WithoutValue:
    """A trial's row as that of a failed trial. A view of it: a change of the row itself would be written back."""

    state, values = TrialState.FAIL, ()

    def __init__(self, trial: TrialModel) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)


def _is_nan(row: Any) -> bool:  # of TrialValueModel, whose attributes are columns to a type checker
    finite = row.value_type == TrialValueModel.TrialValueType.FINITE
    return finite and (row.value is None or math.isnan(row.value))


def _told(state: "tenacity.RetryCallState") -> None:
    assert state.outcome is not None
    error = state.outcome.exception()
    if error is not None and state.attempt_number == 1:
        log.warning("the database is away, to be tried again: %s", cause_of(error))


def _retried(name: str) -> Callable[..., Any]:
    original = getattr(RDBStorage, name)

    @functools.wraps(original)
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.with_retries(lambda: original(self, *args, **kwargs))

    return call


# All of them may be done twice without harm: they read, or they set what is then set. Those that create a row may not,
# for the first one may have come through: Optuna itself retries the creation of a trial, ours are in `claims`.
for _name in (
    *("set_study_user_attr", "set_study_system_attr", "get_study_id_from_name", "get_study_name_from_id"),
    *("get_study_directions", "get_study_user_attrs", "get_study_system_attrs", "get_all_studies"),
    *("set_trial_param", "_set_trial_param", "get_trial_param", "get_trial_id_from_study_id_trial_number"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "get_trial", "get_all_trials"),
    *("_get_trials", "get_best_trial", "_get_best_trial_id", "get_n_trials", "record_heartbeat"),
):
    setattr(PatientStorage, _name, _retried(_name))


def is_transient(error: BaseException) -> bool:
    """Whether `error` says that the database is away or busy, and not that it was asked for something wrong."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PoolTimeout):
            return True  # all connections are in others' hands, who wait for a server that does not answer
        if isinstance(seen, DBAPIError):
            if isinstance(seen.orig, sqlite3.Error):
                return "locked" in str(seen.orig)  # it calls a missing table operational, too
            idle = getattr(seen.orig, "sqlstate", None) == "25P03"  # IDLE_SECONDS passed: this process was asleep
            return idle or seen.connection_invalidated or isinstance(seen, (OperationalError, InterfaceError))
        seen = seen.__cause__
    return False


# --- connecting -------------------------------------------------------------------------------------------


def redact(url: str) -> str:
    """`url` with its password masked, fit to be shown."""
    try:
        parsed = sqlalchemy.make_url(url)
        hidden = parsed.update_query_dict(dict.fromkeys(_secret_options(parsed), "***"))
        return hidden.render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return "(a URL that does not parse)"


def has_password(url: str) -> bool:
    """Whether `url` shows a password, also in a URL that does not parse."""
    try:
        parsed = sqlalchemy.make_url(url)
        return bool(parsed.password or _secret_options(parsed))
    except (ArgumentError, ValueError):
        return "@" in url


def _secret_options(url: URL) -> list[str]:
    """Those of libpq's options in `url` that nobody may read."""
    return [name for name in ("password", "sslpassword") if name in url.query]


def connect(url: str, patience: float = 0.0) -> PatientStorage:
    """Optuna's storage on the database at `url`, which must stand already (see `create`).

    `patience` is how many seconds a call waits for a database that is away; connecting itself is tried once (but see
    `connect_with_retries`).
    Raises StorageError where the URL does not parse, is of no known kind, or there is no database of ours there.
    """
    parsed = _parsed(url)
    path = _file(parsed)
    if path is not None and not path.exists():
        raise StorageError(
            f"there is no database at {redact(url)}: `trialyard create digits` makes it with a first study, "
            "or set TRIALYARD_STORAGE to the one you mean"
        )
    lacking = _missing_tables_problem(parsed)
    if lacking:
        raise StorageError(f"the database {redact(url)} {lacking}")
    if _revision(parsed) == _head():
        storage = PatientStorage.on_current_tables(_rendered(parsed), _settings(parsed))
    else:
        storage = _storage(parsed)  # which says what is wrong
    storage.patience = patience
    return storage


def connect_with_retries(url: str, patience: float) -> PatientStorage:
    """As `connect`, but tried again for `patience` seconds while the server is away: workers start before it does.

    Raises StorageError as `connect` does: at once where waiting would not help, as with a wrong password, a database
    that is not there or was never made ours, and at the end of the patience.
    """
    import tenacity

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_away),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=5.0),
        stop=tenacity.stop_after_delay(patience),
        before_sleep=_told,
        reraise=True,
    )
    return retrying(connect, url, patience)


# What a server that is there says of a connection that it will never accept. Nothing else tells it from one that is
# just starting: libpq gives no error code before the connection stands (psycopg 3.3).
REFUSALS = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|does not exist|not permitted to log in"
    r"|permission denied"
)


def _is_away(error: BaseException) -> bool:
    return is_transient(error) and REFUSALS.search(cause_of(error)) is None


def create(url: str, patience: float = 0.0) -> PatientStorage:
    """Makes the tables at `url` unless they stand (on SQLite the file and its folder, too), and connects to it.

    Raises StorageError where it cannot be written.
    """
    parsed = _parsed(url)
    path = _file(parsed)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two first runs at once would each make half of the tables.
            with _lock_file(path, "database"):
                if not path.exists() or path.stat().st_size == 0:
                    # Made under another name: a process killed in the middle leaves no half database.
                    draft = path.with_name(f".{path.name}.new")
                    draft.unlink(missing_ok=True)
                    _make_tables(_parsed(f"sqlite:///{draft}"))
                    draft.replace(path)
        elif _missing_tables_problem(parsed):
            # Doing it twice is harmless, so a creation that was cut off is completed.
            with _advisory_lock(parsed):
                _make_tables(parsed)
    except (OSError, OptunaError, SQLAlchemyError) as error:
        way_out = (
            "choose a folder that you may write with TRIALYARD_HOME, or a URL with --storage"
            if path is not None
            else "is the server up, and may this user create tables in it?"
        )
        raise StorageError(f"the database {redact(url)} cannot be written ({cause_of(error)}): {way_out}") from error
    return connect(url, patience)


def upgrade(url: str) -> tuple[str, list[str]]:
    """Brings the tables of an older Optuna or Trialyard up to this one's, and repairs what is in them.

    Returns the schema's version, and what was repaired, a sentence each.

    Raises StorageError where that fails. Nothing else may use the database meanwhile.
    """
    parsed = _parsed(url)
    path = _file(parsed)
    if path is not None and not path.exists():
        raise StorageError(f"there is no database at {redact(url)} to be upgraded: `trialyard storage create` makes it")
    try:
        storage = _storage(parsed, skip_compatibility_check=True)
        storage.upgrade()
        _add_ours(storage)
        repaired = write(storage, None, legacy.upgrade)
    except (OptunaError, SQLAlchemyError, RuntimeError) as error:
        raise StorageError(f"the database {redact(url)} cannot be upgraded ({cause_of(error)})") from error
    return storage.get_current_version(), repaired


def _make_tables(url: URL) -> None:
    made = _storage(url, skip_table_creation=False)
    _add_ours(made)
    made.engine.dispose()


@contextlib.contextmanager
def _advisory_lock(url: URL) -> Iterator[None]:
    engine = _engine(url)
    with engine.begin() as connection:
        _lock_row(connection, "")
        yield
    engine.dispose()


def _add_ours(storage: RDBStorage) -> None:
    with storage.engine.begin() as connection:
        for statement in INDEXES:
            connection.execute(text(statement))
        workers_table.create(connection, checkfirst=True)


def _missing_tables_problem(url: URL) -> str | None:
    """What is not there that must be, in words that follow the database's name. Raises StorageError."""
    engine = _engine(url)
    outdated: dict[int, str] = {}
    try:
        with engine.connect() as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            if {"studies", workers_table.name} <= tables:
                outdated = legacy.outdated(connection)
                current = attributes.of_studies(connection, ("definition",)) if outdated else []
    except (SQLAlchemyError, sqlite3.Error) as error:
        hint = (
            "is its server up, and are the user and password right?"
            if _file(url) is None
            else "is it a database, and may you write it and its folder?"
        )
        raise StorageError(f"the database {redact(str(url))} does not answer ({cause_of(error)}): {hint}") from error
    finally:
        engine.dispose()
    if "studies" not in tables:
        return "has no studies' tables: `trialyard storage create` makes them"
    if workers_table.name not in tables:
        return "was made by an older Trialyard or by plain Optuna: run `trialyard storage upgrade`"
    if outdated and not current:
        return f"has studies of an older Trialyard ({', '.join(outdated.values())}): run `trialyard storage upgrade`"
    if outdated:
        log.warning(
            "left out, as of an older Trialyard: %s; see `trialyard storage check`", ", ".join(outdated.values())
        )
    return None


def _revision(url: URL) -> str | None:
    """The version of the tables at `url`, in Optuna's words; None where that cannot be told."""
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return found
    except SQLAlchemyError:
        return None
    finally:
        engine.dispose()


def _head() -> str:
    """The version of the tables that this Optuna makes: that of the last of its migrations, which its name tells."""
    migrations = Path(optuna.storages._rdb.__path__[0]) / "alembic" / "versions"
    return max((file.stem.rstrip("_") for file in migrations.glob("v*.py")), default="")


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
        raise StorageError(
            f"the database {redact(str(url))} cannot be opened ({cause_of(error)}): is it an Optuna database of this "
            "version? If it is of an older one, `trialyard storage upgrade` helps"
        ) from error


def _rendered(url: URL) -> str:
    path = _file(url)
    # The path is made absolute: a process that changes its folder must not find another database.
    return f"sqlite:///{path}" if path is not None else url.render_as_string(hide_password=False)


def _parsed(url: str) -> URL:
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
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise StorageError(
            f"the database {redact(url)} is no plain file, and workers in several processes must share it: "
            "write sqlite:///folder/studies.db"
        )
    return parsed


def _file(url: URL) -> Path | None:
    """The file of a SQLite database; None for a server's."""
    return Path(str(url.database)).absolute() if url.get_backend_name() == "sqlite" else None


def _shown(url: str) -> str:
    # What does not parse may still hold a password: only what stands before the first "@" could be one.
    return "***@" + url.rpartition("@")[2] if "@" in url else url


def _open(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    # With WAL this is safe against a killed process; a power cut may undo the last moments, never damage the
    # file, and what it undoes is a trial that runs again.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _settings(url: URL) -> dict[str, Any]:
    """What an engine on `url` is made with."""
    path = _file(url)
    if path is not None:
        return {"creator": functools.partial(_open, str(path))}
    return {
        "pool_pre_ping": True,  # a restarted server leaves dead connections in the pool
        "pool_size": 2,
        "max_overflow": 8,  # a worker's slots, their beats and the display, for moments
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


def cause_of(error: BaseException) -> str:
    """The innermost error's own words, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- the lock, and transactions ---------------------------------------------------------------------------


def read(storage: RDBStorage, work: Callable[[Connection], T]) -> T:
    """What `work` reads, each statement as of its own moment; done again where the database was away."""

    def once() -> T:
        with storage.engine.connect() as connection:
            return work(connection)

    return storage.with_retries(once) if isinstance(storage, PatientStorage) else once()


def write(storage: RDBStorage, study: str | None, work: Callable[[Connection], T]) -> T:
    """What `work` gives, done in one transaction under the lock of `study` (by name; None takes no lock).

    Whole or not at all: where the database goes away in the middle, nothing of it is done, and it begins anew. Only
    where it goes away between the commit and its answer is the work done twice, which `work` must bear.

    Raises StorageError if the lock cannot be had within LOCK_SECONDS. Inside `work`, another `write` would wait for it.
    """

    def once() -> T:
        path = _sqlite_file(storage)
        if path is not None:
            with _study_lock(path, study) if study is not None else contextlib.nullcontext():
                return _in_sqlite(storage, work)
        with _timed_out(study), storage.engine.begin() as connection:
            _lock_row(connection, study)
            return work(connection)

    return storage.with_retries(once) if isinstance(storage, PatientStorage) else once()


def _in_sqlite(storage: RDBStorage, work: Callable[[Connection], T]) -> T:
    with storage.engine.connect() as connection:
        # Before anything is read: a transaction that begins to read and then writes is refused, not made to wait,
        # where another one wrote meanwhile.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.commit()
        except BaseException:
            connection.rollback()
            raise
        return result


def _lock_row(connection: Connection, study: str | None) -> None:
    # `true`: for this transaction only, which also holds behind a transaction-pooling proxy.
    connection.execute(
        text(
            "SELECT set_config('lock_timeout', :lock, true), "
            "set_config('idle_in_transaction_session_timeout', :idle, true)"
        ),
        {"lock": f"{LOCK_SECONDS:.0f}s", "idle": f"{IDLE_SECONDS:.0f}s"},
    )
    if study is not None:
        key = int.from_bytes(hashlib.sha256(f"trialyard:{study}".encode()).digest()[:8], "big", signed=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


@contextlib.contextmanager
def _timed_out(study: str | None) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != "55P03":  # lock_not_available
            raise
        raise StorageError(
            f"study {study!r} has been locked for {LOCK_SECONDS:.0f} s by another process: "
            "see who it is in pg_stat_activity, end it, and run the command again"
        ) from None


@contextlib.contextmanager
def _study_lock(path: Path, study: str) -> Iterator[None]:
    """SQLite ignores SELECT ... FOR UPDATE, and lets waiting writers starve: a lock file beside the database stands in.

    The kernel lets go of it when its holder dies.
    """
    import filelock

    try:
        with _lock_file(path, f"study-{urllib.parse.quote(study, safe='')}"):
            yield
    except filelock.Timeout as error:
        raise StorageError(
            f"study {study!r} has been locked for {LOCK_SECONDS:.0f} s by another process: "
            f"see who holds {error.lock_file}, end it, and run the command again"
        ) from None


def _lock_file(path: Path, name: str) -> "filelock.BaseFileLock":
    import filelock

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


def _sqlite_file(storage: RDBStorage) -> Path | None:
    return _file(storage.engine.url)


def forbid_writing(storage: RDBStorage) -> None:
    """From now on the database refuses every change through `storage`, whoever asks for it in this process."""
    engine = storage.engine
    engine.dispose()  # connections that are open already would not hear of it
    if _sqlite_file(storage) is not None:

        @sqlalchemy.event.listens_for(engine, "connect")
        def _query_only(connection: sqlite3.Connection, record: Any) -> None:
            connection.execute("PRAGMA query_only = ON")
    else:
        # A transaction, not a session: a transaction-pooling proxy gives the session to others.
        @sqlalchemy.event.listens_for(engine, "begin")
        def _read_only(connection: Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")


# --- check and backup -------------------------------------------------------------------------------------


def check(storage: RDBStorage) -> list[str]:
    """What is wrong with the database itself, a sentence each; empty if nothing is."""
    problems: list[str] = []
    if _sqlite_file(storage) is not None:
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
    Raises StorageError where `path` stands already or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path} stands already: give the backup another name")
    try:
        with written_atomically(path) as draft:
            if _sqlite_file(storage) is not None:
                _copy_file(storage, draft)
            else:
                _copy_rows(storage, draft)
            with contextlib.closing(sqlite3.connect(draft)) as copied:
                copied.execute("PRAGMA journal_mode = DELETE")  # one file, without its log beside it
                (trials,) = copied.execute("SELECT count(*) FROM trials").fetchone()
    except (OSError, SQLAlchemyError, sqlite3.Error) as error:
        raise StorageError(f"{path} cannot be written ({cause_of(error)}): give a file in a folder of yours") from error
    return int(trials)


def _copy_file(storage: RDBStorage, path: Path) -> None:
    with storage.engine.connect() as connection, contextlib.closing(sqlite3.connect(path)) as copy:
        connection.connection.driver_connection.backup(copy)  # type: ignore[union-attr]


def _copy_rows(storage: RDBStorage, path: Path) -> None:
    """Every row of Optuna's tables, as of one moment, in an order in which a row follows those that it names."""
    url = _parsed(f"sqlite:///{path}")
    _make_tables(url)
    target = _storage(url)
    one_moment = storage.engine.execution_options(isolation_level="REPEATABLE READ")
    with one_moment.connect() as source, target.engine.begin() as sink:
        # Optuna wrote its version into the new database; the copied row takes its place.
        sink.execute(text("DELETE FROM version_info"))
        for table in ALL_TABLES:
            for part in source.execution_options(yield_per=1000).execute(table.select()).mappings().partitions():
                sink.execute(table.insert(), [dict(row) for row in part])
        found = source.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        sink.execute(text("UPDATE alembic_version SET version_num = :found"), {"found": found})
    target.engine.dispose()
