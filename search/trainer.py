"""The trainer process of one slot: started with its device pinned, fed with jobs, stopped, killed, replaced.

It is a program of its own (``python -P -m search.trainer FD``) and not a fork, because Keras must first be imported
with the environment that pins it, and because it may crash, hang or run out of memory without harm to the worker.
It talks over one socket: jobs and stops come in, one record an epoch and an end go out. It never waits for the
worker between epochs, touches no database, and ends at once when the worker is gone.
"""

import contextlib
import ctypes
import gc
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
from datetime import UTC, datetime
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from search import devices
from search.devices import Slot, precision_for
from search.records import Epoch, Resumed, Trained
from storage.errors import StorageError, TrialyardError
from studies.definition import Definition

if TYPE_CHECKING:
    from search.data import Dataset
    from search.training import Stop

log = logging.getLogger(__name__)

MEMORY_GROWTH = 0.15
START_SECONDS = 600.0  # that a process may take to import Keras
START_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, or only its first look (`check`): load the data, build the model, train nothing."""

    definition: Definition
    hyperparameters: dict[str, Any]
    seed: int
    slot: Slot
    data_folders: tuple[Path, ...]
    folder: Path | None  # for model, history and checkpoint; None to check only
    checkpoint_seconds: float = 30.0
    attempt: int = 1  # for the log


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A job that was only checked: what its data are."""

    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A job that ended in an error of its own: it would do so again."""

    # "nan", "memory", "data", "model" or "error". The machine's fault, which no trial must pay for: "import" (Keras or
    # a user's module), "load" (the data), "disk" and "device".
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The process has imported Keras: what happens from now on is about its job."""


class TrainerDied(Exception):  # noqa: N818 - it is an event
    """The process ended in the middle of a job."""

    def __init__(self, how: str, log_file: Path | None = None, *, out_of_memory: bool, ready: bool = True) -> None:
        super().__init__(how if log_file is None else f"{how}; what it printed is in {log_file}")
        self.how = how
        self.out_of_memory = out_of_memory  # the kernel killed a process for want of memory meanwhile
        self.ready = ready  # Keras had been imported; if not, the job is not to blame


@dataclass(frozen=True)
class _Stop:
    """The message that ends the running job after its batch."""

    how: "Stop"


