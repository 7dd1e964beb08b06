"""Open studies share the slots of workers, and a worker ends by itself when its time is over."""

import pickle
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import Command, ended
from optuna.trial import TrialState
from scripted import Scripted, epoch, trained

import studies
from search import checks, limits, worker
from search import open_studies as studies_module
from search.attempt import StudyHandle
from search.devices import Slot, cpu
from search.errors import MachineError, WorkerError
from search.limits import Limits
from search.messages import Epoch
from search.progress import Listener
from storage import attempt_table, claims, database, ledger, owners
from storage.claims import Claim
from storage.errors import DiskError
from storage.owners import Owner
from storage.settings import Settings
from storage.transactions import PatientStorage, write
from storage.trial_cache import TrialCache
from studies import definition as definitions
from studies import registry
from studies.definition import Definition
from studies.errors import StudyError

Write = Callable[..., Path]
REFUSALS: dict[str, Exception] = {
    "refused": WorkerError("this machine has other images"),
    "broken": AttributeError("of some library"),
    "full": DiskError("no folder for temporary files can be made"),
}


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind, with the tables and no study."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


@pytest.fixture
def open_studies(
    storage: PatientStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., studies_module.OpenStudies]:
    """Makes what one worker knows of the open studies; each of its looks is a new one."""
    monkeypatch.setattr(studies_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(studies_module, "WAIT_SECONDS", 60.0)  # a check takes its time on a busy machine

    def check_fit(study: ledger.Study, *_: object) -> Definition:
        if study.name in REFUSALS:
            raise REFUSALS[study.name]
        return definitions.from_json(study.definition)

    monkeypatch.setattr(studies_module, "check_fit", check_fit)

    def make(*names: str, share: bool | None = None) -> studies_module.OpenStudies:
        settings, slots = Settings(home=tmp_path), [Slot(device=cpu())]
        shares = not names if share is None else share
        return studies_module.OpenStudies(names or None, storage, settings, slots, share=shares)

    return make


def _create(storage: PatientStorage, trivial: Definition, name: str, trials: int = 100) -> None:
    budget = trivial.budget.model_copy(update={"trials": trials})
    definition = trivial.model_copy(update={"name": name, "budget": budget})
    registry.create(definition, storage, {"fingerprint": "0" * 16})


def _take(open_studies: studies_module.OpenStudies, me: Owner, number: int = 0) -> Claim:
    """What a free slot of the worker claims, as its loop does."""
    for handle in open_studies.now():
        claim = claims.claim(handle.storage, handle.study, replace(me, slot=f"cpu:{number}"), 60.0)
        if claim is not None:
            open_studies.served(handle.study)
            return claim
    raise AssertionError("there is nothing to claim")


def _shares(open_studies: studies_module.OpenStudies, me: Owner, slots: int) -> Counter[str]:
    return Counter(_take(open_studies, me, number).study for number in range(slots))


def _finish(storage: PatientStorage, claim: Claim) -> None:
    claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})


def test_studies_share_the_slots_of_all_workers(
    storage: PatientStorage, trivial: Definition, open_studies: Any, me: Owner
) -> None:
    _create(storage, trivial, "old")
    first, second = open_studies(), open_studies()
    assert _shares(first, me, 4) == {"old": 4}
    _create(storage, trivial, "new")
    # The later study gets the next free slots, of whichever worker, until both have as many; then they take turns.
    assert _shares(second, me, 4) == {"new": 4}
    assert _shares(first, me, 4) == {"old": 2, "new": 2}
    registry.pause("new", storage)
    assert _shares(second, me, 2) == {"old": 2}


def test_one_slot_takes_turns_also_where_one_study_is_far_ahead(
    storage: PatientStorage, trivial: Definition, open_studies: Any, me: Owner
) -> None:
    _create(storage, trivial, "old")
    one = open_studies()
    for _ in range(5):
        _finish(storage, _take(one, me))
    _create(storage, trivial, "new")
    taken = []
    for _ in range(6):
        claim = _take(one, me)
        taken.append(claim.study)
        _finish(storage, claim)
    assert taken == ["new", "old"] * 3
    # A worker that starts takes the one with the least work done.
    assert _take(open_studies(), me).study == "new"


