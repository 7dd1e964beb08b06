"""The trainer process of one slot: started with its device pinned, fed with jobs, stopped, killed.

It is a program of its own (``python -m search.trainer FD``) and not a fork, because Keras must first be imported
with the environment that pins it, and because it may crash, hang or run out of memory without harm to the worker.
It talks over one socket: jobs and stops come in, one record an epoch and an end go out. It never waits for the
worker between epochs, touches no database, and ends at once when the worker is gone.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from search.devices import Device, precision_for
from search.records import Epoch, Trained
from storage.errors import TrialyardError
from studies.definition import Definition

if TYPE_CHECKING:
    from search.data import Dataset

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0  # how long a trainer may take to end its batch before it is killed


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, or only its first look (`check`): load the data, build the model, train nothing."""

    definition: Definition
    hyperparameters: dict[str, Any]
    seed: int
    device: Device
    data_folders: tuple[Path, ...]
    folder: Path | None  # for model and history; None to check only


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A job that was only checked: what its data are."""

    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A job that ended in an error of its own: it would do so again."""

    kind: str  # "nan", "memory", "data", "model" or "error"
    message: str


class TrainerDied(Exception):  # noqa: N818 - it is an event
    """The process ended in the middle of a job."""


class _Stop:
    """The message that ends the running job after its batch."""


class Trainer:
    """The worker's end: a process that is started at its first job and kept over many.

    After a death or a kill the next job starts a new one.
    """

    def __init__(self, device: Device, log_file: Path) -> None:
        self.device, self.log_file = device, log_file
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return self._process.pid if self._process else None

    def submit(self, job: Job) -> None:
        """Begins `job`. The messages that follow are to be fetched with `receive` up to the one that ends it."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._send(job)

    def stop(self) -> None:
        """Asks the running job to end after its batch; its end is still to be received."""
        self._send(_Stop())

    def receive(self, seconds: float) -> Epoch | Trained | Checked | Failed | None:
        """The next message, or None if none came within `seconds`. Raises TrainerDied."""
        assert self._connection is not None
        try:
            return self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            raise TrainerDied(self._epitaph()) from None

    def kill(self) -> None:
        """Ends the process now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _send(self, message: Job | _Stop) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError):  # it died: `receive` will say so
            self._connection.send(message)

    def _start(self) -> None:
        self.kill()
        ours, theirs = Pipe()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "search.trainer", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | self.device.environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is for the worker, which then says what to do
            )
        theirs.close()
        self._connection = ours

    def _epitaph(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        how = f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        hint = " (the kernel does that when memory runs out)" if code == -signal.SIGKILL else ""
        return f"the trainer process {self._process.pid} ended {how}{hint}; what it printed is in {self.log_file}"


# --- the process's own side -------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Trains one job after another until the worker's end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)
    jobs: queue.Queue[Job] = queue.Queue()
    stopping = threading.Event()

    def listen() -> None:
        # A thread, so that a stop is heard within a batch, and the worker's death at once: a trainer that went on
        # alone would train a trial that somebody else has claimed by then.
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, Job):
                stopping.clear()
                jobs.put(message)
            else:
                stopping.set()

    threading.Thread(target=listen, name="listen", daemon=True).start()
    datasets: dict[Any, Dataset] = {}
    while True:
        connection.send(_run(jobs.get(), connection, stopping, datasets))


def _run(
    job: Job, connection: "Connection[Any, Any]", stopping: threading.Event, datasets: "dict[Any, Dataset]"
) -> Trained | Checked | Failed:
    from search.errors import DataError, ModelError

    try:
        return _trained(job, connection, stopping, datasets)
    except DataError as error:
        return Failed(kind="data", message=str(error))
    except ModelError as error:
        return Failed(kind="model", message=str(error))
    except Exception as error:  # noqa: BLE001 - whatever a user's model raises ends its trial, not the study
        traceback.print_exc()  # whole, into the log file
        kinds = {"NotANumber": "nan", "ResourceExhaustedError": "memory", "MemoryError": "memory"}
        name = type(error).__name__
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in message:  # JAX's word
            kinds[name] = "memory"
        plain = name in ("NotANumber",)
        return Failed(kind=kinds.get(name, "error"), message=message if plain else f"{name}: {message}"[:2000])


def _trained(
    job: Job, connection: "Connection[Any, Any]", stopping: threading.Event, datasets: "dict[Any, Dataset]"
) -> Trained | Checked:
    from search import checks, data, training

    wanted = job.definition
    key = (wanted.dataset, wanted.data, job.data_folders)
    if key not in datasets:
        datasets.clear()  # one at a time: a machine may serve many studies
        datasets[key] = data.load(wanted.dataset, wanted.data, job.data_folders)
    dataset = datasets[key]
    if job.folder is None:
        checks.check_with_keras(wanted, dataset)
        return Checked(data=dataset.summary())
    precision = precision_for(job.device, wanted.precision)
    print(f"{time.strftime('%F %T')} {job.folder}: {precision[0]}, because {precision[1]}", flush=True)
    return training.train(
        model=wanted.model,
        hyperparameters=job.hyperparameters,
        dataset=dataset,
        epochs=wanted.budget.epochs,
        seed=job.seed,
        precision=precision,
        folder=job.folder,
        on_epoch=connection.send,
        stopping=stopping.is_set,
    )


if __name__ == "__main__":
    # Under its own name, not as __main__: the worker pickles these classes by it.
    from search import trainer

    with contextlib.suppress(TrialyardError, BrokenPipeError):
        trainer.main(int(sys.argv[1]))
