"""Commands that start at once: forks of one process that has imported Trialyard and Keras already.

Keras needs seven seconds of a processor to be imported, and a test of what happens to processes starts many. Each is
still a process of its own, with the program's own code, folder, environment and signals; only the imports are not
repeated, and a trainer is a fork of its command, or of the same process if a test starts it. What an import decides
must be tested with a new process instead: `search.trainer` starts them, `COMMAND` of conftest.py is one, and
`Warm.fits` says which environments need one.
"""

import atexit
import contextlib
import gc
import io
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

READ_AT_IMPORT = ("KERAS_", "TF_", "XLA_", "JAX_", "PYTHON", "LD_", "OMP_")


def _read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in variables.items() if name.startswith(READ_AT_IMPORT)}


class Warm:
    """The process that has imported everything; commands are its forks."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._imported_with = _read_at_import(variables)
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env=dict(variables) | {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        theirs.close()
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._asking = threading.Lock()  # a test may have several slots, each with its thread

    def fits(self, variables: Mapping[str, str]) -> bool:
        """Whether a command with this environment may be a fork: nothing differs that imports read."""
        return _read_at_import(variables) == self._imported_with

    def start(
        self, arguments: Sequence[str], folder: Path, variables: Mapping[str, str], *, terminal: bool = False
    ) -> "Forked":
        """Starts ``trialyard`` with these arguments; with ``-c TEXT`` Python with this program.

        With `terminal` its standard error is a terminal.
        """
        out, err = os.pipe(), pty.openpty() if terminal else os.pipe()
        pid = self._fork([*arguments], folder, variables, out[1], err[1])
        os.close(out[1])
        os.close(err[1])
        return Forked(pid, out[0], err[0], self)

    def start_trainer(self, folder: Path, variables: Mapping[str, str], descriptor: int, output: int) -> "Child":
        """Starts a trainer process that talks over the socket `descriptor` and prints to `output`."""
        return Child(self._fork(None, folder, variables, descriptor, output), self)

    def _fork(self, arguments: list[str] | None, folder: Path, variables: Mapping[str, str], *descriptors: int) -> int:
        with self._asking:
            self._connection.send(("start", arguments, str(folder), dict(variables)))
            socket.send_fds(self._socket, [b"."], descriptors)
            pid: int = self._connection.recv()
            return pid

    def code(self, pid: int) -> int:
        """The exit code of a process that has ended, negative for a signal."""
        with self._asking:
            self._connection.send(("code", pid))
            code: int = self._connection.recv()
            return code

    def close(self) -> None:
        """Ends the process; commands that still run go on."""
        self._connection.close()
        self._socket.close()
        self._process.wait(timeout=60)


class Child:
    """A process that was forked, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, parent: Warm) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent, self._end = parent, os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end. Raises subprocess.TimeoutExpired."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("trialyard", timeout or 0.0)
        return code

    def _wait(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], seconds)[0]:
            self.returncode = self._parent.code(self.pid)
            os.close(self._end)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._end, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Forked(Child):
    """A running command, with its outputs."""

    def __init__(self, pid: int, out: int, err: int, parent: Warm) -> None:
        super().__init__(pid, parent)
        self.stdout: IO[str] = os.fdopen(out, encoding="utf-8")
        self.stderr: IO[str] = os.fdopen(err, encoding="utf-8")

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it still writes to its two outputs, at its end. Raises subprocess.TimeoutExpired."""
        read = {"out": "", "err": ""}

        def fetch(name: str, stream: IO[str]) -> None:
            if not stream.closed:
                read[name] = stream.read()
                stream.close()

        threads = [
            threading.Thread(target=fetch, args=pair, daemon=True)
            for pair in (("out", self.stdout), ("err", self.stderr))
        ]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return read["out"], read["err"]


# --- in the process that has imported everything --------------------------------------------------------------


def _serve(descriptor: int) -> list[str]:
    """Forks commands until the tests close the connection; returns in each fork, with its arguments."""
    import keras  # noqa: F401
    import optuna_dashboard  # noqa: F401

    import search.progress
    import search.training_loop
    import search.worker  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, meant for the tests
    gc.freeze()  # so that no fork looks through all of this again
    incoming, connection = socket.socket(fileno=descriptor), Connection(os.dup(descriptor))
    while True:
        try:
            request = connection.recv()
        except EOFError:
            os._exit(0)
        if request[0] == "code":
            connection.send(os.waitstatus_to_exitcode(os.waitpid(request[1], 0)[1]))
            continue
        _, arguments, folder, variables = request
        _, descriptors, _, _ = socket.recv_fds(incoming, 1, 2)
        pid = os.fork()
        if pid == 0:
            connection.close()
            incoming.close()
            if arguments is None:
                os.chdir(folder)
                _train(*descriptors, variables)
            _become(folder, variables, *descriptors)
            return [str(argument) for argument in arguments]
        for one in descriptors:
            os.close(one)
        connection.send(pid)


def _become(folder: str, variables: Mapping[str, str], out: int, err: int) -> None:
    """Gives this fork its folder, its environment and its outputs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    _outputs(out, err)
    os.close(out)
    os.close(err)


def _outputs(out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    # New objects: another thread may have held the old ones' locks.
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True
    )


class ForkedTrainer:
    """A trainer process that is a fork of its command, with those methods of `subprocess.Popen` that it uses."""

    def __init__(self, descriptor: int, output: int, variables: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _train(descriptor, output, variables)
        self._end = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("trainer", timeout or 0.0)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._end, signal.SIGKILL)

    def _wait(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], seconds)[0]:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._end)
        return self.returncode


def _train(descriptor: int, output: int, variables: Mapping[str, str]) -> NoReturn:
    """What ``python -P -m search.trainer_process`` does after its imports, in a fork of a process with threads."""
    code = 1
    try:
        gc.freeze()  # what the command left behind is never collected here, its open database included
        os.setsid()
        os.environ.clear()
        os.environ.update(variables)
        tempfile.tempdir = None  # the command may have looked it up
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        _outputs(output, output)
        # The worker's end of the socket above all: it could not notice that its trainer is gone.
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
        from search import trainer_process

        trainer_process.main(descriptor, Path(variables["TMPDIR"]))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serves until the end, or is a command."""
    arguments = _serve(int(sys.argv[1]))
    from search import cli, trainer

    def launch(slot: Any, descriptor: int, output: IO[bytes], temporary: Path) -> ForkedTrainer:
        return ForkedTrainer(descriptor, output.fileno(), trainer.environment(slot, temporary))

    trainer.launch = launch
    sys.argv = ["-c", *arguments[2:]] if arguments[:1] == ["-c"] else ["trialyard", *arguments]
    code = 1
    try:
        if arguments[:1] == ["-c"]:
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    gc.collect()  # closes the database, as the interpreter's end would
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what else the interpreter would do is to free all that Keras has, for two seconds


if __name__ == "__main__":
    main()
