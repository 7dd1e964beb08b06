"""Each trial ends with its own model, whoever else writes below the same artifacts folder.

Real commands, real trainings, real signals: two databases that share a folder, a study that is deleted and created
again, and a worker that sleeps through its claim and then writes.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest
from conftest import ELSEWHERE, Command, ended, until

import studies
from search import data
from storage import database
from studies import definition as definitions

pytestmark = pytest.mark.long

SETTINGS = {"TRIALYARD_WORKERS": "1", "TRIALYARD_CHECKPOINT_SECONDS": "0"}


def _begin(start: Command, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return start(*arguments, variables=os.environ | SETTINGS | variables)


def _done(start: Command, *arguments: str, **variables: str) -> str:
    """Runs a command to its end; what it wrote."""
    return "".join(ended(_begin(start, *arguments, **variables)))


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills the worker and its trainer by SIGKILL."""
    children = psutil.Process(process.pid).children()
    process.kill()
    for child in children:
        child.kill()
    process.wait()


def _assert_right_model(file: Path, url: str) -> None:
    """The best trial's model has, on the validation images, the accuracy that the trial was given."""
    definition = definitions.load(str(file))
    dataset = data.load(definition.dataset, definition.data, [file.parent])
    best = studies.best_trial("small", url)
    predicted = studies.best_model("small", url).predict(dataset.x_validation, verbose=0)
    accuracy = float(np.mean(np.argmax(predicted, axis=1) == dataset.y_validation))
    assert accuracy == pytest.approx(best.values[0], abs=1e-6)
    keras.backend.clear_session()


def test_two_databases_with_one_artifacts_folder(home: Path, write_small: Callable[..., Path], start: Command) -> None:
    file = write_small(trials=2, epochs=8)
    first, second = f"sqlite:///{home}/first.db", f"sqlite:///{home}/second.db"
    worker = _begin(start, "run", str(file), TRIALYARD_STORAGE=first)
    until(worker, "small trial 1 epoch 3/8")
    _kill(worker)
    said = _done(start, "run", str(file), TRIALYARD_STORAGE=second)
    assert "attempt 2" not in said
    said = _done(start, "run", str(file), TRIALYARD_STORAGE=first)
    assert "small trial 1 begins (attempt 2)" in said
    assert (studies.attempts("small", 1, first)[-1].resumed_after or 0) >= 2
    for url in (first, second):
        said = _done(start, "storage", "prune", "--yes", TRIALYARD_STORAGE=url)
        assert "kept, since it may be another database's" in said
        assert "0 B were freed" in said
        assert studies.status("small", url).complete == 2
        _assert_right_model(file, url)
    # What one database deletes is not the other's.
    _done(start, "delete", "small", "--yes", TRIALYARD_STORAGE=second)
    _assert_right_model(file, first)


def test_a_study_created_again_takes_nothing_of_the_one_that_was_deleted(
    home: Path, write_small: Callable[..., Path], start: Command
) -> None:
    file, url = write_small(trials=1, epochs=8), f"sqlite:///{home}/yard/studies.db"
    worker = _begin(start, "run", str(file))
    until(worker, "small trial 0 epoch 4/8")
    _kill(worker)
    left = {path: path.read_bytes() for path in (home / "yard" / "artifacts").rglob("checkpoint.npz")}
    assert len(left) == 1
    _done(start, "delete", "small", "--yes")
    for path, content in left.items():  # as if the deletion had been killed before it removed the files
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    _done(start, "run", str(file))
    (attempt,) = studies.attempts("small", 0, url)
    assert (attempt.outcome, attempt.resumed_after) == ("finished", None)
    _assert_right_model(file, url)
    said = _done(start, "storage", "prune", "--yes")
    assert "its study is gone" in said
    assert [path for path in left if path.exists()] == []
    _assert_right_model(file, url)


def test_a_worker_that_sleeps_through_its_claim_and_then_writes(
    home: Path, write_small: Callable[..., Path], start: Command
) -> None:
    file, url = write_small(trials=1, epochs=60), f"sqlite:///{home}/yard/studies.db"
    soon = {"TRIALYARD_GRACE_SECONDS": "1", "TRIALYARD_BEAT_SECONDS": "0.3"}
    slow = _begin(start, *ELSEWHERE, "run", str(file), **soon)
    until(slow, "small trial 0 epoch 3/60")
    processes = [psutil.Process(slow.pid), *psutil.Process(slow.pid).children()]
    for process in processes:
        process.suspend()
    said = _done(start, "run", str(file), **soon)
    assert "no sign of process" in said
    assert "small trial 0 begins (attempt 2)" in said
    best = studies.best_trial("small", url)
    assert "/0/2/" in best.user_attrs["model"]
    # The trainer goes on for a while, and writes: only its worker can tell it that the trial is another's.
    os.kill(processes[1].pid, signal.SIGCONT)
    late = home / "yard" / "artifacts" / Path(best.user_attrs["model"]).parents[1] / "1" / "model.keras"
    deadline = time.time() + 120
    while not late.exists() and time.time() < deadline:
        time.sleep(0.1)
    assert late.exists()
    slow.send_signal(signal.SIGCONT)
    assert "no longer held by cpu:0" in "".join(ended(slow))
    assert studies.best_trial("small", url).user_attrs == best.user_attrs
    _assert_right_model(file, url)
    assert "of an attempt that does not count" in _done(start, "storage", "prune", "--yes")
    assert not late.exists()
    _assert_right_model(file, url)
    assert database.check(database.connect(url)) == []
