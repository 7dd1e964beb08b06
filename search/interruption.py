"""Ctrl-C and SIGTERM end a command, at whatever moment they come."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # the exit code
AGAIN_SECONDS = 0.01
is_command = False  # whether this process is a command's, and no notebook's or script's
# What stops a worker: SIGINT is Ctrl-C, a scheduler sends SIGTERM, a terminal that is closed SIGHUP, and Slurm with
# `--signal=USR1@60` SIGUSR1 a minute before the end.
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def end_on_signals() -> None:
    """From now on SIGINT and SIGTERM end the process with one line.

    A worker that works has a handler of its own; otherwise nothing is half done. SIGTERM is named because the first
    process of a container would not hear it otherwise.
    """
    global is_command
    is_command = True
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _end)
    sys.unraisablehook = _repeat_if_dropped


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if number != signal.SIGALRM:  # which repeats another signal
        # Not with sys.stderr: the signal may come while it is written to, and its error would replace the end.
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
    sys.exit(INTERRUPTED)


def _repeat_if_dropped(dropped: "sys.UnraisableHookArgs") -> None:
    """Python drops an exception that comes while it frees an object, also the one that ends the command."""
    if isinstance(dropped.exc_value, SystemExit):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(dropped)
