"""The trainer process: kept over trials, stopped, killed; its death is reported; it ends when its worker ends."""

import dataclasses
import hashlib
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from search import trainer as trainers
from search.devices import Device, Slot, cpu
from search.messages import Batches, Checked, Epoch, Failed, Job, Resumed, Stop, Trained
from search.trainer import Trainer, TrainerDied
from search.trainer_process import send_if_read
from storage import trainer_logs
from storage.artifacts import CHECKPOINT
from storage.errors import DiskError
from studies import definition as definitions
from studies.recipe import Recipe

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
        definition = changed.get("definition", definition)
        wanted = Recipe(
            hyperparameters=changed.pop("hyperparameters", definition.fixed | {"dropout": 0.1}),
            epochs=definition.budget.epochs,
            schedule_epochs=definition.budget.epochs,
            seed=1,
            data=definition.data,
        )
        arguments: dict[str, Any] = {
            "definition": definition,
            "recipe": wanted,
            "slot": SLOT,
            "data_folders": (home,),
            "folder": home / "trial",
        }
        return Job(**arguments | changed)

    return make


def _next(trainer: Trainer) -> Any:
    """The next message that is recorded."""
    while isinstance(message := trainer.receive(240), Batches):
        assert 0 < message.done <= message.total
    assert message is not None, "the trainer is silent"
    return message


def _messages(trainer: Trainer) -> list[Any]:
    """All messages of a job that are recorded, up to its end."""
    messages: list[Any] = []
    while not messages or isinstance(messages[-1], Epoch):
        messages.append(_next(trainer))
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
    assert isinstance(_next(trainer), Epoch)
    trainer.stop("drop")
    end = _messages(trainer)[-1]
    assert isinstance(end, Trained)
    assert end.stopped
    trainer.stop("drop")  # late: the job has ended
    trainer.submit(job())
    end = _messages(trainer)[-1]
    assert isinstance(end, Trained)
    assert not end.stopped


def test_a_killed_trainer_is_reported_and_replaced(trainer: Trainer, job: Make) -> None:
    trainer.submit(job(epochs=100_000))
    assert isinstance(_next(trainer), Epoch)
    first = trainer.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(TrainerDied, match=rf"{first} ended by signal SIGKILL; .*trainer.log"):
        _messages(trainer)
    trainer.submit(job())
    assert isinstance(_messages(trainer)[-1], Trained)
    assert trainer.pid != first


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGRTMIN + 6, "40")])
def test_a_death_by_any_signal_is_reported(tmp_path: Path, number: int, name: str) -> None:
    trainer = Trainer(Slot(device=cpu()), tmp_path / "log")
    ours, theirs = Pipe()
    process = subprocess.Popen(["sleep", "60"])
    trainer._process, trainer._connection = process, ours
    process.send_signal(number)
    theirs.close()
    with pytest.raises(TrainerDied, match=rf"the trainer process {process.pid} ended by signal {name} before"):
        trainer.receive(1.0)
    trainer.kill()


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


