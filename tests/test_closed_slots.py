"""A slot whose device fails is closed and tried again; the other slots go on."""

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import attempts_at
from optuna.trial import FrozenTrial, TrialState
from scripted import Scripted, epoch, trained

import studies
from search import checks, interruption, open_studies, worker
from search.attempt import StudyHandle
from search.devices import Device, Slot
from search.errors import AcceleratorError, DeviceError
from search.messages import Failed
from search.open_studies import OpenStudies
from search.progress import Listener
from search.terminal import print_workers
from storage import claims, database, ledger
from storage.errors import DiskError, StorageError
from storage.ledger import State
from storage.owners import Owner
from storage.settings import Settings
from storage.transactions import PatientStorage
from studies import definition as definitions

pytestmark = pytest.mark.usefixtures("study")

LOST = Failed(kind="device", message="the driver has gpu:2 (H100), but tensorflow sees no GPUs")
FULL = Failed(kind="disk", message="history.json cannot be written: is the disk full")
BROKEN = Failed(kind="accelerator", message="CUDA error: unspecified launch failure")

Ends = Callable[[Slot, int, str], Failed | None]  # how the n-th job of a slot, for a trial, fails if it does


def _slots(count: int) -> list[Slot]:
    return [
        Slot(device=Device(kind="gpu", name="H100", index=index, capability=(9, 0), memory=80 << 30))
        for index in range(count)
    ]


class _Trainer(Scripted):
    """A slot's trainer, whose jobs end as the test says."""

    def __init__(self, folder: Path, slot: Slot, ends: Ends) -> None:
        super().__init__(folder, [], slot=slot)
        self._ends, self._begun = ends, 0

    def submit(self, job: Any) -> None:
        """Decides how the job ends."""
        self._begun += 1
        failed = self._ends(self.slot, self._begun, job.trial)
        self.messages = [failed] if failed is not None else [epoch(1, 0.5), trained(stopped=False)]


