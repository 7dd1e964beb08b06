"""The overhead of Trialyard: 200 trivial trials through claim, objective and finish, against plain Optuna.

    python bench/overhead.py [--trials 200]

Both search the same space with the same sampler, each on its own SQLite file, report one value per trial and train
nothing: an object that answers at once replaces the trainer process. Ours also takes the study's lock, sends
heartbeats, checks the owner, and writes the attributes that a real trial has. The two take turns, 20 trials each, so
that a busy machine slows both. Prints a table with the ratio of the mean times per trial.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import optuna
from rich.console import Console
from rich.table import Table

from search.attempt import Attempt, StudyHandle
from search.devices import Slot, cpu
from search.heartbeat import Pulse
from search.messages import Epoch, Job, Trained
from search.trainer import Trainer
from storage import claims, database, owners
from storage.settings import Settings
from storage.trial_cache import TrialCache
from studies import registry, sampling
from studies.definition import Definition, parse

TURN = 20  # trials

DEFINITION = """
name = "overhead"
dataset = "digits"
model = "convnet"

[budget]
trials = {trials}
epochs = 1

[space]
dropout = {{ low = 0.0, high = 0.7 }}
learning_rate = {{ low = 1e-4, high = 1e-2, log = true }}

[fixed]
depth = 3

[sampler]
kind = "random"
"""


class Instant(Trainer):
    """Answers a job at once, with an accuracy that depends on its dropout."""

    def __init__(self) -> None:
        super().__init__(Slot(device=cpu()), Path("unused"))
        self._messages: list[Epoch | Trained] = []

    def submit(self, job: Job) -> None:
        """Prepares the two messages that a training of one epoch would send."""
        value = 1.0 - job.recipe.hyperparameters["dropout"]
        epoch = Epoch(
            epoch=1, loss=1.0, accuracy=value, val_loss=1.0, val_accuracy=value, seconds=1.0, images_per_second=1.0
        )
        trained = Trained(
            value=value,
            repeats=(value,),
            best_epoch=1,
            val_loss=1.0,
            train_accuracy=value,
            epochs=1,
            stopped=False,
            parameters=1,
            seconds=1.0,
            images_per_second=1.0,
            precision="float32",
            precision_reason="no training",
            data_fingerprint="0" * 16,
            versions={"keras": "", "backend": "", "optuna": optuna.__version__},
            hits=None,
        )
        self._messages = [trained, epoch]

    def receive(self, seconds: float) -> Epoch | Trained:
        """The next message."""
        return self._messages.pop()


class Ours:
    """The worker's own loop, without its process."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        storage = database.create(f"sqlite:///{folder}/ours.db")
        registry.create(definition, storage, {"fingerprint": "0" * 16})
        self._handle = StudyHandle(
            study=registry.find(definition.name, storage),
            definition=definition,
            storage=storage,
            cached=TrialCache(storage),
        )
        self._settings = Settings(home=folder)
        self._owner = owners.this_slot("cpu:0")
        self._trainer, self._interrupted = Instant(), threading.Event()

    def run(self, trials: int) -> None:
        """Claims and finishes so many trials."""
        for _ in range(trials):
            handle, settings = self._handle, self._settings
            claim = claims.claim(handle.storage, handle.study, self._owner, settings.grace_seconds)
            assert claim is not None
            Attempt(
                handle,
                claim,
                self._trainer,
                settings,
                pulse=Pulse(),
                listeners=[],
                interrupted=self._interrupted,
            ).run()


class Plain:
    """Optuna as in its tutorial."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder}/plain.db",
            direction="maximize",
            sampler=sampling.sampler(definition, 0),
            pruner=sampling.pruner(definition),
        )

    @staticmethod
    def _objective(trial: optuna.Trial) -> float:
        value = 1.0 - trial.suggest_float("dropout", 0.0, 0.7)
        trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        trial.report(value, 1)
        return value

    def run(self, trials: int) -> None:
        """Runs so many trials."""
        self._study.optimize(self._objective, n_trials=trials)


def main() -> None:
    """Times both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    definition = parse(DEFINITION.format(trials=trials + TURN))
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, Plain | Ours] = {
            "plain study.optimize": Plain(Path(folder), definition),
            "Trialyard": Ours(Path(folder), definition),
        }
        spent = dict.fromkeys(runners, 0.0)
        for runner in runners.values():
            runner.run(TURN)  # imports and first connections are not a trial's
        for turn in range(0, trials, TURN):
            for name, runner in runners.items():
                began = time.perf_counter()
                runner.run(min(TURN, trials - turn))
                spent[name] += time.perf_counter() - began
    plain = spent["plain study.optimize"]
    table = Table(title=f"{trials} trivial trials, SQLite, {cpu().name}")
    for title in ("", "ms a trial", "ratio"):
        table.add_column(title, justify="left" if not title else "right")
    for name, seconds in spent.items():
        table.add_row(name, f"{1000 * seconds / trials:.1f}", f"{seconds / plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