def test_a_process_that_cannot_die_does_not_hang_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a driver hangs: it ignores SIGKILL."""
    monkeypatch.setattr(trainers, "KILL_SECONDS", 0.1)
    hung = Trainer(Slot(device=cpu()), tmp_path / "log")
    with subprocess.Popen(["sleep", "600"]) as process:
        hung._process = process
        monkeypatch.setattr(process, "kill", lambda: None)
        hung.kill()
        assert f"the trainer process {process.pid} was killed and does not end" in caplog.text
        assert hung.pid is None, "the next job gets another one"
        process.terminate()


def test_a_process_that_closes_its_connection_and_lives_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "KILL_SECONDS", 0.5)
    trainer = Trainer(Slot(device=cpu()), tmp_path / "log")
    ours, theirs = Pipe()
    theirs.close()
    process = subprocess.Popen(["sleep", "60"])
    trainer._process, trainer._connection = process, ours
    with pytest.raises(TrainerDied, match=rf"the trainer process {process.pid} closed its connection and was killed"):
        trainer.receive(1.0)
    assert process.wait(30) == -signal.SIGKILL
    assert trainer.pid is None, "the next job starts a new process"


@pytest.mark.parametrize("left", [0, 2, 3], ids=["for the connection", "for the log", "for the process"])
def test_a_worker_that_may_open_no_more_files_starts_no_trainer(trainer: Trainer, job: Make, left: int) -> None:
    small, limits = job(), resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.dup(0)
    os.close(next_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free + left, limits[1]))
    try:
        with pytest.raises(TrainerDied, match=r"cannot be started \(Too many open files\)") as died:
            trainer.submit(small)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not died.value.ready, "the job is not to blame"


@pytest.mark.parametrize("sent", [b"no pickle", pickle.dumps(Stop(mode="keep")).replace(b"Stop", b"Spot")])
def test_a_message_that_cannot_be_read_is_the_end_of_its_process_alone(tmp_path: Path, sent: bytes) -> None:
    trainer = Trainer(Slot(device=cpu()), tmp_path / "log")
    ours, theirs = Pipe()
    process = subprocess.Popen(["sleep", "60"])
    trainer._process, trainer._connection = process, ours
    theirs.send_bytes(sent)
    with pytest.raises(TrainerDied, match=rf"process {process.pid} sent a message that cannot be read .*was killed"):
        trainer.receive(1.0)
    assert process.wait(30) == -signal.SIGKILL
    theirs.close()


def test_a_trainer_ends_when_its_worker_is_killed(job: Make, tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps(job(epochs=100_000)))
    (tmp_path / "tmp").mkdir()
    worker = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(tmp_path / "job"), str(tmp_path / "log")],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    assert [path.name.startswith("trialyard-") for path in (tmp_path / "tmp").iterdir()] == [True]
    worker.kill()
    worker.wait()
    worker.stdout.close()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the trainer outlived its worker"
        time.sleep(0.05)
    while any((tmp_path / "tmp").iterdir()):
        assert time.monotonic() < deadline, "its temporary files are still there"
        time.sleep(0.05)


def test_a_place_for_temporary_files_that_cannot_be_written_is_the_machine_s_fault(
    trainer: Trainer, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(
        DiskError, match=r"no folder for temporary files .*Not a directory.*: is the disk full\? TMPDIR"
    ):
        trainer.submit(job())


def test_a_killed_trainer_leaves_no_temporary_files(
    trainer: Trainer, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorFlow writes some for each model, and deletes them only when a process ends by itself."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer.submit(job())
    assert isinstance(_messages(trainer)[-1], Trained)
    (folder,) = tmp_path.glob("trialyard-*")
    if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        assert list(folder.glob("__autograph_generated_file*"))
    trainer.kill()
    assert not folder.exists()


def test_failures_of_data_and_models_are_distinguished(trainer: Trainer, job: Make) -> None:
    good = job()
    trainer.submit(job(definition=good.definition.model_copy(update={"dataset": "none.npz"})))
    missing = _messages(trainer)[-1]
    trainer.submit(job(definition=good.definition.model_copy(update={"model": "nowhere:build"}), folder=None))
    unknown = _messages(trainer)[-1]
    assert (missing.kind, unknown.kind) == ("load", "import")
    trainer.submit(job(hyperparameters={"batch_size": 1000}))
    too_large = _messages(trainer)[-1]  # unlike those above it is the trial's own fault
    assert (too_large.kind, too_large.message.split(":")[0]) == (
        "data",
        "batch_size = 1000 is larger than the 240 training images",
    )
    assert "none.npz does not exist" in missing.message
    assert "nowhere:build cannot be imported" in unknown.message


LINEAR = """
import keras
import random
import json.scanner