class Trainer:
    """The worker's end: a process that is started at its first job and kept over many.

    After a death or a kill the next job starts a new one, and also where the process has grown: frameworks hold memory
    across models. `memory_growth` is the share of what it held after its first job by which it may.
    """

    def __init__(self, slot: Slot, log_file: Path, memory_growth: float = MEMORY_GROWTH) -> None:
        self.slot, self.log_file = slot, log_file
        self._growth = memory_growth
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._sending = threading.Lock()  # a stop may come from the worker's main thread
        self._first: int | None = None  # bytes that the process held after its first job
        self._jobs = 0  # of this process
        self._ready = False  # whether this process has imported Keras
        self._kills = 0  # the kernel's kills for want of memory, when the job began

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def ready(self) -> bool:
        """Whether the process has imported Keras."""
        return self._ready

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return self._process.pid if self._process else None

    def start(self) -> Failed | None:
        """Starts a new process, and returns once it has imported Keras, or why it cannot. Raises TrainerDied."""
        self._start()
        start_by = time.monotonic() + START_SECONDS
        while not self._ready:
            message = self._next(START_POLL_SECONDS)
            if isinstance(message, Failed):
                return message
            if time.monotonic() > start_by:
                raise self.hung()
        return None

    def hung(self) -> TrainerDied:
        """Kills a process that has not imported Keras within START_SECONDS, and returns what to raise."""
        pid = self.pid
        self.kill()
        return TrainerDied(
            f"the trainer process {pid} did not import Keras within {START_SECONDS:.0f} s and was killed",
            self.log_file,
            out_of_memory=False,
            ready=False,
        )

    def submit(self, job: Job) -> None:
        """Begins `job`. The messages that follow are to be fetched with `receive` up to the one that ends it."""
        if self._process is None or self._process.poll() is not None or self._has_grown():
            self._start()
        self._jobs, self._kills = self._jobs + 1, _memory_kills()
        self._send(job)

    def stop(self, how: "Stop") -> None:
        """Asks the running job to end after its batch; its end is still to be received.

        "keep" has it write a checkpoint of its last whole epoch. Without a job nothing happens.
        """
        self._send(_Stop(how))

    def receive(self, seconds: float) -> Epoch | Resumed | Trained | Checked | Failed | None:
        """The next message, or None if none came within `seconds`. Raises TrainerDied."""
        deadline = time.monotonic() + seconds
        message = self._next(seconds)
        while isinstance(message, Ready):
            message = self._next(max(0.0, deadline - time.monotonic()))
        return message

    def _next(self, seconds: float) -> Ready | Epoch | Resumed | Trained | Checked | Failed | None:
        assert self._connection is not None
        try:
            message = self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, Ready):
            self._ready = True
        if isinstance(message, Failed) and not self._ready:
            self.kill()  # it ends by itself, and must not be given another job until then
        return message

    def kill(self) -> None:
        """Ends the process now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def resident(self) -> int | None:
        """The bytes of memory that the process holds; None while there is none."""
        try:
            return None if self._process is None else int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return None

    def _has_grown(self) -> bool:
        resident = self.resident()
        if resident is None or self._jobs == 0:
            return False
        if self._first is None:
            self._first = resident
        if resident <= self._first * (1 + self._growth):
            return False
        log.info(
            "the trainer process %s grew from %d to %d MB and is replaced", self.pid, self._first >> 20, resident >> 20
        )
        return True

    def _send(self, message: Slot | Job | _Stop) -> None:
        with self._sending, contextlib.suppress(OSError):  # it died: `receive` will say so
            if self._connection is not None and not self._connection.closed:
                self._connection.send(message)

    def _start(self) -> None:
        self.kill()
        self._first, self._jobs, self._ready = None, 0, False
        ours, theirs = Pipe()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                # -P: a user's search.py or storage/ in the current folder must not be imported in place of ours.
                [sys.executable, "-P", "-m", "search.trainer", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_without_storage() | {"TF_CPP_MIN_LOG_LEVEL": "2"} | self.slot.environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is for the worker, which then says what to do
            )
        theirs.close()
        self._connection = ours
        self._send(self.slot)

    def _died(self) -> TrainerDied:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        how = f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        out_of_memory = code == -signal.SIGKILL and _memory_kills() > self._kills
        hint = " when memory ran out" if out_of_memory else ""
        early = "" if self._ready else " before it had imported Keras"
        return TrainerDied(
            f"the trainer process {self._process.pid} ended {how}{hint}{early}",
            self.log_file,
            out_of_memory=out_of_memory,
            ready=self._ready,
        )


def _without_storage() -> dict[str, str]:
    # It touches no database, and a user's model may print its environment.
    return {name: value for name, value in os.environ.items() if not name.startswith("TRIALYARD_STORAGE")}


def _memory_kills(files: tuple[Path, ...] = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))) -> int:
    """How many processes the kernel has killed for want of memory, in this control group or else on this machine."""
    for file in files:
        try:
            for line in file.read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except OSError:
            continue  # not Linux, or no control groups of version 2
    return 0


# --- the process's own side -------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Imports Keras for the slot that comes first, says so, and trains one job after another.

    Until the worker's end of the socket closes, or Keras cannot be imported.
    """
    # Whoever ends a whole process group, or a service, means the worker, which then says what to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        slot: Slot = connection.recv()
    except (EOFError, OSError):
        return  # the worker has ended already
    jobs: queue.Queue[Job] = queue.Queue()
    stops: list[Stop] = []

    def listen() -> None:
        # A thread, so that a stop is heard within a batch, and the worker's death at once: a trainer that went on
        # alone would train a trial that somebody else has claimed by then.
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, Job):
                stops.clear()
                jobs.put(message)
            else:
                stops.append(message.how)

    threading.Thread(target=listen, name="listen", daemon=True).start()
    failed = _import_keras(slot)
    connection.send(failed or Ready())
    if failed is not None:
        return
    datasets: dict[Any, Dataset] = {}
    while True:
        end = _run(jobs.get(), connection, stops, datasets)
        _give_back_memory()
        connection.send(end)


def _import_keras(slot: Slot) -> Failed | None:
    """Imports all that a job needs, pinned to `slot`; returns why it cannot be."""
    from search import checks
    from search.errors import DeviceError

    try:
        devices.pin(slot)  # before the framework's first use
        import search.training  # noqa: F401
    except DeviceError as error:
        return Failed(kind="device", message=str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken installation may raise anything
        traceback.print_exc()  # whole, into the log file
        backend = checks.software()["backend"]
        return Failed(
            kind="import",
            message=f"Keras cannot be imported on this machine with the backend {backend} ({_in_one_line(error)}): "
            "install what is missing, or set KERAS_BACKEND to a backend that is installed",
        )
    return None


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]


