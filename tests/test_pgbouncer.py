"""Everything works behind PgBouncer in transaction mode, which gives each transaction another session of the server."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from storage import claims, database, ledger, promises, transactions
from storage.errors import StorageError
from storage.owners import this_slot
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Definition

SERVER_CONNECTIONS = 4  # the fewest with which the tables can be created
THREADS = 3


@pytest.fixture
def storage(empty_postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PatientStorage]:
    """A new database behind a PgBouncer."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from pooler import pooled, program

    if program() is None:
        pytest.skip("there is no `pgbouncer`: `apt-get install pgbouncer` gives it")
    with pooled(empty_postgresql_url, SERVER_CONNECTIONS) as url:
        made = database.create(url)
        yield made
        made.engine.dispose()


@pytest.mark.long
def test_a_study_behind_pgbouncer_is_spent_exactly(
    storage: PatientStorage, trivial: Definition, tmp_path: Path
) -> None:
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    found, errors = ledger.find(storage, trivial.name), list[BaseException]()

    def work(number: int) -> None:
        try:
            me = this_slot(f"cpu:{number}")
            while claim := claims.claim(storage, found, me, 60.0):
                claims.beat(storage, {me: "a processor"}, [claim])
                for epoch in (1, 2):
                    claims.record_epochs(storage, claim, {epoch: 0.5})
                claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ledger.counts(storage, found.id).complete == trivial.trials
    assert promises.check(storage) + database.check(storage) == []
    assert database.backup(storage, tmp_path / "copy.db") == trivial.trials
    # What a reader forbids itself must not reach the sessions of others.
    reader = database.connect(str(storage.url))
    transactions.forbid_writing(reader)
    with pytest.raises(StorageError, match="may only be read"):
        registry.pause(trivial.name, reader)
    reader.engine.dispose()
    registry.pause(trivial.name, storage)
