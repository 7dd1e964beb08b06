"""The worker's side of a slot's trainer process: started with its device pinned, fed with jobs, stopped, replaced.

The process (`search.trainer_process`) is a program of its own and not a fork: Keras must first be imported with the
environment that pins its device, and the process may crash, hang or run out of memory without harm to the worker.
"""

import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from search.devices import Slot
from search.messages import Failed, Job, Message, Ready, Stop, StopMode
from storage import trainer_logs
from storage.errors import DiskError
from storage.settings import environment_without_secrets
from studies.sources import module_folders
from studies.wording import one_line

log = logging.getLogger(__name__)

MEMORY_GROWTH = 0.15
START_SECONDS = 600.0  # how long a process may take to import Keras
START_POLL_SECONDS = 0.5
DEATH_POLL_SECONDS = 1.0  # how soon a death is noticed that closes no connection
END_POLL_SECONDS = 0.01
SEND_SECONDS = 1.0  # how long a stop waits for a message that is being sent
KILL_SECONDS = 5.0  # how long a process that was killed, or closed its connection, is waited for


class TrainerDied(Exception):  # noqa: N818 - it is an event
    """The process ended in the middle of a job."""

    def __init__(self, how: str, log_file: Path | None = None, *, out_of_memory: bool, ready: bool = True) -> None:
        super().__init__(how if log_file is None else f"{how}; what it printed is in {log_file}")
        self.how = how
        self.out_of_memory = out_of_memory  # the kernel killed a process for want of memory meanwhile
        self.ready = ready  # Keras had been imported; if not, the job is not to blame


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
        self._temporary: Path | None = None  # the process's folder for temporary files
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
    def is_used(self) -> bool:
        """Whether the process has run other jobs before the last one."""
        return self._jobs > 1

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
                raise self.hung_at_start()
        return None

    def hung_at_start(self) -> TrainerDied:
        """Kills a process that has not imported Keras within START_SECONDS, and returns what to raise."""
        return self.hung(f"did not import Keras within {START_SECONDS:.0f} s", ready=False)

    def hung(self, how: str, *, ready: bool) -> TrainerDied:
        """Kills a process that hangs, and returns what to raise: `how` is shown, as what the process did."""
        pid = self.pid
        self.kill()
        return TrainerDied(
            f"the trainer process {pid} {how} and was killed", self.log_file, out_of_memory=False, ready=ready
        )

    def submit(self, job: Job) -> None:
        """Begins `job`. The messages that follow are to be fetched with `receive` up to the one that ends it.

        Raises DiskError if the log file cannot be written, and TrainerDied if no process can be started.
        """
        trainer_logs.shorten(self.log_file)
        if self._process is None or _has_ended(self._process) or self._has_grown():
            self._start()
        self._jobs, self._kills = self._jobs + 1, _memory_kills()
        self._send(job)

    def stop(self, how: StopMode) -> None:
        """Asks the running job to end after its batch; its end is still to be received.

        "keep" has it write a checkpoint of its last whole epoch. Without a job nothing happens.
        """
        self._send(Stop(mode=how))

    def receive(self, seconds: float) -> Message | None:
        """The next message, or None if none came within `seconds`. Raises TrainerDied."""
        deadline = time.monotonic() + seconds
        message = self._next(seconds)
        while isinstance(message, Ready):
            message = self._next(max(0.0, deadline - time.monotonic()))
        return message

    def _next(self, seconds: float) -> Ready | Message | None:
        assert self._connection is not None
        try:
            message = self._connection.recv() if self._may_receive(seconds) else None
        except (EOFError, OSError):
            raise self._died() from None
        except Exception as error:  # reading a damaged message may raise anything
            raise self.hung(
                f"sent a message that cannot be read ({type(error).__name__}: {one_line(error, 200)})",
                ready=self._ready,
            ) from error
        if isinstance(message, Ready):
            self._ready = True
        if isinstance(message, Failed) and not self._ready:
            self.kill()  # it ends by itself, and must not be given another job until then
        return message

    def _may_receive(self, seconds: float) -> bool:
        """Whether there is a message within `seconds`. Raises EOFError once the process has ended and said all."""
        assert self._connection is not None
        assert self._process is not None
        deadline = time.monotonic() + seconds
        # The processes that it forked, such as those of a pool, have its end of the socket too and keep it open.
        while not _has_ended(self._process):
            left = max(0.0, deadline - time.monotonic())
            if self._connection.poll(min(left, DEATH_POLL_SECONDS)):
                return True
            if left <= DEATH_POLL_SECONDS:
                return False
        if self._connection.poll(0):  # said right before its end
            return True
        raise EOFError

    def kill(self) -> None:
        """Ends the process now, with all that it has started."""
        if self._process is not None:
            _kill_group(self._process)
            try:
                self._process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired:  # a driver that hangs keeps its process
                log.warning("the trainer process %d was killed and does not end: see its device", self._process.pid)
        if self._connection is not None:
            self._connection.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)  # a process that hangs may still write there
        self._process = self._connection = self._temporary = None

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

    def _send(self, message: Slot | Job | Stop) -> None:
        # A process that hangs at its start does not read: who sends a large job then waits, and a stop must not, too.
        if not self._sending.acquire(timeout=SEND_SECONDS if isinstance(message, Stop) else -1):
            return
        try:
            with contextlib.suppress(OSError):  # it died: `receive` will say so
                if self._connection is not None and not self._connection.closed:
                    self._connection.send(message)
        finally:
            self._sending.release()

    def _start(self) -> None:
        self.kill()
        self._first, self._jobs, self._ready = None, 0, False
        try:
            self._temporary = _temporary_folder()
            self._connection, theirs = Pipe()
            with contextlib.closing(theirs), self._log() as output:
                self._process = launch(self.slot, theirs.fileno(), output, self._temporary)
        except (OSError, MemoryError) as error:  # this process may open no more files, or the machine is full
            reason = getattr(error, "strerror", None) or str(error) or "no memory is left"
            raise TrainerDied(
                f"a trainer process cannot be started ({reason})", out_of_memory=False, ready=False
            ) from error
        self._send(self.slot)

    def _log(self) -> IO[bytes]:
        with _disk_errors(
            f"the log {self.log_file} cannot be written", "is the disk full, or the folder another user's?"
        ):
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            return self.log_file.open("ab")

    def _died(self) -> TrainerDied:
        assert self._process is not None
        deadline = time.monotonic() + KILL_SECONDS
        while not _has_ended(self._process):
            if time.monotonic() > deadline:  # it hangs at its exit, or a model closed all files
                return self.hung("closed its connection", ready=self._ready)
            time.sleep(END_POLL_SECONDS)
        _kill_group(self._process)
        try:
            code = self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:  # a thread of it hangs in a driver
            return self.hung("ended, but its device keeps it", ready=self._ready)
        how = f"by signal {_signal_name(-code)}" if code < 0 else f"with exit code {code}"
        out_of_memory = code == -signal.SIGKILL and _memory_kills() > self._kills
        hint = " when memory ran out" if out_of_memory else ""
        early = "" if self._ready else " before it had imported Keras"
        return TrainerDied(
            f"the trainer process {self._process.pid} ended {how}{hint}{early}",
            self.log_file,
            out_of_memory=out_of_memory,
            ready=self._ready,
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Python names only the first and the last of the real-time signals
        return str(number)


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has ended. It is not waited for: until then no other process gets its number."""
    if process.returncode is not None:
        return True
    try:
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and those that it has started, such as a pool of a user's data function.

    Only before it is waited for: after that the number of its group may be that of another one.
    """
    if process.returncode is None:
        with contextlib.suppress(OSError):  # the group is empty
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


@contextlib.contextmanager
def _disk_errors(what: str, hint: str) -> Iterator[None]:
    """Makes DiskErrors of the system's errors, but not of one that this process has no file descriptor left."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise DiskError(f"{what} ({error.strerror or error}): {hint}") from error


def _temporary_folder() -> Path:
    with _disk_errors("no folder for temporary files can be made", "is the disk full? TMPDIR names another place"):
        return Path(tempfile.mkdtemp(prefix="trialyard-"))


def launch(slot: Slot, descriptor: int, output: IO[bytes], temporary: Path) -> "subprocess.Popen[bytes]":
    """Starts a trainer process that talks over the socket `descriptor` and prints to `output`."""
    return subprocess.Popen(
        # -P: a user's search.py or storage/ in the current folder must not be imported in place of ours.
        [sys.executable, "-P", "-m", "search.trainer_process", str(descriptor), str(temporary)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment(slot, temporary),
        pass_fds=(descriptor,),
        # A Ctrl-C in the terminal is for the worker, which then says what to do. And all that the process starts is
        # of one group, which `_kill_group` ends.
        start_new_session=True,
    )


def environment(slot: Slot, temporary: Path) -> dict[str, str]:
    """The environment variables of the trainer process of `slot`: this process's, without secrets.

    Its temporary files go into the folder `temporary`. TensorFlow deletes its own only when a process ends by itself,
    and a trainer is killed.
    """
    ours = {"TF_CPP_MIN_LOG_LEVEL": "2", "TMPDIR": str(temporary)}
    return environment_without_secrets() | ours | module_folders() | slot.environment()


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
