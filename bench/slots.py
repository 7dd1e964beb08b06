"""Trials per hour on the processor: one slot with all threads, one slot per core, and the notebook's loop.

    python bench/slots.py [--trials 4] [--rounds 2] [--epochs 4] [--depth 5]

All train the same models on scikit-learn's digits (28x28), each with another dropout rate. Trialyard uses its worker,
its trainer processes and a SQLite file. The notebook's loop trains one plain float32 model after the other in one
process. Imports and the first trial of each slot, which warms it up, are not counted. The three take turns, round by
round, so that a busy machine slows all. Prints a table with the ratio of trials per hour.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import optuna
from rich.console import Console
from rich.table import Table

from search import data, devices, worker
from search.devices import Slot, cpu
from storage import database
from storage.settings import Settings
from studies import registry
from studies.definition import Data, parse

BATCH = 64

DEFINITION = """
name = "{name}"
dataset = "digits"
model = "convnet"

[data]
validation = 0.2

[budget]
trials = {trials}
epochs = {epochs}

[space]
dropout = {{ low = 0.0, high = 0.7 }}

[fixed]
depth = {depth}
batch_size = 64

[sampler]
kind = "random"
"""

NOTEBOOK = """
import sys, time
import keras
from bench.training import plain_model
from search import data
from studies.definition import Data

trials, epochs, depth = map(int, sys.argv[1:])
dataset = data.load("digits", Data(validation=0.2), [])
x, y = dataset.x_train.astype("float32") / 255, keras.utils.to_categorical(dataset.y_train)
x_test, y_test = dataset.x_validation.astype("float32") / 255, keras.utils.to_categorical(dataset.y_validation)
models = []  # the notebook kept them all
for trial in range(trials + 1):
    if trial == 1:
        began = time.perf_counter()
    models.append(plain_model(depth))
    models[-1].fit(x, y, batch_size=64, epochs=epochs, verbose=0, validation_data=(x_test, y_test))
print(time.perf_counter() - began)
"""


def ours(slots: list[Slot], trials: int, epochs: int, depth: int) -> float:
    """Seconds from the start of the first counted trial to the end of the last."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder))
        storage = database.create(settings.url)
        fingerprint = data.load("digits", Data(validation=0.2), []).summary()
        for name, budget in (("warm", len(slots)), ("timed", trials)):
            definition = parse(DEFINITION.format(name=name, trials=budget, epochs=epochs, depth=depth))
            registry.create(definition, storage, fingerprint)
        assert worker.work(["warm", "timed"], storage, settings, slots)
        timed_trials = optuna.load_study(study_name="timed", storage=storage).trials
        storage.engine.dispose()
    start = min(trial.datetime_start for trial in timed_trials if trial.datetime_start)
    end = max(trial.datetime_complete for trial in timed_trials if trial.datetime_complete)
    return (end - start).total_seconds()


def notebook(trials: int, epochs: int, depth: int) -> float:
    """Seconds of the notebook's loop, run in another process."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", NOTEBOOK, str(trials), str(epochs), str(depth)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("trials", 4), ("rounds", 2), ("epochs", 4), ("depth", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = arguments.trials, arguments.epochs, arguments.depth
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    cores = devices.cores()
    arrangements: dict[str, Callable[[], float]] = {
        "the notebook's loop": lambda: notebook(*sizes),
        f"1 slot x {cores} threads": lambda: ours(devices.slots("cpu", workers=1), *sizes),
        f"{cores} slots x 1 thread": lambda: ours(devices.slots("cpu", workers=cores), *sizes),
    }
    seconds_by_name = dict.fromkeys(arrangements, 0.0)
    for _ in range(arguments.rounds):
        for name, run in arrangements.items():
            seconds_by_name[name] += run()
    trials = arguments.trials * arguments.rounds
    precision, reason = devices.precision_for(cpu(), "auto")
    table = Table(
        title=f"{trials} trials of depth {arguments.depth}, {arguments.epochs} epochs of the digits\n"
        f"{cores} cores, Trialyard in {precision}: {reason}"
    )
    for title in ("", "s a trial", "trials an hour", "ratio"):
        table.add_column(title, justify="right" if title else "left")
    loop_seconds = seconds_by_name["the notebook's loop"]
    for name, seconds in seconds_by_name.items():
        ratio = f"{loop_seconds / seconds:.2f}"
        table.add_row(name, f"{seconds / trials:.1f}", f"{3600 * trials / seconds:,.0f}", ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
