"""The database: safe settings, made whole or not at all, one lock a study."""

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase

from storage import database
from storage.errors import StorageError


class TestOptunaConformance(StorageTestCase):
    """Optuna's own suite for storages, on what `connect` returns."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> RDBStorage:
        url = f"sqlite:///{tmp_path}/studies.db"
        database.create(url)
        return database.connect(url)


def test_every_connection_has_safe_settings(storage: RDBStorage) -> None:
    with storage.engine.connect() as one, storage.engine.connect() as other:
        for connection in (one, other):
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_a_reader_is_not_held_up_by_a_writer(storage: RDBStorage) -> None:
    with storage.engine.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert storage.get_all_studies() == []
        # With the default journal it would wait for the writer, up to the busy timeout of 60 s.
        assert time.monotonic() - began < 30
        writer.rollback()


def test_connect_names_what_to_do_where_there_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no database at .*trialyard create"):
        database.connect(f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "does not parse"),
        ("", "does not parse"),
        ("sqlite:///:memory:", "no plain file"),
        ("sqlite://", "no plain file"),
        ("oracle://scott:tiger@host/db", "of a kind that Trialyard does not know"),
        ("://me:tiger@host", "does not parse"),
    ],
)
def test_a_url_that_cannot_serve_is_refused_without_its_password(url: str, message: str) -> None:
    for call in (database.connect, database.create):
        with pytest.raises(StorageError, match=message) as caught:
            call(url)
        assert "tiger" not in str(caught.value)


def test_redact_masks_the_password() -> None:
    assert database.redact("postgresql://me:tiger@host/db") == "postgresql://me:***@host/db"
    assert "tiger" not in database.redact("postgresql://me:tiger@host:port/db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    path.write_text("not a database at all, but long enough to look like a file of pages", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be"):
        database.connect(f"sqlite:///{path}")
    assert path.read_text(encoding="utf-8").startswith("not a database")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    # A file where a folder should be stops even root, whom permissions do not.
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match=r"cannot be written .*TRIALYARD_HOME"):
        database.create(f"sqlite:///{tmp_path}/file/studies.db")


def test_create_is_killed_half_way_and_completed(tmp_path: Path) -> None:
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


def test_processes_that_create_at_once_make_one_whole_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/yard/studies.db"
    context = multiprocessing.get_context("spawn")
    failures: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_create, args=(url, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4, failures.get(timeout=1)
    assert database.check(database.connect(url)) == []


def _hold(url: str, held: "multiprocessing.synchronize.Event") -> None:
    with database.exclusive(database.connect(url), "study"):
        held.set()
        time.sleep(600)


def test_the_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    storage = database.create(url)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(url, held))
    holder.start()
    assert held.wait(60)
    entered = threading.Event()

    def enter() -> None:
        with database.exclusive(storage, "study"):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(0.5), "two processes held one lock"
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert entered.wait(10)
    thread.join()


def test_locks_of_two_studies_do_not_meet_whatever_their_names(storage: RDBStorage) -> None:
    with database.exclusive(storage, "a/b"), database.exclusive(storage, "a%2Fb"), database.exclusive(storage, "ü"):
        pass


def test_a_lock_that_is_never_freed_ends_in_a_sentence(storage: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    with (
        database.exclusive(storage, "study"),
        pytest.raises(StorageError, match=r"study 'study' has been locked for .*\.lock"),
        database.exclusive(storage, "study"),
    ):
        pass


def test_check_finds_a_damaged_file(storage: RDBStorage, tmp_path: Path) -> None:
    assert database.check(storage) == []
    storage.create_new_study([StudyDirection.MAXIMIZE], "study")
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        # Plain connections do not keep foreign keys.
        connection.execute("INSERT INTO trials (number, study_id, state) VALUES (0, 77, 'RUNNING')")
    assert any("trials" in problem and "gone" in problem for problem in database.check(storage))