def build(hyperparameters, image_shape, classes):
    random.random()
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])
"""


@pytest.mark.usefixtures("new_trainers")
def test_modules_of_the_working_folder_are_used_but_never_instead_of_ours_or_python_s(
    job: Make, home: Path, tmp_path: Path
) -> None:
    for name in ("search", "studies", "storage", "trainer", "random", "json", "keras"):
        (home / f"{name}.py").write_text("raise RuntimeError('not this one')\n", encoding="utf-8")
    (home / "storage").mkdir()  # a package comes before a module of its name
    (home / "storage" / "__init__.py").write_text("raise RuntimeError('not this one')\n", encoding="utf-8")
    (home / "mine.py").write_text(LINEAR, encoding="utf-8")
    definition = job().definition.model_copy(update={"model": "mine:build"})
    with Trainer(SLOT, tmp_path / "log") as trainer:
        trainer.submit(job(definition=definition, hyperparameters={"batch_size": 60}))
        assert isinstance(_messages(trainer)[-1], Trained), trainer.log_file.read_text(encoding="utf-8")


def test_a_trainer_refuses_a_file_that_was_edited_after_the_study_began(
    trainer: Trainer, job: Make, home: Path
) -> None:
    (home / "mine.py").write_text(LINEAR, encoding="utf-8")
    definition = job().definition.model_copy(update={"model": "mine:build"})
    arguments: dict[str, Any] = {"definition": definition, "hyperparameters": {"batch_size": 60}}
    trainer.submit(job(**arguments, sources={"mine:build": "0" * 16}))
    (failed,) = _messages(trainer)
    assert isinstance(failed, Failed)
    assert failed.kind == "import", "the machine's fault: the trial goes back to the queue"
    assert failed.message.startswith("the file of mine:build was edited after the study began: bring the same file")
    digest = hashlib.sha256(LINEAR.encode()).hexdigest()[:16]
    trainer.submit(job(**arguments, sources={"mine:build": digest}))
    assert isinstance(_messages(trainer)[-1], Trained)


def test_a_trainer_refuses_data_that_changed_after_the_study_began(trainer: Trainer, job: Make) -> None:
    wanted = job(data_fingerprint="0" * 16)
    # Each seed of a confirmation splits the data in its own way.
    split = wanted.recipe.data.model_copy(update={"seed": 12345})
    of_confirmation = dataclasses.replace(wanted, recipe=dataclasses.replace(wanted.recipe, data=split))
    for each in (wanted, of_confirmation):
        trainer.submit(each)
        (failed,) = _messages(trainer)
        assert isinstance(failed, Failed)
        assert failed.kind == "import", "the machine's fault: the trial goes back to the queue"
        assert re.match(
            r"\S+ has changed since the study began \(its fingerprint was 0{16} and is \w{16}\)", failed.message
        )


SEEN = """
import os
import tensorflow as tf

def build(hyperparameters, image_shape, classes):
    threads = tf.config.threading
    seen = (threads.get_intra_op_parallelism_threads(), threads.get_inter_op_parallelism_threads(),
            os.environ["CUDA_VISIBLE_DEVICES"],
            os.environ.get("TRIALYARD_STORAGE") or os.environ.get("TRIALYARD_DASHBOARD_PASSWORD"))
    raise ValueError(f"seen: {seen}")
"""


@pytest.mark.usefixtures("new_trainers")
def test_a_trainer_is_pinned_before_its_framework_starts(
    job: Make, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = Slot(device=cpu(), threads=3)
    monkeypatch.setenv("TRIALYARD_STORAGE", "postgresql://me:secret@host/db")
    monkeypatch.setenv("TRIALYARD_DASHBOARD_PASSWORD", "secret")
    (home / "mine.py").write_text(SEEN, encoding="utf-8")
    good = job()
    with Trainer(slot, tmp_path / "log") as trainer:
        trainer.submit(job(definition=good.definition.model_copy(update={"model": "mine:build"}), slot=slot))
        failed = _messages(trainer)[-1]
    assert "seen: (3, 3, '-1', None)" in failed.message


@pytest.mark.usefixtures("new_trainers")
def test_a_gpu_that_the_framework_does_not_see_is_an_error(job: Make, tmp_path: Path) -> None:
    slot = Slot(device=Device(kind="gpu", name="A100", index=77, capability=(8, 0)))  # there is no such card
    with Trainer(slot, tmp_path / "log") as trainer:
        trainer.submit(job(slot=slot))
        assert psutil.Process(trainer.pid).environ()["CUDA_VISIBLE_DEVICES"] == "77"
        failed = _messages(trainer)[-1]
    assert failed.kind == "device"
    assert "gpu:77 (A100), but tensorflow sees no GPUs: install its CUDA libraries" in failed.message


def test_a_folder_that_cannot_be_written_is_the_machine_s_fault(trainer: Trainer, job: Make, home: Path) -> None:
    (home / "full").write_text("a file where the trial's folder should be", encoding="utf-8")
    trainer.submit(job(folder=home / "full"))
    failed = _messages(trainer)[-1]
    assert failed.kind == "disk"
    assert "history.json cannot be written (File exists): is the disk full" in failed.message


PRINTING = """
import sys
import keras

