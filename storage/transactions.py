"""Transactions: everything that Trialyard reads or writes is a function of one connection, in `read` or in `write`.

A database that goes away in the middle undoes a transaction whole, and it is done again when the database is back. What
Optuna does for us (suggestions, its own queries) is retried call by call (`PatientStorage`). `write` takes the one lock
that each study has.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import math
import os
import re
import sqlite3
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import optuna.storages._rdb
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb.storage import _VersionManager
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, Connection, Engine, orm, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from storage.errors import Locked, StorageError, error_text
from storage.tables import TrialModel, TrialValueModel

if TYPE_CHECKING:  # imported where they are used: reading needs neither, and they bring asyncio along
    import filelock
    import tenacity

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCK_SECONDS = 120.0  # a claim holds the lock for milliseconds: longer than this means that something hangs
IDLE_SECONDS = 60.0  # a transaction whose process does nothing for so long is ended by the server, its lock freed


class _Versions(_VersionManager):
    """Optuna's, for tables that exist: it does not query them until it is asked."""

    def __init__(self, url: str, engine: Engine, sessions: orm.scoped_session[orm.Session]) -> None:
        self.url, self.engine, self.scoped_session = url, engine, sessions


class PatientStorage(RDBStorage):
    """Optuna's storage, each of whose calls is tried again while the database is away.

    `patience` is for how many seconds; 0 tries once. Setting `shutting_down` ends all waiting. A call that still fails
    after that ends in StorageError. `last_away` is when a call last failed so, by the monotonic clock. `identity` is
    the SQLite file that was opened (see `file_identity`); None for a server.
    """

    identity: tuple[int, int] | None

    def __init__(self, url: str, *, patience: float, **options: Any) -> None:
        self.patience, self.shutting_down, self.last_away = patience, threading.Event(), float("-inf")
        self.identity = None
        super().__init__(url, **options)

    @classmethod
    def on_current_tables(cls, url: str, engine_kwargs: dict[str, Any]) -> "PatientStorage":
        """A storage on tables that are known to be of this very version of Optuna.

        Optuna's own constructor looks for itself, with Alembic, whose import takes as long as the rest of a query.
        """
        storage = cls.__new__(cls)
        engine = sqlalchemy.create_engine(url, **engine_kwargs)
        sessions = orm.scoped_session(orm.sessionmaker(bind=engine))
        vars(storage).update(
            patience=0.0,
            shutting_down=threading.Event(),
            last_away=float("-inf"),
            identity=None,
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
            before_sleep=self._note_failure,
        )
        try:
            return retrying(call)
        except tenacity.RetryError as error:
            cause = error.last_attempt.exception()
            assert cause is not None
            if isinstance(cause, Locked):
                raise cause from None
            raise StorageError(
                f"the database {redact(self.url)} has been away for too long ({cause_of(cause)}): bring it back, and "
                "run the command again; what was trained is in the checkpoints"
            ) from cause

    def _note_failure(self, state: "tenacity.RetryCallState") -> None:
        log_first_failure(state)
        self.last_away = time.monotonic()
        error = state.outcome.exception() if state.outcome else None
        if error is not None and _state_of(error) == READ_ONLY:
            self.engine.dispose()  # after a failover its connections lead to the old server, the URL to the new one


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


def log_first_failure(state: "tenacity.RetryCallState") -> None:
    assert state.outcome is not None
    error = state.outcome.exception()
    if error is not None and state.attempt_number == 1:
        log.warning("the database cannot be reached, trying again: %s", cause_of(error))


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


# What SQLite says where another process writes, and where the disk is full or does not answer: space may be made.
PASSING = ("locked", "disk is full", "disk I/O error")


def is_transient(error: BaseException) -> bool:
    """Whether `error` says that the database is away or busy, and not that it was asked for something wrong."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (PoolTimeout, Locked)):
            return True  # all connections are in others' hands, who wait for a server that does not answer
        if isinstance(seen, DBAPIError):
            if isinstance(seen.orig, sqlite3.Error):
                return any(words in str(seen.orig) for words in PASSING)  # it calls a missing table operational, too
            passing = _state_of(seen) in (ASLEEP, READ_ONLY)
            return passing or seen.connection_invalidated or isinstance(seen, (OperationalError, InterfaceError))
        seen = seen.__cause__
    return False


# Codes of PostgreSQL's errors.
ASLEEP = "25P03"  # IDLE_SECONDS passed: this process was asleep
READ_ONLY = "25006"  # the server is not, or not yet, the one that writes; or this user may only read
LOCK_TIMEOUT = "55P03"
NO_PRIVILEGE = "42501"


def _state_of(error: BaseException) -> str | None:
    """PostgreSQL's code of an error, as SQLAlchemy or Optuna raises it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, DBAPIError):
        seen = seen.__cause__
    return getattr(seen.orig, "sqlstate", None) if seen is not None else None