def test_a_higher_priority_goes_first_and_blocks_nobody_when_it_has_nothing_left(
    storage: PatientStorage, trivial: Definition, open_studies: Any, me: Owner
) -> None:
    for name, trials in (("usual", 100), ("urgent", 3), ("later", 100), ("refused", 100)):
        _create(storage, trivial, name, trials)
    registry.set_priority("refused", 9, storage)
    registry.set_priority("urgent", 5, storage)
    registry.set_priority("later", -5, storage)
    assert studies.status("urgent", storage).priority == 5
    one = open_studies()
    assert [_take(one, me, number).study for number in range(5)] == ["urgent"] * 3 + ["usual"] * 2
    registry.set_priority("later", 0, storage)
    assert _take(one, me, 5).study == "later"
    # Who names studies has said which goes first.
    assert _shares(open_studies("later", "usual"), me, 3) == {"later": 3}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_a_study_that_cannot_be_served_is_looked_at_again_after_minutes(
    storage: PatientStorage,
    trivial: Definition,
    open_studies: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    for each in (name, "usual"):
        _create(storage, trivial, each)
    one, now = open_studies(), time.monotonic()
    monkeypatch.setattr(studies_module, "time", types.SimpleNamespace(monotonic=lambda: now))

    def served() -> set[str]:
        return {handle.study.name for handle in one.now()}

    assert served() == {"usual"}
    assert f"study {name} is left to other workers: " in caplog.text
    assert str(REFUSALS[name]) in caplog.text
    monkeypatch.delitem(REFUSALS, name)
    now += studies_module.RETRY_SECONDS - 1
    assert served() == {"usual"}
    now += 1
    assert served() == {"usual", name}


@pytest.mark.parametrize("could_train", [True, False])
def test_a_study_that_broke_while_it_was_trained_is_checked_once_more_before_its_worker_ends(
    storage: PatientStorage,
    trivial: Definition,
    open_studies: Any,
    monkeypatch: pytest.MonkeyPatch,
    could_train: bool,
) -> None:
    """A worker without names and without `--forever`, which ends when it has nothing to do."""
    _create(storage, trivial, "old")
    one, now = open_studies("old", share=True), time.monotonic()
    monkeypatch.setattr(studies_module, "time", types.SimpleNamespace(monotonic=lambda: now))
    (handle,) = one.now()
    if could_train:
        one.trained(handle.study)
    broken = MachineError("the driver was replaced")
    monkeypatch.setattr(checks, "forget_keras", lambda: None)
    monkeypatch.setitem(REFUSALS, "old", broken)
    one.pass_over(handle.study, broken)
    assert (one.now(), one.done()) == ([], not could_train)
    now += studies_module.RETRY_SECONDS
    assert (one.now(), one.done()) == ([], True)


def test_a_named_study_that_was_made_again_is_checked_before_its_first_trial(
    storage: PatientStorage, trivial: Definition, open_studies: Any
) -> None:
    _create(storage, trivial, "refused")
    one = open_studies("refused")
    assert [handle.study.name for handle in one.now()] == ["refused"], "whoever named it has checked it"
    studies.delete("refused", storage)
    _create(storage, trivial, "refused")
    with pytest.raises(WorkerError, match="this machine has other images"):
        one.now()


def test_a_slot_with_a_trial_does_not_wait_until_another_study_is_checked(
    storage: PatientStorage, trivial: Definition, open_studies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking may take minutes: its images are read, and a model of the user's is tried."""
    _create(storage, trivial, "usual")
    one, checking, may_end, has_noted = open_studies(), *(threading.Event() for _ in range(3))
    (usual,) = one.now()
    _create(storage, trivial, "large")

    def check_fit(study: ledger.Study, *_: object) -> Definition:
        checking.set()
        may_end.wait(60)
        return definitions.from_json(study.definition)

    def note() -> None:
        one.served(usual.study)
        has_noted.set()

    monkeypatch.setattr(studies_module, "check_fit", check_fit)
    threads = [threading.Thread(target=one.now), threading.Thread(target=note)]
    threads[0].start()
    assert checking.wait(60)
    threads[1].start()
    was_noted = has_noted.wait(10)
    may_end.set()
    for thread in threads:
        thread.join()
    assert was_noted


def test_a_study_whose_check_hangs_keeps_no_slot_from_the_others(
    storage: PatientStorage, trivial: Definition, open_studies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data may be on a file server that does not answer."""
    for name in ("hangs", "usual"):
        _create(storage, trivial, name)
    may_end, began = threading.Event(), Counter[str]()

    def check_fit(study: ledger.Study, *_: object) -> Definition:
        began[study.name] += 1
        if study.name == "hangs":
            may_end.wait(60)
        return definitions.from_json(study.definition)

    monkeypatch.setattr(studies_module, "check_fit", check_fit)
    monkeypatch.setattr(studies_module, "WAIT_SECONDS", 0.1)
    one, end = open_studies(), time.monotonic() + 50
    while not (handles := one.now()):
        assert time.monotonic() < end
    assert [handle.study.name for handle in handles] == ["usual"]
    assert not one.all_checked()
    may_end.set()
    end = time.monotonic() + 50
    while len(one.now()) < 2:
        assert time.monotonic() < end
    assert began == {"hangs": 1, "usual": 1}


def test_a_worker_with_little_time_waits_for_studies_that_are_being_checked(
    storage: PatientStorage, trivial: Definition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no time for the trials of the one that it knows."""
    for name in ("long", "short"):
        _create(storage, trivial, name, trials=1)

    def check_fit(study: ledger.Study, *_: object) -> Definition:
        if study.name == "short":
            time.sleep(3.0)
        return definitions.from_json(study.definition)

    def has_time_for(handle: StudyHandle) -> bool:
        return handle.study.name == "short"

    monkeypatch.setattr(studies_module, "check_fit", check_fit)
    monkeypatch.setattr(
        worker, "_trainer", lambda slot, _: Scripted(tmp_path, [epoch(1, 0.5), trained(stopped=False)], slot=slot)
    )
    monkeypatch.setattr(worker, "Publisher", lambda *_: Listener())
    limited = Limits(minutes=5)
    monkeypatch.setattr(limited, "has_time_for", has_time_for)
    assert worker.work(
        ["long", "short"], storage, Settings(home=tmp_path), [Slot(device=cpu())], limits=limited, share=True
    )
    assert [studies.status(name, storage).complete for name in ("long", "short")] == [0, 1]


def test_what_a_worker_knows_of_a_deleted_study_is_forgotten(
    storage: PatientStorage, trivial: Definition, open_studies: Any, me: Owner
) -> None:
    _create(storage, trivial, "old")
    one = open_studies()
    _finish(storage, _take(one, me))
    studies.delete("old", storage)
    assert one.now() == []
    assert [one._admitted, one._read, one._passed_over, one._served] == [{}] * 4


def test_a_study_of_another_version_is_refused_before_its_data_are_read(
    storage: PatientStorage, trivial: Definition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object, **__: object) -> None:
        raise AssertionError("the data were read")

    _create(storage, trivial, "old")
    registry.check_software(ledger.find(storage, "old"), storage, checks.software() | {"keras": "2.0"})
    monkeypatch.setattr(checks, "check", check)
    with pytest.raises(StudyError, match=r"study 'old' started with keras 2\.0"):
        studies_module.check_fit(ledger.find(storage, "old"), storage, Settings(home=tmp_path))


def test_a_priority_that_is_no_whole_number_is_refused(storage: PatientStorage, trivial: Definition) -> None:
    _create(storage, trivial, "old")
    for priority in (1.5, True, 10**9):
        with pytest.raises(StudyError, match="a priority is a whole number from"):
            registry.set_priority("old", priority, storage)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="there is no study 'odl'"):
        registry.set_priority("odl", 1, storage)


def _handle(storage: PatientStorage, name: str, definition: Definition) -> StudyHandle:
    cached = TrialCache(storage)
    return StudyHandle(study=ledger.find(storage, name), definition=definition, storage=storage, cached=cached)


def test_a_trial_that_cannot_end_in_time_is_not_claimed(
    storage: PatientStorage, trivial: Definition, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    _create(storage, trivial, "old")
    handle = _handle(storage, "old", trivial)  # of 2 epochs
    assert Limits(0.001).has_time_for(handle), "nobody knows how long it takes"
    claim = claims.claim(storage, handle.study, me, 60.0)
    assert claim is not None
    claims.record_epochs(storage, claim, {1: 0.5, 2: 0.5})
    _finish(storage, claim)
    earlier = owners.clock

    def began(connection: sqlalchemy.Connection) -> None:
        now = connection.execute(sqlalchemy.select(earlier(connection))).scalar_one()
        attempt_table.change(connection, claim.trial_id, 1, began=now - timedelta(minutes=10))

    write(storage, "old", began)
    assert Limits(11).has_time_for(handle)
    assert not Limits(9).has_time_for(handle)
    assert "its next trial takes about 10 min, and 9 min are left of --minutes 9" in caplog.text
    # Of a trial that waits with a checkpoint only the rest counts.
    again = claims.claim(storage, handle.study, me, 60.0)
    assert again is not None
    claims.record_epochs(storage, again, {1: 0.5}, ["checkpoint.npz"])
    claims.requeue(storage, again, "interrupted", "a test", ["checkpoint.npz"])
    assert Limits(6).has_time_for(handle)
    assert not Limits(4).has_time_for(handle)


def test_a_worker_is_idle_when_no_slot_has_a_trial_and_the_database_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr(limits, "monotonic", lambda: passed[0])
    limited = Limits(10, 2)
    passed[0] = 119
    assert limited.over() is None
    with limited.busy():
        passed[0] = 300
        assert limited.over() is None
    passed[0] = 419
    assert limited.over() is None
    passed[0] = 420
    assert limited.over() == "there was nothing to do for the 2 minutes of --idle-minutes"
    assert limited.over(last_away=410) is None
    passed[0] = 600
    assert limited.over() == "the 10 minutes of --minutes have passed"
    assert Limits().over() is None
    copy = pickle.loads(pickle.dumps(Limits(10, 2)))  # the minutes go on in another process, which is idle from now on
    assert copy.are_set
    passed[0] = 1190
    with copy.busy():
        assert copy.over() is None
    passed[0] = 1201
    assert copy.over() == "the 10 minutes of --minutes have passed"
    assert not Limits().are_set
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(WorkerError, match="must be a finite number greater than 0"):
            Limits(idle_minutes=bad)


def test_the_time_before_and_of_a_look_for_work_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr(limits, "monotonic", lambda: passed[0])
    limited = Limits(idle_minutes=2)
    passed[0] = 600  # the database was away
    limited.start_idle()
    assert limited.over() is None
    passed[0] = 660
    with limited.looking():
        passed[0] = 900  # a study's images are read
        with limited.looking():  # another slot waits for a study's lock
            passed[0] = 1000
        passed[0] = 1200
        assert limited.over() is None
    passed[0] = 1259
    assert limited.over() is None
    passed[0] = 1260
    assert limited.over() == "there was nothing to do for the 2 minutes of --idle-minutes"
    with limited.looking(), limited.busy():  # a trial that ends while another slot looks
        passed[0] = 1300
    passed[0] = 1419
    assert limited.over() is None
    passed[0] = 1420
    assert limited.over() is not None


def test_a_worker_that_took_long_to_start_still_looks_for_work(
    storage: PatientStorage,
    trivial: Definition,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What comes before the first look, and the check of a study, may take longer than `--idle-minutes`."""
    said = []

    def slow_check(study: ledger.Study, *_: object) -> Definition:
        time.sleep(4.0)
        return definitions.from_json(study.definition)

    def first_epoch() -> Epoch:
        said.append(caplog.text)
        return epoch(1, 0.5)

    def trainer(slot: Slot, _: Settings) -> Scripted:
        return Scripted(tmp_path, [first_epoch, trained(stopped=False)], slot=slot)

    monkeypatch.setattr(studies_module, "check_fit", slow_check)
    monkeypatch.setattr(worker, "_trainer", trainer)
    monkeypatch.setattr(worker, "Publisher", lambda *_: Listener())
    _create(storage, trivial, "slow", trials=1)
    limited = Limits(idle_minutes=0.05)
    time.sleep(3.1)
    assert worker.work(None, storage, Settings(home=tmp_path), [Slot(device=cpu())], limits=limited)
    assert studies.status("slow", storage).complete == 1
    assert len(said) == 1
    assert "this worker ends" not in said[0]
    assert "there was nothing to do for the 0.05 minutes of --idle-minutes: this worker ends" in caplog.text


@pytest.mark.long
def test_a_worker_with_limits_hands_over_what_runs_and_ends_well(
    home: Path, write_small: Write, start: Command, me: Owner
) -> None:
    ended(start("create", str(write_small(trials=1, epochs=5000))))
    _, err = ended(start("work", "--minutes", "0.15"))
    assert "the 0.15 minutes of --minutes have passed: this worker ends" in err
    waiting = studies.status("small").waiting
    (attempt,) = studies.attempts("small", 0)
    assert (waiting, attempt.outcome) == (1, "interrupted")
    assert attempt.epoch == 0 or attempt.checkpoint is not None
    # Somebody else has the only trial: there is nothing to do.
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    assert claims.claim(storage, ledger.find(storage, "small"), replace(me, machine="another"), 60.0) is not None
    began = time.monotonic()
    for arguments in (["small"], ["--forever"]):
        _, err = ended(start("work", *arguments, "--idle-minutes", "0.03"))
        assert "there was nothing to do for the 0.03 minutes of --idle-minutes: this worker ends" in err
    assert time.monotonic() - began >= 2 * 0.03 * 60
    assert studies.status("small").running == 1
    _, err = ended(start("work", "--minutes", "0"), 1)
    assert err == "error: --minutes = 0 must be a finite number greater than 0: correct it, or leave it out\n"
    ended(start("priority", "small", "-5"))
    assert "priority -5" in ended(start("status", "small"))[0]