def closes(hyperparameters, image_shape, classes):
    sys.stdout.close()
    sys.stderr.close()
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])

def closes_and_fails(hyperparameters, image_shape, classes):
    closes(hyperparameters, image_shape, classes)
    raise ValueError("too wide")

def prints(hyperparameters, image_shape, classes):
    print("x" * 100_000)
"""


def test_a_log_that_cannot_be_written_stops_no_training(trainer: Trainer, job: Make, home: Path) -> None:
    trainer.log_file.parent.mkdir()
    trainer.log_file.symlink_to("/dev/full")
    trainer.submit(job())
    assert isinstance(_messages(trainer)[-1], Trained)
    trainer.submit(job(hyperparameters={"width": "wide"}))
    assert _messages(trainer)[-1].kind == "error", "the traceback cannot be written either"
    (home / "mine.py").write_text(PRINTING, encoding="utf-8")
    definition = job().definition.model_copy(update={"model": "mine:prints"})
    trainer.submit(job(definition=definition))
    failed = _messages(trainer)[-1]
    assert failed.kind == "disk", "an own model's print raises: that is the disk's fault, not the trial's"
    assert "No space left on device" in failed.message


def test_a_log_that_is_too_large_is_shortened_when_the_next_job_begins(
    trainer: Trainer, job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.submit(job(trial="first"))
    assert isinstance(_messages(trainer)[-1], Trained)
    pid = trainer.pid
    monkeypatch.setattr(trainer_logs, "MOST_BYTES", 100)
    monkeypatch.setattr(trainer_logs, "KEPT_BYTES", 50)
    trainer.submit(job(trial="second"))
    assert isinstance(_messages(trainer)[-1], Trained)
    assert trainer.pid == pid, "the process has the file open all the time"
    text = trainer.log_file.read_bytes()
    assert text.startswith(trainer_logs.SHORTENED)
    assert b"first begins" not in text
    assert b"\0" not in text
    assert text.count(b"second epoch") == 2


def test_a_model_may_close_its_output(trainer: Trainer, job: Make, home: Path) -> None:
    (home / "mine.py").write_text(PRINTING, encoding="utf-8")
    ends = []
    for function in ("closes", "closes_and_fails"):
        definition = job().definition.model_copy(update={"model": f"mine:{function}"})
        trainer.submit(job(definition=definition, hyperparameters={"batch_size": 60}))
        ends.append(_messages(trainer)[-1])
    trained, failed = ends
    assert isinstance(trained, Trained)
    assert failed.kind == "model"
    assert "(ValueError: too wide)" in failed.message


POOLED = """
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import keras

pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))

def pid(seconds):
    time.sleep(seconds)
    return os.getpid()

def build(hyperparameters, image_shape, classes):
    pids = set(pool.map(pid, [0.2, 0.2]))
    Path("pids").write_text(" ".join(map(str, pids)))
    {in_build}
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])
"""


def _require_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    for pid in pids:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a process of the pool lives on"
            time.sleep(0.05)


def _pids(home: Path) -> list[int]:
    pids = [int(pid) for pid in (home / "pids").read_text(encoding="ascii").split()]
    assert pids
    return pids


def test_a_death_is_noticed_while_a_process_lives_that_the_trainer_forked(
    trainer: Trainer, job: Make, home: Path
) -> None:
    """It has the trainer's end of the socket, so the worker reads no end of file."""
    (home / "mine.py").write_text(POOLED.format(in_build="os.kill(os.getpid(), signal.SIGSEGV)"), encoding="utf-8")
    trainer.submit(job(definition=job().definition.model_copy(update={"model": "mine:build"})))
    with pytest.raises(TrainerDied, match="ended by signal SIGSEGV"):
        _messages(trainer)
    _require_ended(_pids(home))


def test_a_killed_trainer_leaves_no_processes_behind(trainer: Trainer, job: Make, home: Path) -> None:
    (home / "mine.py").write_text(POOLED.format(in_build=""), encoding="utf-8")
    definition = job(100_000).definition.model_copy(update={"model": "mine:build"})
    trainer.submit(job(definition=definition, hyperparameters={"batch_size": 60}))
    assert isinstance(_next(trainer), Epoch)
    pids = _pids(home)
    assert all(psutil.pid_exists(pid) for pid in pids)
    trainer.kill()
    _require_ended(pids)