def redact(url: str) -> str:
    """`url` with its password masked, fit to be shown."""
    if has_unquoted_password(url):
        return "(a URL whose password is not quoted)"
    try:
        parsed = sqlalchemy.make_url(url)
        hidden = parsed.update_query_dict(dict.fromkeys(_secret_options(parsed), "***"))
        return hidden.render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return "(a URL that does not parse)"


def has_unquoted_password(url: str) -> bool:
    """Whether a server's `url` has more than one ``@``: then nobody knows where its password ends."""
    return not url.startswith("sqlite") and url.count("@") > 1


def has_password(url: str) -> bool:
    """Whether `url` shows a password, also in a URL that does not parse."""
    if has_unquoted_password(url):
        return True
    try:
        parsed = sqlalchemy.make_url(url)
        return bool(parsed.password or _secret_options(parsed))
    except (ArgumentError, ValueError):
        return "@" in url


def _secret_options(url: URL) -> list[str]:
    """The options of libpq in `url` that are secret."""
    return [name for name in ("password", "sslpassword") if name in url.query]


def cause_of(error: BaseException) -> str:
    """The innermost error's own words, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error_text(error)


# By what PostgreSQL says is denied: the statement that grants it.
_GRANTS = {
    r"permission denied for schema (\S+)": "USAGE, CREATE ON SCHEMA {name}",
    r"permission denied for table (\S+)": "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public",
    r"permission denied for sequence (\S+)": "USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public",
    r"permission denied for database (\S+)": "CONNECT ON DATABASE {name}",
}


def missing_privilege(error: BaseException, url: URL) -> str | None:
    """What the user of `url` may not do and which statement grants it, in words; None if that is not the `error`."""
    cause = cause_of(error)
    for pattern, grant in _GRANTS.items():
        denied = re.search(pattern, cause)
        if denied:
            statement = f'GRANT {grant.format(name=denied[1])} TO "{url.username}"'
            return f"refuses its user ({denied[0]}): let the owner of the database run `{statement}`"
    if "must be owner of" in cause:
        return f"refuses its user ({cause}): run the command as the owner of its tables"
    return None


@contextlib.contextmanager
def _with_privileges(storage: RDBStorage) -> Iterator[None]:
    try:
        yield
    except ProgrammingError as error:
        missing = missing_privilege(error, storage.engine.url)
        if missing is None:
            raise
        raise StorageError(f"the database {redact(str(storage.engine.url))} {missing}") from error


# --- the lock, and transactions ---------------------------------------------------------------------------


def read(storage: RDBStorage, work: Callable[[Connection], T]) -> T:
    """What `work` reads, each statement as of its own moment; done again where the database was away."""

    def once() -> T:
        with storage.engine.connect() as connection:
            return work(connection)

    return storage.with_retries(once) if isinstance(storage, PatientStorage) else once()


def write(storage: RDBStorage, study: str | None, work: Callable[[Connection], T]) -> T:
    """What `work` gives, done in one transaction under the lock of `study` (by name; None takes no lock).

    Whole or not at all: if the database goes away in the middle, nothing of it is done, and it starts again. Only
    where it goes away between the commit and its answer is the work done twice, which `work` must bear.

    Raises StorageError if the database may only be read, and Locked if the lock cannot be had within LOCK_SECONDS.
    Inside `work`, another `write` would wait for it.
    """

    def once() -> T:
        path = sqlite_file(storage)
        if path is not None:
            with _study_lock(path, study) if study is not None else contextlib.nullcontext():
                return _in_sqlite(storage, work)
        with (
            _one_at_a_time(storage, study),
            _timed_out(study),
            _with_privileges(storage),
            storage.engine.begin() as connection,
        ):
            lock_study_on_server(connection, study)
            return work(connection)

    try:
        return storage.with_retries(once) if isinstance(storage, PatientStorage) else once()
    except DBAPIError as error:
        if _state_of(error) == READ_ONLY:
            storage.engine.dispose()  # see `PatientStorage._note_failure`, which a call without patience does not reach
        if not _is_refused(error):
            raise
        raise StorageError(read_only_text(storage.engine.url, cause_of(error))) from error


def _is_refused(error: DBAPIError) -> bool:
    """Whether this user may read and not write."""
    return _state_of(error) in (READ_ONLY, NO_PRIVILEGE) or "readonly database" in str(error.orig)


def read_only_text(url: URL, cause: str) -> str:
    """A sentence for people who may only read the database at `url`."""
    way_out = (
        "use a user who may write, or have its owner grant SELECT, INSERT, UPDATE and DELETE on all tables and USAGE "
        "on all sequences"
        if file_of(url) is None
        else "choose a file that you may write with TRIALYARD_HOME or --storage"
    )
    return f"the database {redact(str(url))} may only be read ({cause}): {way_out}"


def _in_sqlite(storage: RDBStorage, work: Callable[[Connection], T]) -> T:
    require_same_file(storage)
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


def lock_study_on_server(connection: Connection, study: str | None) -> None:
    """Limits how long a transaction on PostgreSQL waits and idles, and locks `study`, if given, until its end."""
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


_study_locks: dict[tuple[URL, str], threading.Lock] = defaultdict(threading.Lock)
os.register_at_fork(after_in_child=_study_locks.clear)  # a thread that holds one does not exist in the child


@contextlib.contextmanager
def _one_at_a_time(storage: RDBStorage, study: str | None) -> Iterator[None]:
    """The threads of this process wait for a study's lock one after another.

    They would wait in the server otherwise, with a connection each: a hundred workers of eight slots, 800 connections.
    """
    if study is None:
        yield
        return
    lock = _study_locks[storage.engine.url, study]
    if not lock.acquire(timeout=LOCK_SECONDS):
        raise Locked(
            f"study {study!r} has been locked for {LOCK_SECONDS:.0f} s by this process: see what hangs in its log, end "
            "it, and run the command again"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _timed_out(study: str | None) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if _state_of(error) != LOCK_TIMEOUT:
            raise
        what = "a row of the database" if study is None else f"study {study!r}"
        raise Locked(
            f"{what} has been locked for {LOCK_SECONDS:.0f} s by another process: "
            "see who it is in pg_stat_activity, end it, and run the command again"
        ) from None


@contextlib.contextmanager
def _study_lock(path: Path, study: str) -> Iterator[None]:
    """SQLite ignores SELECT ... FOR UPDATE, and lets waiting writers starve: a lock file next to the database is used.

    The kernel lets go of it when its holder dies.
    """
    import filelock

    try:
        lock = lock_file(path, _lock_name(study))
        lock.acquire()
    except filelock.Timeout as error:
        raise Locked(
            f"study {study!r} has been locked for {LOCK_SECONDS:.0f} s by another process: "
            f"see who holds {error.lock_file}, end it, and run the command again"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Locked(
                f"study {study!r} cannot be locked ({error.strerror}: {error.filename}): make space on that disk"
            ) from None
        url = sqlalchemy.make_url(f"sqlite:///{path}")
        raise StorageError(read_only_text(url, f"{error.strerror}: {error.filename}")) from error
    try:
        yield
    finally:
        lock.release()


def _lock_name(study: str) -> str:
    # Others may give a study any name, and a file's name has a limit.
    quoted = urllib.parse.quote(study, safe="")
    return f"study-{quoted}" if len(quoted) <= 100 else f"study-{hashlib.sha256(study.encode()).hexdigest()}"


def lock_file(path: Path, name: str) -> "filelock.BaseFileLock":
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


def sqlite_file(storage: RDBStorage) -> Path | None:
    return file_of(storage.engine.url)


def file_identity(path: Path | None) -> tuple[int, int] | None:
    """What tells a SQLite file from a later one at the same path: device and inode. None for a server, or no file."""
    try:
        status = None if path is None else path.stat()
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino)


def require_same_file(storage: RDBStorage) -> None:
    """Raises StorageError unless the SQLite file is still the one that was opened.

    A file that is removed stays readable and writable for those who have it open, and is lost when they end.
    """
    opened = storage.identity if isinstance(storage, PatientStorage) else None
    if opened is not None and file_identity(sqlite_file(storage)) != opened:
        raise StorageError(
            f"the database {redact(str(storage.engine.url))} was removed or replaced while it was in use, so what was "
            "recorded since then is lost: restore a backup, or run the same command again"
        )


def forbid_writing(storage: RDBStorage) -> None:
    """From now on the database refuses every change through `storage`."""
    engine = storage.engine
    engine.dispose()  # connections that are open already would not hear of it
    if sqlite_file(storage) is not None:

        @sqlalchemy.event.listens_for(engine, "connect")
        def _query_only(connection: sqlite3.Connection, record: Any) -> None:
            connection.execute("PRAGMA query_only = ON")
    else:
        # A transaction, not a session: a transaction-pooling proxy gives the session to others.
        @sqlalchemy.event.listens_for(engine, "begin")
        def _read_only(connection: Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")


def schema_head() -> str:
    """The version of the tables that this Optuna makes: that of the last of its migrations, which its name tells."""
    migrations = Path(optuna.storages._rdb.__path__[0]) / "alembic" / "versions"
    return max((file.stem.rstrip("_") for file in migrations.glob("v*.py")), default="")


def file_of(url: URL) -> Path | None:
    """The file of a SQLite database; None for a server's."""
    return Path(str(url.database)).absolute() if url.get_backend_name() == "sqlite" else None
