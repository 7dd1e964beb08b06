"""A trial's end is written down as what it was, whatever the trainer and the database do at that moment."""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from threading import Event
from typing import Any

import optuna
import pytest
from conftest import TRIVIAL, attempts_at
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from scripted import Message, Scripted, epoch, trained

from search import attempt as attempt_module
from search.attempt import Attempt, StudyHandle
from search.devices import Slot, cpu
from search.errors import DeviceError, MachineError
from search.heartbeat import Pulse
from search.messages import Failed, Repeated, Resumed
from search.stall import Stall
from search.trainer import Trainer, TrainerDied
from storage import artifacts, attempt_table, claims, faults, ledger, owners, transactions
from storage.attempt_files import AttemptFiles
from storage.errors import DiskError, ObjectStoreError, TrialyardError
from storage.owners import Owner
from storage.settings import Settings
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import pictures, registry, results
from studies.definition import parse
from studies.errors import StudyError
from studies.imported import import_trials

pytestmark = pytest.mark.usefixtures("study")


def _handle(storage: PatientStorage, study: ledger.Study) -> StudyHandle:
    return StudyHandle(
        study=study,
        definition=registry.definition_of(study.name, storage),
        storage=storage,
        cached=TrialCache(storage),
    )


def _run(
    storage: PatientStorage,
    folder: Path,
    me: Owner,
    *messages: Message | Callable[[], Message],
    study: str = "trivial",
    used: bool = False,
) -> Scripted:
    """Runs one trial with a trainer that says `messages`; a `used` one has run another job before."""
    found = ledger.find(storage, study)
    claim = claims.claim(storage, found, me, 60.0)
    assert claim is not None
    handle = _handle(storage, found)
    trainer, settings = Scripted(folder, list(messages), used=used), Settings(home=folder)
    Attempt(handle, claim, trainer, settings, pulse=Pulse(), listeners=[], interrupted=Event()).run()
    return trainer


def _only(storage: PatientStorage) -> optuna.trial.FrozenTrial:
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("trivial"))
    return trial