def test_a_trainer_that_ends_with_its_worker_ends_what_it_started(job: Make, home: Path, tmp_path: Path) -> None:
    (home / "mine.py").write_text(POOLED.format(in_build=""), encoding="utf-8")
    made = job(epochs=100_000, hyperparameters={"batch_size": 60})
    made = dataclasses.replace(made, definition=made.definition.model_copy(update={"model": "mine:build"}))
    (tmp_path / "job").write_bytes(pickle.dumps(made))
    with subprocess.Popen(
        [sys.executable, "-c", ALONE, str(tmp_path / "job"), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        worker.kill()
    _require_ended([pid, *_pids(home)])


EXITING = """
import sys
import keras

def load():
    sys.exit("the data server is not mounted")

def loss(wanted, given):
    sys.exit("no licence")

def build(hyperparameters, image_shape, classes):
    layers = [keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")]
    model = keras.Sequential(layers)
    model.compile("adam", loss, metrics=["accuracy"])
    return model
"""


def test_sys_exit_in_a_user_s_code_is_an_error_like_others_and_no_crash(
    trainer: Trainer, job: Make, home: Path
) -> None:
    (home / "mine.py").write_text(EXITING, encoding="utf-8")
    failed = []
    for changed in ({"dataset": "mine:load"}, {"model": "mine:build"}):
        definition = job().definition.model_copy(update=changed)
        for folder in (home / "trial", None):  # a trial, and a check before any trial
            trainer.submit(job(definition=definition, hyperparameters={"batch_size": 60}, folder=folder))
            failed.append(_messages(trainer)[-1])
    assert [each.kind for each in failed] == ["load", "load", "error", "model"]
    assert failed[0].message == failed[1].message
    assert failed[0].message == (
        "mine:load cannot be loaded on this machine (SystemExit: the data server is not mounted)"
    )
    assert all("SystemExit: no licence" in each.message for each in failed[2:])


OWN = """
import os
{at_import}

def build(hyperparameters, image_shape, classes):
    {in_build}
"""


@pytest.mark.parametrize(
    ("at_import", "in_build", "kind", "words"),
    [
        ("import nowhere", "", "import", "mine:build cannot be imported (ModuleNotFoundError: No module named"),
        ("raise SystemExit(0)", "", "import", "mine:build cannot be imported (SystemExit: 0)"),
        ("", "import nowhere", "import", "mine:build needs a module that cannot be imported on this machine"),
        ("", "raise ValueError('too wide')", "model", "(ValueError: too wide): correct the function"),
        ("", "raise SystemExit('too wide')", "model", "(SystemExit: too wide): correct the function"),
        ("", "raise ValueError('cannot open \\udcff.png')", "model", r"(ValueError: cannot open \udcff.png): correct"),
        (
            "",
            "raise RuntimeError('CUDA error: unknown error')",
            "accelerator",
            "(RuntimeError: CUDA error: unknown error)",
        ),
    ],
)
def test_a_module_that_is_missing_is_the_machine_s_fault_and_an_error_in_a_model_is_not(
    trainer: Trainer, job: Make, home: Path, at_import: str, in_build: str, kind: str, words: str
) -> None:
    (home / "mine.py").write_text(OWN.format(at_import=at_import, in_build=in_build or "pass"), encoding="utf-8")
    trainer.submit(job(definition=job().definition.model_copy(update={"model": "mine:build"})))
    failed = _messages(trainer)[-1]
    assert failed.kind == kind
    assert words in failed.message


FLAWED = """
import keras

class Factor:
    value = 1.0

class Scale(keras.layers.Layer):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return x * self.factor.value

def unsaveable(hyperparameters, image_shape, classes):
    return keras.Sequential([keras.Input(image_shape), Scale(Factor()),
                             keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])

def unmeasured(hyperparameters, image_shape, classes):
    model = unsaveable(hyperparameters, image_shape, classes)
    model.compile("adam", "categorical_crossentropy")
    return model
"""


def test_a_model_that_no_hyperparameters_can_help_is_told_from_others(trainer: Trainer, job: Make, home: Path) -> None:
    (home / "mine.py").write_text(FLAWED, encoding="utf-8")
    ends = []
    for function in ("unsaveable", "unmeasured"):
        definition = job(1).definition.model_copy(update={"model": f"mine:{function}"})
        trainer.submit(job(definition=definition, hyperparameters={"batch_size": 60}, folder=home / function))
        ends.append(_messages(trainer)[-1])
    unsaveable, unmeasured = ends
    assert unsaveable.unsaved.startswith("NotImplementedError: "), "what it measured counts"
    assert 0.0 <= unsaveable.value <= 1.0
    assert unmeasured.kind == "metric"
    assert "trials are judged by the metric accuracy" in unmeasured.message


@pytest.mark.parametrize(
    ("shim", "words"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "(ImportError: libcudart.so.12: "),
        ("raise AttributeError('no __version__')", "with the backend tensorflow (AttributeError: no __version__)"),
    ],
)
def test_a_backend_that_cannot_be_imported_is_the_machine_s_fault(
    trainer: Trainer, job: Make, broken: Callable[[str], Path], shim: str, words: str
) -> None:
    broken(shim)
    trainer.submit(job())
    failed = _messages(trainer)[-1]
    assert failed.kind == "import"
    assert words in failed.message


def test_a_backend_that_was_repaired_is_imported_by_the_next_process(
    trainer: Trainer, job: Make, broken: Callable[[str], Path]
) -> None:
    file = broken("raise ImportError('libcudart.so.12: cannot open shared object file')")
    for _ in range(2):
        trainer.submit(job(1))
        assert _messages(trainer)[-1].kind == "import"
    file.unlink()
    trainer.submit(job(1))
    assert isinstance(_messages(trainer)[-1], Trained)


def test_a_death_before_keras_is_imported_is_distinguished_from_one_in_a_job(
    trainer: Trainer, job: Make, home: Path, broken: Callable[[str], Path]
) -> None:
    file = broken("import os; os.abort()")
    trainer.submit(job())
    with pytest.raises(TrainerDied, match=r"ended by signal SIGABRT before it had imported Keras; .*log") as died:
        _messages(trainer)
    assert not died.value.ready
    file.unlink()
    (home / "mine.py").write_text(OWN.format(at_import="", in_build="os.abort()"), encoding="utf-8")
    trainer.submit(job(definition=job().definition.model_copy(update={"model": "mine:build"})))
    with pytest.raises(TrainerDied, match="ended by signal SIGABRT; ") as died:
        _messages(trainer)
    assert died.value.ready


def test_a_process_that_hangs_before_keras_is_imported_is_killed(
    trainer: Trainer, broken: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("import time; time.sleep(600)")
    monkeypatch.setattr(trainers, "START_SECONDS", 1.0)
    with pytest.raises(TrainerDied, match="did not import Keras within 1 s and was killed"):
        trainer.start()
    assert trainer.pid is None


def test_a_stop_does_not_wait_for_a_process_that_does_not_read_its_job(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hangs before it has imported Keras."""
    monkeypatch.setattr(trainers, "SEND_SECONDS", 0.1)
    trainer, large = Trainer(SLOT, tmp_path / "log"), job(sources={"mine:build": "0" * (16 << 20)})
    trainer._connection, theirs = Pipe()
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(trainer._send, large)
        while not trainer._sending.locked():
            time.sleep(0.01)
        try:
            pool.submit(trainer.stop, "drop").result(30)
            assert not sent.done(), "a connection takes so large a job at once: the test shows nothing"
        finally:
            theirs.close()
        sent.result(30)
    trainer.kill()


GROWING = """
import keras

kept = []

def build(hyperparameters, image_shape, classes):
    kept.append(bytearray(b"x") * (100 << 20))  # 100 MB a model that nobody gives back
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes, "softmax")])
"""


@pytest.mark.long
def test_a_trainer_that_grows_is_replaced(job: Make, home: Path, tmp_path: Path) -> None:
    (home / "mine.py").write_text(GROWING, encoding="utf-8")
    definition = job(epochs=1).definition.model_copy(update={"model": "mine:build"})
    pids = []
    with Trainer(SLOT, tmp_path / "log", memory_growth=0.25) as trainer:
        for _ in range(5):
            trainer.submit(job(definition=definition, hyperparameters={"batch_size": 60}))
            assert isinstance(_messages(trainer)[-1], Trained)
            pids.append(trainer.pid)
    assert pids[0] == pids[1]
    assert 2 <= len(set(pids)) <= 3, "a process that grew went on, or one that did not was replaced"


def test_a_death_for_lack_of_memory_is_recognised(
    trainer: Trainer, job: Make, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "mine.py").write_text(
        "def build(hyperparameters, image_shape, classes):\n    return bytearray(1 << 62)\n", encoding="utf-8"
    )
    trainer.submit(job(definition=job().definition.model_copy(update={"model": "mine:build"})))
    failed = _messages(trainer)[-1]
    assert failed.kind == "memory"
    assert "MemoryError" in failed.message
    # The kernel's counter of processes killed for memory, in a file of the test.
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 3\n", encoding="ascii")
    monkeypatch.setattr(trainers, "_memory_kills", partial(trainers._memory_kills, (tmp_path / "none", events)))
    for killed_by_kernel in (False, True):
        trainer.submit(job(epochs=100_000))
        assert isinstance(_next(trainer), Epoch)
        if killed_by_kernel:
            events.write_text("low 0\noom 4\noom_kill 4\n", encoding="ascii")
        assert trainer.pid is not None
        os.kill(trainer.pid, signal.SIGKILL)
        with pytest.raises(TrainerDied) as died:
            _messages(trainer)
        assert died.value.out_of_memory == killed_by_kernel


def test_a_stop_that_keeps_leaves_a_checkpoint_to_continue_from(trainer: Trainer, job: Make, home: Path) -> None:
    trainer.submit(job(epochs=100_000))
    for _ in range(2):
        assert isinstance(_next(trainer), Epoch)
    trainer.stop("keep")
    assert isinstance(_messages(trainer)[-1], Trained)
    trainer.submit(job(epochs=100_000, folder=home / "next", checkpoints=(home / "trial" / CHECKPOINT,)))
    resumed = _next(trainer)
    assert isinstance(resumed, Resumed)
    assert [epoch.epoch for epoch in resumed.history] == list(range(1, len(resumed.history) + 1))
    following = _next(trainer)
    assert isinstance(following, Epoch)
    assert following.epoch == len(resumed.history) + 1


@pytest.mark.long
def test_a_checkpoint_of_an_own_model_is_taken_in_another_process(job: Make, home: Path, tmp_path: Path) -> None:
    """Its identity has a digest of the module, which a process's first job has not imported yet."""
    text = (
        "import keras\ndef build(hyperparameters, image_shape, classes):\n"
        "    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes)])\n"
    )
    (home / "mine.py").write_text(text, encoding="utf-8")

    def own(**changed: Any) -> Job:
        made = job(epochs=100_000, **changed)
        return dataclasses.replace(made, definition=made.definition.model_copy(update={"model": "mine:build"}))

    checkpoints = (home / "trial" / CHECKPOINT,)
    with Trainer(Slot(device=cpu()), tmp_path / "log") as first:
        first.submit(own())
        assert isinstance(_next(first), Epoch)
        first.stop("keep")
        assert isinstance(_messages(first)[-1], Trained)
    for changed in (False, True):
        if changed:
            (home / "mine.py").write_text(text + "# changed\n", encoding="utf-8")
        with Trainer(Slot(device=cpu()), tmp_path / "log") as second:
            second.submit(own(folder=home / "next", checkpoints=checkpoints))
            assert isinstance(_next(second), Epoch if changed else Resumed)


@pytest.mark.timeout(60)
def test_a_worker_that_does_not_read_stops_no_training() -> None:
    """As while its database is away: what is only to be seen is left out, and room for what is recorded remains."""
    worker, trainer_end = Pipe()
    batches = [Batches(epoch=1, done=number + 1, total=10_000) for number in range(10_000)]
    for each in batches:
        send_if_read(trainer_end, each)
    trainer_end.send(Resumed(history=()))
    received = []
    while worker.poll(0):
        received.append(worker.recv())
    assert received[-1] == Resumed(history=())
    assert received[:-1] == batches[: len(received) - 1]
    assert 10 < len(received) < len(batches)
