"""The trainer process: kept over trials, stopped, killed, and its death told; gone when its worker is gone."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.devices import Slot, cpu
from search.records import Epoch, Trained
from search.trainer import Checked, Failed, Job, Trainer, TrainerDied
from studies import definition as definitions

Make = Callable[..., Job]
SLOT = Slot(device=cpu(), threads=1)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """A slot's trainer, not yet started."""
    with Trainer(SLOT, tmp_path / "logs" / "trainer.log") as made:
        yield made


@pytest.fixture
def job(write_small: Callable[..., Path], home: Path) -> Make:
    """Makes a small training of 2 epochs."""
    path = write_small()

    def make(epochs: int = 2, **changed: Any) -> Job:
        definition = definitions.load(str(path), epochs=epochs)
        arguments: dict[str, Any] = {
            "definition": definition,
            "hyperparameters": definition.fixed | {"dropout": 0.1},
            "seed": 1,
            "slot": SLOT,
            "data_folders": (home,),
            "folder": home / "trial",
        }
        return Job(**arguments | changed)

    return make


def _messages(trainer: Trainer) -> list[Any]:
    """All that a job sends, up to its end."""
    messages: list[Any] = []
    while not messages or isinstance(messages[-1], Epoch):
        message = trainer.receive(240)
        assert message is not None, "the trainer is silent"
        messages.append(message)
    return messages


def test_a_process_is_kept_over_jobs_and_each_gives_its_numbers(trainer: Trainer, job: Make) -> None:
    ends = []
    for _ in range(2):
        trainer.submit(job())
        *records, end = _messages(trainer)
        assert [record.epoch for record in records] == [1, 2]
        assert isinstance(end, Trained)
        ends.append((trainer.pid, end.value, [record.loss for record in records]))
    assert ends[0] == ends[1]
    trainer.submit(job(folder=None))
    (checked,) = _messages(trainer)
    assert isinstance(checked, Checked)
    assert (checked.data["train"], checked.data["validation"], checked.data["classes"]) == (240, 60, 10)
    trainer.submit(job(hyperparameters={"optimizer": "sgd", "learning_rate": 1e30, "width": 0.1, "batch_size": 20}))
    failed = _messages(trainer)[-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "nan"
    assert failed.message.startswith("the training loss became")
    trainer.submit(job(hyperparameters={"width": "wide"}))  # no definition allows it: an error in the process
    failed = _messages(trainer)[-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "error"
    assert "TypeError" in failed.message
    assert "Traceback" in trainer.log_file.read_text(encoding="utf-8")
    assert trainer.pid == ends[0][0]


def test_a_stop_reaches_it_within_the_epoch_and_not_the_next_job(trainer: Trainer, job: Make) -> None:
    trainer.submit(job(epochs=100_000))
    assert isinstance(trainer.receive(240), Epoch)
    trainer.stop("drop")
    end = _messages(trainer)[-1]
    assert isinstance(end, Trained)
    assert end.stopped
    trainer.stop("drop")  # late: the job has ended
    trainer.submit(job())
    end = _messages(trainer)[-1]
    assert isinstance(end, Trained)
    assert not end.stopped


def test_a_killed_trainer_is_told_and_replaced(trainer: Trainer, job: Make) -> None:
    trainer.submit(job(epochs=100_000))
    assert isinstance(trainer.receive(240), Epoch)
    first = trainer.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(TrainerDied, match=rf"{first} ended by signal SIGKILL .*trainer.log"):
        _messages(trainer)
    trainer.submit(job())
    assert isinstance(_messages(trainer)[-1], Trained)
    assert trainer.pid != first


ALONE = """
import sys, pickle, time
from pathlib import Path
from search.trainer import Trainer

job = pickle.loads(Path(sys.argv[1]).read_bytes())
trainer = Trainer(job.slot, Path(sys.argv[2]))
trainer.submit(job)
trainer.receive(240)
print(trainer.pid, flush=True)
time.sleep(600)
"""


def test_a_trainer_ends_when_its_worker_is_killed(job: Make, tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps(job(epochs=100_000)))
    worker = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(tmp_path / "job"), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    worker.stdout.close()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the trainer outlived its worker"
        time.sleep(0.05)


def test_data_and_models_that_fail_are_told_apart(trainer: Trainer, job: Make) -> None:
    good = job()
    trainer.submit(job(definition=good.definition.model_copy(update={"dataset": "none.npz"})))
    missing = _messages(trainer)[-1]
    trainer.submit(job(definition=good.definition.model_copy(update={"model": "nowhere:build"}), folder=None))
    unknown = _messages(trainer)[-1]
    assert (missing.kind, unknown.kind) == ("data", "model")
    assert "none.npz does not exist" in missing.message
    assert "nowhere:build cannot be imported" in unknown.message