@pytest.mark.parametrize(
    "error",
    [AssertionError("inside it"), KeyError("inside it"), ValueError("inside it"), optuna.TrialPruned("inside it")],
)
def test_an_error_of_a_sampler_or_a_pruner_never_ends_a_worker(
    storage: PatientStorage,
    tmp_path: Path,
    me: Owner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(optuna.pruners.NopPruner, "prune", fail)
        _run(storage, tmp_path, me, epoch(1, 0.5), epoch(2, 0.6), trained(stopped=False))
    assert (_only(storage).state, _only(storage).values) == (TrialState.COMPLETE, [0.9])
    assert "the pruner failed at trivial trial 0 after step 1, which goes on" in caplog.text
    for method in ("sample_independent", "infer_relative_search_space"):
        with monkeypatch.context() as patched:
            patched.setattr(optuna.samplers.TPESampler, method, fail)
            _run(storage, tmp_path, me)
        failed = storage.get_all_trials(storage.get_study_id_from_name("trivial"))[-1]
        assert failed.state == TrialState.FAIL
        assert failed.user_attrs["failure"] == {"kind": "sampler", "message": f"{type(error).__name__}: {error}"}


def test_a_sampler_whose_package_cannot_be_imported_is_the_machine_s_fault(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", fail)
    with pytest.raises(MachineError, match=r"libcudart\.so\.12"):
        _run(storage, tmp_path, me)
    assert _only(storage).state == TrialState.WAITING


def test_a_sampler_that_finds_the_trial_ended_ends_no_worker(
    storage: PatientStorage,
    tmp_path: Path,
    me: Owner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(*_: Any) -> Any:  # TPE stores what it has drawn in the trial
        raise UpdateFinishedTrialError("Trial#0 has already finished and can not be updated.")

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", refused)
    _run(storage, tmp_path, me)
    assert "trial 0 was ended by somebody else meanwhile" in caplog.text


def test_an_error_of_the_artifacts_disk_in_an_epoch_ends_no_worker(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def stale(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(artifacts.CHECKPOINT):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stale)
    _run(storage, tmp_path, me, epoch(1, 0.5), epoch(2, 0.6), trained(stopped=False))
    assert _only(storage).state == TrialState.COMPLETE


@pytest.mark.parametrize(("stopped", "state"), [(True, TrialState.PRUNED), (False, TrialState.COMPLETE)])
def test_a_trial_at_its_end_is_complete_though_it_was_to_be_pruned(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch, stopped: bool, state: Any
) -> None:
    monkeypatch.setattr(Attempt, "_should_prune", lambda attempt, epoch: epoch == 1)
    trainer = _run(storage, tmp_path, me, epoch(1, 0.5), epoch(2, 0.6), trained(stopped=stopped))
    assert trainer.requests == ["drop"]
    assert (_only(storage).state, _only(storage).values) == (state, [0.6 if stopped else 0.9])


def test_a_pruner_sees_no_value_of_an_earlier_attempt_that_got_further(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = claims.claim(storage, ledger.find(storage, "trivial"), me, 60.0)
    assert lost is not None
    claims.record_epochs(storage, lost, {1: 0.8, 2: 0.9})
    claims.requeue(storage, lost, "interrupted", "its checkpoint was lost with its machine")
    seen: list[dict[int, float]] = []

    def prune(pruner: Any, study: Any, trial: optuna.trial.FrozenTrial) -> bool:
        seen.append(dict(trial.intermediate_values))
        return True

    monkeypatch.setattr(optuna.pruners.NopPruner, "prune", prune)
    _run(storage, tmp_path, me, epoch(1, 0.5), trained(stopped=True))
    assert seen == [{1: 0.5}]
    assert (_only(storage).state, _only(storage).intermediate_values) == (TrialState.PRUNED, {1: 0.5})


REPEATED = TRIVIAL.replace('"trivial"', '"repeated"').replace("epochs = 2", "epochs = 2\nrepeats = 5")


@pytest.mark.parametrize("pruned", [False, True])
def test_the_steps_of_repeats_are_whole_trainings(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    created = registry.create(parse(REPEATED), storage, {"fingerprint": "0" * 16}).study
    asked: list[int] = []

    def prune(attempt: Attempt, step: int) -> bool:
        asked.append(step)
        return pruned and step == 2

    monkeypatch.setattr(Attempt, "_should_prune", prune)
    values = (0.8, 0.6) if pruned else (0.8, 0.6, 0.7, 0.7, 0.7)
    # It goes on in the second repeat, from a checkpoint.
    messages: list[Any] = [Resumed(history=(epoch(1, 0.8), epoch(2, 0.1), epoch(3, 0.6)))]
    messages += [Repeated(repeat=1, value=0.8), epoch(4, 0.2), Repeated(repeat=2, value=0.6)]
    for repeat in range(3, len(values) + 1):
        messages += [epoch(2 * repeat - 1, 0.7), epoch(2 * repeat, 0.7), Repeated(repeat=repeat, value=0.7)]
    ended = replace(trained(stopped=pruned), value=0.7, repeats=values)
    trainer = _run(storage, tmp_path, me, *messages, ended, study="repeated")
    (trial,) = storage.get_all_trials(created.id)
    assert trial.intermediate_values == dict(enumerate(values, start=1))
    assert trial.values == [pytest.approx(0.7)]
    assert trial.state == (TrialState.PRUNED if pruned else TrialState.COMPLETE)
    assert trainer.requests == (["drop"] if pruned else [])
    assert asked == ([1, 2] if pruned else [1, 2, 3, 4]), "not after the last one"
    assert trial.user_attrs["repeats"] == list(values)
    assert trial.user_attrs["deviation"] == pytest.approx(stdev(values), abs=1e-6)
    (attempt,) = attempts_at(storage, trial._trial_id)
    assert (attempt.resumed_after, attempt.epoch) == (3, 4 if pruned else 10)


def _taken_over(storage: PatientStorage) -> None:
    """Another machine holds the trial now."""
    other = replace(owners.this_slot("cpu:0"), machine="other", host="other")

    def take(connection: Any) -> None:
        ((trial_id, _, running),) = attempt_table.running(connection, ledger.find(storage, "trivial").id)
        claims._put_back(connection, trial_id, running.attempt, "lost", "it was silent")

    transactions.write(storage, "trivial", take)
    assert claims.claim(storage, ledger.find(storage, "trivial"), other, 60.0) is not None


def test_a_trainer_that_dies_when_the_trial_is_another_s_ends_no_worker(
    storage: PatientStorage, tmp_path: Path, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    def dies() -> Message:
        _taken_over(storage)
        return TrainerDied("it ended by signal SIGABRT", out_of_memory=False)

    _run(storage, tmp_path, me, epoch(1, 0.5), dies)
    assert "no longer held by cpu:0" in caplog.text
    machines = [attempt.owner.machine for attempt in attempts_at(storage, _only(storage)._trial_id)]
    assert machines == [me.machine, "other"]
    assert _only(storage).state == TrialState.RUNNING


def test_failed_trials_teach_the_sampler_and_not_the_pruner(storage: PatientStorage, tmp_path: Path, me: Owner) -> None:
    """The median of 5 complete trials is not that of one complete trial and four without a score."""
    kinds = '[sampler]\nkind = "random"\n\n[pruner]\nkind = "median"\n'
    registry.create(parse(TRIVIAL.replace("= 5", "= 9") + kinds, name="median"), storage, {"fingerprint": "0" * 16})
    _run(storage, tmp_path, me, epoch(1, 0.9), epoch(2, 0.9), trained(stopped=False), study="median")
    for _ in range(4):
        _run(storage, tmp_path, me, Failed(kind="nan", message="its loss is NaN"), study="median")
    last = _run(storage, tmp_path, me, epoch(1, 0.5), epoch(2, 0.6), trained(stopped=False), study="median")
    states = [trial.state for trial in storage.get_all_trials(storage.get_study_id_from_name("median"))]
    assert states == [TrialState.COMPLETE, *[TrialState.FAIL] * 4, TrialState.COMPLETE]
    assert last.requests == []


def test_a_pruner_that_finds_the_trial_ended_ends_no_worker(
    storage: PatientStorage,
    tmp_path: Path,
    me: Owner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(pruner: Any, study: Any, trial: Any) -> bool:
        raise UpdateFinishedTrialError("Trial#0 has already finished and can not be updated.")

    monkeypatch.setattr(optuna.pruners.NopPruner, "prune", refused)
    monkeypatch.setattr(attempt_module.sampling, "pruner", lambda definition: optuna.pruners.NopPruner())
    _run(storage, tmp_path, me, epoch(1, 0.5))
    assert "trial 0 was ended by somebody else meanwhile" in caplog.text


@pytest.mark.parametrize(
    ("kind", "error"),
    [("disk", DiskError), ("device", DeviceError), ("import", MachineError), ("load", MachineError)],
)
def test_a_machine_s_fault_costs_the_trial_nothing(
    storage: PatientStorage, tmp_path: Path, me: Owner, kind: str, error: type[TrialyardError]
) -> None:
    for _ in range(2 * faults.CRASHES):  # it costs the trial nothing, however often
        with pytest.raises(error, match="what is wrong"):
            _run(storage, tmp_path, me, Failed(kind=kind, message="what is wrong"))
    assert _only(storage).state == TrialState.WAITING


def test_a_training_that_always_breaks_its_accelerator_fails_at_last(
    storage: PatientStorage, tmp_path: Path, me: Owner
) -> None:
    """It would close one slot after another for ever."""
    for attempt in range(faults.CRASHES + 1):
        assert attempt == 0 or _only(storage).state == TrialState.WAITING
        with pytest.raises(DeviceError, match="CUDA error"):
            _run(storage, tmp_path, me, Failed(kind="accelerator", message="CUDA error: unknown"))
    assert _only(storage).state == TrialState.FAIL


def test_a_log_that_cannot_be_written_is_the_disk_s_fault(storage: PatientStorage, tmp_path: Path, me: Owner) -> None:
    study = ledger.find(storage, "trivial")
    claim = claims.claim(storage, study, me, 60.0)
    assert claim is not None
    (tmp_path / "logs").write_text("a file where the folder should be", encoding="utf-8")
    trainer = Trainer(Slot(device=cpu()), tmp_path / "logs" / "trainer.log")
    attempt = Attempt(
        _handle(storage, study),
        claim,
        trainer,
        Settings(home=tmp_path),
        pulse=Pulse(),
        listeners=[],
        interrupted=Event(),
    )
    with pytest.raises(DiskError, match=r"trainer.log cannot be written .* is the disk full"):
        attempt.run()
    assert _only(storage).state == TrialState.WAITING


EARLY = TrainerDied("it ended by signal SIGILL", out_of_memory=False, ready=False)
KILLED_EARLY = TrainerDied("it ended by signal SIGKILL", out_of_memory=True, ready=False)


@pytest.mark.parametrize("death", [EARLY, KILLED_EARLY])
def test_a_trainer_that_dies_before_it_is_ready_is_tried_once_more_and_costs_the_trial_nothing(
    storage: PatientStorage, tmp_path: Path, me: Owner, death: TrainerDied
) -> None:
    for _ in range(faults.CRASHES + 1):
        with pytest.raises(DeviceError, match="it ended by signal SIG"):
            _run(storage, tmp_path, me, death, death)
    assert _only(storage).state == TrialState.WAITING
    _run(storage, tmp_path, me, death, epoch(1, 0.5), trained(stopped=False))
    assert _only(storage).state == TrialState.COMPLETE
    outcomes = [attempt.outcome for attempt in attempts_at(storage, _only(storage)._trial_id)]
    assert outcomes == ["interrupted"] * (faults.CRASHES + 1) + ["finished"]


def _failure(kind: str) -> Failed:
    return Failed(kind=kind, message="what is wrong")


CRASH = TrainerDied("it ended by signal SIGSEGV", out_of_memory=False)
KILLED = TrainerDied("it ended by signal SIGKILL", out_of_memory=True)
LEFT_OVER = [
    CRASH,
    KILLED,
    *map(_failure, ("error", "model", "memory", "accelerator", "device", "import", "unheard of")),
]


@pytest.mark.parametrize("failure", LEFT_OVER, ids=str)
def test_the_first_failure_in_a_used_process_is_tried_once_in_a_new_one(
    storage: PatientStorage, tmp_path: Path, me: Owner, failure: Failed | TrainerDied
) -> None:
    trainer = _run(storage, tmp_path, me, failure, epoch(1, 0.5), trained(stopped=False), used=True)
    assert trainer.requests == ["kill"]
    assert _only(storage).state == TrialState.COMPLETE
    assert [attempt.outcome for attempt in attempts_at(storage, _only(storage)._trial_id)] == ["finished"]


@pytest.mark.parametrize("end", [*LEFT_OVER, _failure("disk"), _failure("nan")], ids=str)
def test_a_trial_that_the_pruner_ended_is_pruned_whatever_its_trainer_does_then(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch, end: Failed | TrainerDied
) -> None:
    monkeypatch.setattr(Attempt, "_should_prune", lambda attempt, step: True)
    trainer = _run(storage, tmp_path, me, epoch(1, 0.5), end, used=True)
    assert (_only(storage).state, _only(storage).values) == (TrialState.PRUNED, [0.5])
    assert trainer.requests == ["drop", "kill"]


@pytest.mark.parametrize(
    "error", [DiskError("a file cannot be read"), ObjectStoreError("the store refuses it")], ids=str
)
def test_a_pruned_trial_whose_files_cannot_be_kept_is_pruned_without_them(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch, error: TrialyardError
) -> None:
    def refused(files: AttemptFiles, look: Callable[[], None]) -> None:
        raise error

    monkeypatch.setattr(Attempt, "_should_prune", lambda attempt, step: True)
    monkeypatch.setattr(AttemptFiles, "keep_all", refused)
    _run(storage, tmp_path, me, epoch(1, 0.5), trained(stopped=True))
    trial = _only(storage)
    assert (trial.state, trial.values) == (TrialState.PRUNED, [0.5])
    assert "history" not in trial.user_attrs


def test_a_failure_in_a_new_process_counts_and_the_process_is_replaced(
    storage: PatientStorage, tmp_path: Path, me: Owner
) -> None:
    trainer = _run(storage, tmp_path, me, _failure("error"), _failure("error"), used=True)
    assert (_only(storage).state, trainer.requests) == (TrialState.FAIL, ["kill", "kill"])
    assert _run(storage, tmp_path, me, _failure("error")).requests == ["kill"]


@pytest.mark.parametrize("kind", ["nan", "data"])
def test_a_process_is_kept_after_hyperparameters_that_are_bad(
    storage: PatientStorage, tmp_path: Path, me: Owner, kind: str
) -> None:
    trainer = _run(storage, tmp_path, me, _failure(kind), used=True)
    assert (_only(storage).state, trainer.requests) == (TrialState.FAIL, [])


def test_a_training_that_ended_in_time_is_complete_however_slow_the_database_was(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = parse(TRIVIAL.replace("epochs = 2", "epochs = 3\ntrial_minutes = 0.005"), name="limited")
    registry.create(limited, storage, {"fingerprint": "0" * 16})
    record = claims.record_epochs

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.4)  # more than the trial's time
        return record(*arguments, **options)

    monkeypatch.setattr(claims, "record_epochs", late)
    monkeypatch.setattr(Scripted, "ready", True)
    _run(storage, tmp_path, me, epoch(1, 0.5), epoch(2, 0.6), trained(stopped=False), study="limited")
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("limited"))
    assert (trial.state, trial.user_attrs.get("failure")) == (TrialState.COMPLETE, None)


def test_a_training_that_ended_in_time_is_complete_though_its_worker_was_stopped_meanwhile(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = parse(TRIVIAL.replace("epochs = 2", "epochs = 3\ntrial_minutes = 0.005"), name="limited")
    registry.create(limited, storage, {"fingerprint": "0" * 16})
    monkeypatch.setattr("search.deadlines.LOOK_SECONDS", 0.05)
    monkeypatch.setattr(Scripted, "ready", True)

    def long_look() -> Any:  # as after Ctrl-Z
        time.sleep(0.5)
        return epoch(2, 0.6)

    _run(storage, tmp_path, me, epoch(1, 0.5), long_look, trained(stopped=False), study="limited")
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("limited"))
    assert (trial.state, trial.user_attrs.get("failure")) == (TrialState.COMPLETE, None)


def _silence(seconds: float) -> Callable[[], Any]:
    return lambda: time.sleep(seconds)


def test_a_training_that_hangs_is_killed_and_its_trial_waits_again(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_STALL_SECONDS", "0.05")
    first, second = (replace(epoch(number, 0.5), seconds=0.001) for number in (1, 2))
    trainer = _run(storage, tmp_path, me, first, _silence(0.06), second, *[_silence(0.03)] * 50)
    assert "kill" in trainer.requests
    trial = _only(storage)
    (attempt,) = attempts_at(storage, trial._trial_id)
    assert (trial.state, attempt.outcome, attempt.epoch) == (TrialState.WAITING, "crashed", 2)
    assert "s in a training and was killed" in str(attempt.reason)


def test_the_time_that_a_training_may_be_silent_follows_from_its_own_epochs() -> None:
    stall = Stall(600.0)

    def be_silent(seconds: float) -> bool:
        for _ in range(round(seconds)):
            stall.looked(1.0, None)
        return stall.is_over

    assert not be_silent(23 * 3600), "the first epoch also loads and compiles"
    stall.looked(0.2, epoch(1, 0.5))
    assert not be_silent(100)
    stall.looked(0.2, epoch(2, 0.5))
    assert stall.limit == pytest.approx(20 * 100.2)
    stall.looked(1000.0, None)  # the worker was stopped, or the machine slept
    assert not be_silent(2000)
    assert be_silent(5)


def test_a_short_epoch_does_not_make_a_short_silence_a_hang() -> None:
    stall = Stall(600.0)
    for number in range(1, 10):
        stall.looked(0.2, epoch(number, 0.5))
    assert stall.limit == 600.0


def test_a_file_that_cannot_be_removed_ends_no_worker(
    storage: PatientStorage,
    tmp_path: Path,
    me: Owner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(attempt_module.retention.artifacts, "remove", refused)
    _run(storage, tmp_path, me, trained(stopped=False))
    assert _only(storage).state == TrialState.COMPLETE
    assert "a file of trial 0 stays: [Errno 13] Permission denied" in caplog.text


def test_a_study_deleted_right_after_the_claim_ends_no_worker(
    storage: PatientStorage, tmp_path: Path, me: Owner
) -> None:
    study = ledger.find(storage, "trivial")
    claim = claims.claim(storage, study, me, 60.0)
    assert claim is not None
    handle = _handle(storage, study)
    ledger.set_state(storage, study, "stopped")
    claims.delete(storage, study, 60.0)
    settings = Settings(home=tmp_path)
    trainer = Scripted(tmp_path, [])
    Attempt(handle, claim, trainer, settings, pulse=Pulse(), listeners=[], interrupted=Event()).run()
    assert registry.names(storage) == []


def test_a_space_that_is_used_up_ends_its_study_with_a_sentence(
    storage: PatientStorage, tmp_path: Path, me: Owner
) -> None:
    space = "[space]\ndropout = { choices = [0.0, 0.1] }\n"
    definition = parse(TRIVIAL.partition("[space]")[0] + space + "\n[fixed]\ndepth = 3\n", name="used-up")
    registry.create(definition, storage, {"fingerprint": "0" * 16})
    import_trials("used-up", [{"dropout": rate, "accuracy": 0.9} for rate in (0.0, 0.1)], storage)
    _run(storage, tmp_path, me, study="used-up")
    failed = storage.get_all_trials(storage.get_study_id_from_name("used-up"))[-1]
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["failure"] == {
        "kind": "exhausted",
        "message": "all 2 combinations of the space have a trial: nothing is left to search",
    }
    assert ledger.find(storage, "used-up").has_ended


def test_a_space_that_is_used_up_takes_no_trial_from_another_slot(
    storage: PatientStorage, tmp_path: Path, me: Owner
) -> None:
    space = "[space]\ndropout = { choices = [0.0, 0.1] }\n"
    definition = parse(TRIVIAL.partition("[space]")[0] + space + "\n[fixed]\ndepth = 3\n", name="used-up")
    study = registry.create(definition, storage, {"fingerprint": "0" * 16}).study
    import_trials("used-up", [{"dropout": 0.0, "accuracy": 0.9}], storage)
    last_point = claims.claim(storage, study, replace(me, slot="cpu:1"), 60.0)
    assert last_point is not None
    claims.begin(storage, last_point, {"dropout": (definition.space["dropout"].distribution(), 0.1)})
    _run(storage, tmp_path, me, study="used-up")
    assert ledger.find(storage, "used-up").state == "open"
    claims.finish(storage, last_point, TrialState.COMPLETE, 0.8, {})
    states = [trial.state for trial in storage.get_all_trials(last_point.study_id)]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert ledger.find(storage, "used-up").has_ended


def test_pictures_that_cannot_be_drawn_cost_no_result(
    storage: PatientStorage, tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> list[str]:
        raise KeyError("a damaged file")

    monkeypatch.setattr(pictures, "write", broken)
    _run(storage, tmp_path, me, trained(stopped=False))
    assert _only(storage).values == [0.9]


def test_a_model_that_was_not_saved_has_its_reason(storage: PatientStorage, tmp_path: Path, me: Owner) -> None:
    _run(storage, tmp_path, me, replace(trained(stopped=False), unsaved="NotImplementedError: no get_config"))
    trial = _only(storage)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.9])
    assert trial.user_attrs["model_unsaved"] == "NotImplementedError: no get_config"
    with pytest.raises(StudyError, match=r"could not be saved \(NotImplementedError: no get_config\): correct the"):
        results.file_of(ledger.find(storage, "trivial"), trial, "model", storage)