def _give_back_memory() -> None:
    """What the last model held, as far as Python and the C library can be made to."""
    if "keras" in sys.modules:
        sys.modules["keras"].backend.clear_session()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _run(
    job: Job, connection: "Connection[Any, Any]", stops: "list[Stop]", datasets: "dict[Any, Dataset]"
) -> Trained | Checked | Failed:
    from search.errors import DataError, MachineError, ModelError

    try:
        dataset = _loaded(job, datasets)
    except MachineError as error:
        return Failed(kind="import", message=str(error))
    except DataError as error:
        return Failed(kind="load", message=str(error))
    except Exception as error:  # noqa: BLE001 - no job with these data could begin here
        traceback.print_exc()
        message = f"{job.definition.dataset} cannot be loaded on this machine ({_in_one_line(error)})"
        return Failed(kind="load", message=message)
    try:
        return _trained(job, dataset, connection, stops)
    except StorageError as error:
        return Failed(kind="disk", message=str(error))
    except MachineError as error:
        return Failed(kind="import", message=str(error))
    except DataError as error:
        return Failed(kind="data", message=str(error))
    except ModelError as error:
        memory = error.__cause__ is not None and _is_out_of_memory(error.__cause__)
        return Failed(kind="memory" if memory else "model", message=str(error))
    except Exception as error:  # noqa: BLE001 - whatever a user's model raises ends its trial, not the study
        traceback.print_exc()  # whole, into the log file
        if type(error).__name__ == "NotANumber":
            return Failed(kind="nan", message=" ".join(str(error).split()))
        kind = "memory" if _is_out_of_memory(error) else "error"
        return Failed(kind=kind, message=_in_one_line(error))


def _is_out_of_memory(error: BaseException) -> bool:
    # TensorFlow's own type, JAX's word for it, and PyTorch's type.
    names = ("MemoryError", "_ArrayMemoryError", "ResourceExhaustedError", "OutOfMemoryError")
    return type(error).__name__ in names or "RESOURCE_EXHAUSTED" in str(error)


def _loaded(job: Job, datasets: "dict[Any, Dataset]") -> "Dataset":
    from search import data

    wanted = job.definition
    key = (wanted.dataset, wanted.data, job.data_folders)
    if key not in datasets:
        datasets.clear()  # one at a time: a machine may serve many studies
        datasets[key] = data.load(wanted.dataset, wanted.data, job.data_folders)
    return datasets[key]


def _trained(
    job: Job, dataset: "Dataset", connection: "Connection[Any, Any]", stops: "list[Stop]"
) -> Trained | Checked:
    from search import checks, training

    wanted = job.definition
    if job.folder is None:
        checks.check_with_keras(wanted, dataset)
        return Checked(data=dataset.summary())
    precision = precision_for(job.slot.device, wanted.precision)
    trial = f"{job.folder.parent.name} trial {job.folder.name} attempt {job.attempt}"
    _log(f"{trial} begins in {precision[0]}: {precision[1]}")

    def on_epoch(record: Epoch) -> None:
        _log(f"{trial} epoch {record.epoch} loss {record.loss:.9g} validation {record.val_accuracy:.9g}")
        connection.send(record)

    def on_resume(history: list[Epoch]) -> None:
        _log(f"{trial} goes on after epoch {history[-1].epoch}")
        connection.send(Resumed(history=tuple(history)))

    return training.train(
        model=wanted.model,
        hyperparameters=job.hyperparameters,
        dataset=dataset,
        epochs=wanted.budget.epochs,
        seed=job.seed,
        precision=precision,
        folder=job.folder,
        on_epoch=on_epoch,
        on_resume=on_resume,
        checkpoint_seconds=job.checkpoint_seconds,
        stopping=lambda: stops[0] if stops else None,
    )


def _log(line: str) -> None:
    print(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}", flush=True)


if __name__ == "__main__":
    # Under its own name, not as __main__: the worker pickles these classes by it.
    from search import trainer

    with contextlib.suppress(TrialyardError, BrokenPipeError):
        trainer.main(int(sys.argv[1]))