@pytest.fixture
def fill(storage: PatientStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Runs a worker of so many pretended GPUs."""
    monkeypatch.setattr(worker, "Publisher", lambda *_: Listener())
    monkeypatch.setattr(worker, "FIRST_SECONDS", 0.05)
    # Only a study that was not named is checked: it would import Keras.
    monkeypatch.setattr("search.open_studies.check_fit", lambda study, *_: definitions.from_json(study.definition))

    def run(count: int, ends: Ends, names: list[str] | None, listener: Listener, *, share: bool = False) -> bool:
        monkeypatch.setattr(worker, "_trainer", lambda slot, settings: _Trainer(tmp_path, slot, ends))
        settings = Settings(home=tmp_path, beat_seconds=0.05)
        return worker.work(names, storage, settings, _slots(count), [listener], share=share)

    return run


def _closed(storage: PatientStorage) -> dict[str, str]:
    return {slot.slot: slot.closed for slot in studies.workers(storage) if slot.closed is not None}


def _until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def _states(storage: PatientStorage) -> list[TrialState]:
    return [trial.state for trial in storage.get_all_trials(ledger.find(storage, "trivial").id)]


@pytest.mark.parametrize("failure", [LOST, FULL, BROKEN], ids=lambda failure: failure.kind)
def test_one_bad_gpu_of_four_is_closed_and_the_others_finish_the_study(
    storage: PatientStorage, fill: Any, failure: Failed, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, str]] = []

    def ends(slot: Slot, job: int, trial: str) -> Failed | None:
        if slot.name == "gpu:2":
            return failure
        _until(lambda: _closed(storage))
        shown.append(_closed(storage))
        print_workers(studies.workers(storage))
        return None

    assert fill(4, ends, ["trivial"], Listener())
    assert _states(storage) == [TrialState.COMPLETE] * 5
    assert shown[0] == {"gpu:2": failure.message}
    assert f"closed ({failure.message})" in capsys.readouterr().out
    attempts = [attempt for trial_id in range(1, 6) for attempt in attempts_at(storage, trial_id)]
    assert len([attempt for attempt in attempts if attempt.owner.slot == "gpu:2"]) == 1


@pytest.mark.parametrize("slots", [1, 2])
def test_a_training_that_breaks_every_accelerator_fails_and_the_others_go_on(
    storage: PatientStorage, fill: Any, slots: int
) -> None:
    def ends(slot: Slot, job: int, trial: str) -> Failed | None:
        return BROKEN if trial.startswith("trivial trial 0 ") else None

    assert fill(slots, ends, ["trivial"], Listener())
    assert _states(storage) == [TrialState.FAIL] + [TrialState.COMPLETE] * 4


def test_an_only_accelerator_that_breaks_every_training_ends_the_worker(storage: PatientStorage, fill: Any) -> None:
    with pytest.raises(AcceleratorError, match="CUDA error"):
        fill(1, lambda slot, job, trial: BROKEN, ["trivial"], Listener())
    assert _states(storage) == [TrialState.FAIL, TrialState.WAITING]


def test_a_closed_slot_is_tried_again(storage: PatientStorage, fill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.2)
    again: list[int] = []

    def ends(slot: Slot, job: int, trial: str) -> Failed | None:
        if slot.name == "gpu:0":
            _until(lambda: again)
        elif job <= 2:
            return LOST
        else:
            again.append(job)
        return None

    assert fill(2, ends, ["trivial"], Listener())
    assert again[0] == 3
    assert _states(storage) == [TrialState.COMPLETE] * 5


@pytest.mark.parametrize(("failure", "error"), [(LOST, DeviceError), (FULL, DiskError)])
def test_a_worker_ends_when_no_slot_is_open(
    storage: PatientStorage, fill: Any, failure: Failed, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"sees no GPUs|cannot be written"):
        fill(3, lambda slot, job, trial: failure, ["trivial"], Listener())
    assert set(_states(storage)) == {TrialState.WAITING}, studies.status("trivial", storage).failures


def test_a_worker_in_service_waits_until_the_disk_has_space_again(
    storage: PatientStorage, fill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.2)

    class Leaves(Listener):
        def ended(self, claim: Any, trial: FrozenTrial) -> None:
            if _states(storage) == [TrialState.COMPLETE] * 5:
                os.kill(os.getpid(), signal.SIGTERM)

    assert not fill(2, lambda slot, job, trial: FULL if job <= 2 else None, None, Leaves())
    assert _states(storage) == [TrialState.COMPLETE] * 5


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    """Waits until a slot of this name has looked twice, from now on, which studies are open."""
    monkeypatch.setattr(open_studies, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr("search.idle.FIRST_SECONDS", 0.05)
    now, changed, counts = OpenStudies.now, threading.Condition(), Counter[str]()

    def counted(studies: OpenStudies) -> list[StudyHandle]:
        with changed:
            counts[threading.current_thread().name] += 1
            changed.notify_all()
        return now(studies)

    def wait(slot: str) -> bool:
        with changed:
            before = counts[slot]
            return changed.wait_for(lambda: counts[slot] >= before + 2, timeout=20.0)

    monkeypatch.setattr(OpenStudies, "now", counted)
    return wait


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_a_slot_without_a_trial_waits_for_a_study_that_is_opened_again(
    storage: PatientStorage, fill: Any, looks: Callable[[str], bool], state: State
) -> None:
    study, both = ledger.find(storage, "trivial"), threading.Barrier(2)
    is_shut, is_open_again, is_used_again = (threading.Event() for _ in range(3))

    def ends(slot: Slot, job: int, trial: str) -> None:
        if job == 1:
            both.wait(60)
        if slot.name == "gpu:0" and job == 1:
            ledger.set_state(storage, study, state)
            is_shut.set()
            assert looks("gpu:1"), "the slot without a trial left"
            is_open_again.set()
            ledger.set_state(storage, study, "open")
            assert is_used_again.wait(30)
        assert is_shut.wait(60)
        if is_open_again.is_set():
            is_used_again.set()

    assert fill(2, ends, ["trivial"], Listener())
    assert _states(storage) == [TrialState.COMPLETE] * 5


def test_a_closed_slot_stays_closed_when_its_study_was_paused_for_a_moment(
    storage: PatientStorage, fill: Any, looks: Callable[[str], bool]
) -> None:
    study, jobs = ledger.find(storage, "trivial"), Counter[str]()

    def ends(slot: Slot, job: int, trial: str) -> Failed | None:
        jobs[slot.name] += 1
        if slot.name == "gpu:0":
            return LOST
        if job == 1:
            _until(lambda: _closed(storage))
            for state in ("paused", "open"):
                ledger.set_state(storage, study, state)
                assert looks("gpu:0")
        return None

    assert fill(2, ends, ["trivial"], Listener())
    assert jobs["gpu:0"] == 1
    assert _states(storage) == [TrialState.COMPLETE] * 5


def test_a_second_signal_ends_the_work_of_a_script_at_once_and_not_its_process(
    storage: PatientStorage, fill: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(interruption, "is_command", False)
    at_once: list[bool] = []

    def ends(slot: Slot, job: int, trial: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        _until(lambda: "SIGINT: finishing the running batches; interrupt again to exit at once" in caplog.text)
        os.kill(os.getpid(), signal.SIGINT)
        at_once.append(storage.shutting_down.wait(10))  # a silent trainer is waited for more than twice as long

    assert not fill(1, ends, ["trivial"], Listener())
    assert at_once == [True]


def test_a_worker_tries_a_study_again_that_it_could_train_before(
    storage: PatientStorage, fill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_studies, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(checks, "forget_keras", lambda: None)
    broken = Failed(kind="import", message="mine.py is being replaced")
    assert fill(1, lambda slot, job, trial: broken if job == 2 else None, ["trivial"], Listener(), share=True)
    assert _states(storage) == [TrialState.COMPLETE] * 5


def test_a_database_with_the_earlier_table_of_slots_is_brought_over(storage: PatientStorage, sqlite_url: str) -> None:
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE trialyard_slots RENAME TO trialyard_workers")
        connection.exec_driver_sql("ALTER TABLE trialyard_workers DROP COLUMN closed")
    with pytest.raises(StorageError, match="run `trialyard storage upgrade`"):
        database.connect(sqlite_url)
    database.upgrade(sqlite_url)
    assert studies.workers(database.connect(sqlite_url)) == []
    assert "trialyard_workers" not in sqlalchemy.inspect(storage.engine).get_table_names()


def test_a_worker_warns_of_another_one_on_its_gpu(storage: PatientStorage, caplog: pytest.LogCaptureFixture) -> None:
    other = Owner(machine="a container of it", host=socket.gethostname(), pid=1, born=0.0, slot="gpu:1.0")
    claims.beat(storage, {other: "H100"}, [], {})
    worker._warn_of_shared_gpus(storage, _slots(1))
    assert not caplog.text
    worker._warn_of_shared_gpus(storage, _slots(2))
    assert "process 1 of this machine has the slot gpu:1.0 on the same GPU: give each worker GPUs of its" in caplog.text
