"""Seconds that a query takes on the command line, including Python's start and imports.

    python bench/queries.py [--trials 100 10000] [--times 5]

The SQLite database has a study of each size; its finished trials have 20 intermediate values each. Each command is a
new process, as when a user starts it. Prints a table with the median, and in brackets the median of the processor time,
which depends less on other programs on the machine.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table
from scale import study_of

from storage import database

COMMANDS = (("best",), ("status",), ("leaderboard", "--top", "10"), ("leaderboard",))


def seconds(arguments: list[str], url: str) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds of one run of the command."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "search.program", *arguments],
        env=os.environ | {"TRIALYARD_STORAGE": url},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, processor


def main() -> None:
    """Fills a database, runs the commands, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 10_000], help="finished trials of each study")
    parser.add_argument("--times", type=int, default=5, help="runs of each command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/studies.db"
        storage = database.create(url)
        studies = {trials: study_of(storage, trials) for trials in arguments.trials}
        storage.engine.dispose()
        table = Table(title="seconds, Python's start included: by the clock (on the processor)")
        for title in ("command", *(f"{trials:,} trials" for trials in studies)):
            table.add_column(title, justify="right")
        for command in COMMANDS:
            cells = []
            for study in studies.values():
                words = [command[0], study, *command[1:]]
                seconds(words, url)  # loads the files into the system's cache
                times = [seconds(words, url) for _ in range(arguments.times)]
                clock, processor = (statistics.median(column) for column in zip(*times, strict=True))
                cells.append(f"{clock:.2f} ({processor:.2f})")
            table.add_row(f"trialyard {' '.join(command)}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
