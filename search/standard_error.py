"""Standard error, which no command needs: what cannot be written there is dropped.

The disk of a log file may fill, a terminal may be gone, and a pipe may be closed. None of that may end a search.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import IO, Any, cast

from rich.console import Console

log = logging.getLogger(__name__)


class StandardError(Console):
    """A console of Rich on standard error that never raises OSError."""

    def __init__(self) -> None:
        super().__init__(stderr=True, emoji=False)  # a class may be called ":cat:"
        self._is_failing = False

    @property
    def file(self) -> IO[str]:
        """The stream that is standard error now. A `rich.live.Live` replaces it for a while."""
        # Errors are caught below Rich: its own threads write, too, and a console keeps what it could not write.
        return cast("IO[str]", _Stream(super().file, self._try))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Drops what is still to be shown (``2>&1 | head``); Rich ends the program here."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())  # for the log, too
        os.close(nowhere)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True  # first: the line of the log may come here again
                log.debug("standard error cannot be written: %s", error)
        else:
            self._is_failing = False  # somebody has freed the disk


class _Stream:
    """A stream of text whose writing calls go through `attempt`."""

    def __init__(self, stream: IO[str], attempt: Callable[[Callable[[], object]], None]) -> None:
        self._stream, self._attempt = stream, attempt

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
