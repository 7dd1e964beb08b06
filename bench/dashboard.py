"""The dashboard's first load and poll, in seconds: the stock command line and ours, on the same studies, in one run.

    python bench/dashboard.py [--trials 1000 10000] [--polls 3] [--without-notes]

It makes studies with so many finished trials of 20 epochs, then the same with a note for each trial, as workers write
them. For each it starts `optuna-dashboard URL` and `trialyard dashboard` on the SQLite database, and sends the requests
of the study's page: everything once, then every 10 s the trials that are new. A poll is the median. The first load is
measured from the request, not from the start of the process. No browser is used. With 10,000 notes the stock dashboard
needs minutes.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from rich.console import Console
from rich.table import Table
from scale import study_of

from storage import database, transactions
from storage.tables import StudySystemAttributeModel, TrialModel
from storage.transactions import PatientStorage
from studies import registry

# The page polls every 10 s, and the package caches trials for 10 s: each of our polls gets a fresh answer.
POLL_SECONDS = 10.2
NOTE = "accuracy 0.9000 in epoch 20 of 20, loss 0.31\n\n" + "conv2d (3, 3, 1, 32)  320 weights\n" * 12


def add_notes(storage: PatientStorage, study_id: int) -> None:
    """A note for each trial, where optuna-dashboard keeps it."""

    def fill(connection: sqlalchemy.Connection) -> None:
        ids = connection.execute(
            sqlalchemy.select(TrialModel.trial_id).where(TrialModel.study_id == study_id)
        ).scalars()
        rows = [
            {"study_id": study_id, "key": f"dashboard:{trial_id}:{key}", "value_json": json.dumps(value)}
            for trial_id in ids
            for key, value in (("note_ver", 1), ("note_str:0", NOTE))
        ]
        connection.execute(sqlalchemy.insert(StudySystemAttributeModel), rows)

    transactions.write(storage, None, fill)


@contextlib.contextmanager
def served(command: list[str]) -> Iterator[int]:
    """Runs the command's server on a free port while the block runs; yields the port when the server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def ask(port: int, study_id: int, after: int) -> tuple[float, int]:
    """(seconds, bytes) of one answer to a request like the browser's."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
    began = time.perf_counter()
    connection.request("GET", f"/api/studies/{study_id}?after={after}", headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    size = len(answer.read())
    assert answer.status == 200, answer.status
    connection.close()
    return time.perf_counter() - began, size


def measure(url: str, study_id: int, trials: int, polls: int) -> list[tuple[str, float, float, int]]:
    """(name, first load, poll, bytes of a load) of both servers, which run at the same time."""
    binaries = Path(sys.executable).parent
    commands = {
        "optuna-dashboard": [str(binaries / "optuna-dashboard"), url, "--quiet"],
        "trialyard": [sys.executable, "-m", "search.cli", "dashboard", "--storage", url],
    }
    rows = []
    with contextlib.ExitStack() as both:
        ports = {name: both.enter_context(served(command)) for name, command in commands.items()}
        for name, port in ports.items():
            first, size = ask(port, study_id, 0)
            times = []
            for _ in range(polls):
                time.sleep(POLL_SECONDS)
                times.append(ask(port, study_id, trials)[0])
            rows.append((name, first, statistics.median(times), size))
    return rows


def main() -> None:
    """Measures all studies and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--polls", type=int, default=3)
    parser.add_argument("--without-notes", action="store_true", help="only the studies without notes")
    arguments = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("TRIALYARD_")]:
        del os.environ[name]
    table = Table(title="A study's page: seconds")
    for title in ("trials", "notes", "server", "first load", "poll", "poll ratio", "MB a load"):
        table.add_column(title, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for trials in arguments.trials:
            for notes in (False,) if arguments.without_notes else (False, True):
                url = f"sqlite:///{folder}/{trials}-{notes}.db"
                storage = database.create(url)
                study_id = registry.find(study_of(storage, trials), storage).id
                if notes:
                    add_notes(storage, study_id)
                storage.engine.dispose()
                rows = measure(url, study_id, trials, arguments.polls)
                stock = rows[0][2]
                for name, first, poll, size in rows:
                    table.add_row(
                        f"{trials:,}",
                        "yes" if notes else "no",
                        name,
                        f"{first:.2f}",
                        f"{poll:.3f}",
                        f"{stock / poll:.0f}",
                        f"{size / 1e6:.1f}",
                    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
