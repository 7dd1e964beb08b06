"""The files of a running attempt: what its row may name, and how they come to where other machines find them.

The trainer process writes plain files into the attempt's folder on this machine. In an artifacts folder that is all.
For an object store they are copied before the transaction that names them: a checkpoint while the training goes on,
the others at the end. What could not be copied is not named.
"""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from storage import artifacts
from storage.artifact_store import ArtifactStore
from storage.artifacts import ALL, CHECKPOINT, DOWNLOADABLE, HISTORY, SUMMARY
from storage.claims import Claim
from storage.errors import DiskError, ObjectStoreError
from storage.object_store import ObjectStore

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.2


class AttemptFiles:
    """The files of the attempt of `claim`, in an artifacts folder."""

    def __init__(self, store: ArtifactStore, claim: Claim) -> None:
        self.folder: Path = store.folder / claim.folder  # on this machine
        self._store, self._claim = store, claim

    def __enter__(self) -> "AttemptFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def checkpoints(self, look: Callable[[], None]) -> tuple[Path, ...]:
        """Files of this machine where earlier attempts may have left a checkpoint.

        While it takes time, `look` is called again and again; its exceptions end the waiting. Raises ObjectStoreError.
        """
        return tuple(self._store.folder / path for path in self._claim.checkpoints)

    def names(self) -> list[str]:
        """The names of the files that readers can have now, of those that the dashboard offers. Never waits."""
        # As `Path.is_file`, which raises an error where the disk has one: then there is no file that anybody can have.
        return [name for name in DOWNLOADABLE if os.path.isfile(self.folder / name)]

    def keep_checkpoint(self, look: Callable[[], None]) -> list[str]:
        """Has another machine find the last checkpoint, and returns `names`. As `checkpoints`, but raises no error."""
        return self.names()

    def keep_all(self, look: Callable[[], None]) -> None:
        """Has readers find all files but the checkpoint, for the end of a trial. As `checkpoints`; also DiskError."""

    def stop_copying(self, look: Callable[[], None]) -> None:
        """The trial has ended: returns once no checkpoint is being copied any more."""

    def ended(self) -> None:
        """The trial's end is recorded: removes from this machine what only the training needed."""

    def close(self) -> None:
        """Ends all copying, and removes from this machine what only this attempt needed."""


class AttemptObjects(AttemptFiles):
    """The files of an attempt that are copied to an object store, in threads of their own.

    It is tried again for `patience` seconds while the store is away.
    """

    def __init__(self, store: ObjectStore, claim: Claim, patience: float) -> None:
        super().__init__(store, claim)
        self._objects, self._patience = store, patience
        self._kept: set[str] = set()  # names
        self._state: tuple[int, int] | None = None  # of the last checkpoint that was copied: what tells it from others
        self._copying: Future[None] | None = None  # of a checkpoint
        self._downloads: list[Path] = []
        self._warned = ""  # of what
        self._stop = threading.Event()

    def checkpoints(self, look: Callable[[], None]) -> tuple[Path, ...]:
        # A worker of this machine that was killed may have left a later one than it could copy: the longest is taken.
        here = super().checkpoints(look)
        names = {path: self.folder / f".{uuid.uuid4().hex}-{CHECKPOINT}" for path in self._claim.checkpoints}
        self._downloads = list(names.values())
        futures = {
            to: self._in_background(partial(self._objects.download, PurePosixPath(path), to))
            for path, to in names.items()
        }
        return (*here, *(to for to, future in futures.items() if self._result(future, look)))

    def names(self) -> list[str]:
        if self._copying is not None and self._copying.done():
            error = self._copying.exception()
            if error is not None and str(error) != self._warned:
                log.warning("a checkpoint of trial %d of %s was not copied: %s", *self._trial, error)
                self._warned = str(error)
            self._copying = None
        state = self._checkpoint_state()
        if self._copying is None and state is not None and state != self._state:
            self._copying = self._in_background(self._copy_checkpoint)
        return [name for name in DOWNLOADABLE if name in self._kept]

    def keep_checkpoint(self, look: Callable[[], None]) -> list[str]:
        try:
            self._finish_copying(look)
            if self._checkpoint_state() not in (None, self._state):
                self._result(self._in_background(self._copy_checkpoint), look)
        except (ObjectStoreError, OSError) as error:
            log.warning("the last checkpoint of trial %d of %s was not copied: %s", *self._trial, error)
        return [name for name in DOWNLOADABLE if name in self._kept]

    def keep_all(self, look: Callable[[], None]) -> None:
        self.stop_copying(look)
        try:
            names = [name for name in ALL if name != CHECKPOINT and (self.folder / name).is_file()]
            futures = [self._in_background(partial(self._copy, name)) for name in names]
            for future in futures:
                self._result(future, look)
        except ObjectStoreError:
            self._patience = 0.0  # it was waited for already
            raise
        except OSError as error:  # of this machine's file
            raise DiskError(
                f"the files in {self.folder} cannot be read ({error.strerror or error}): is the disk damaged?"
            ) from error

    def stop_copying(self, look: Callable[[], None]) -> None:
        self._stop.set()
        with contextlib.suppress(ObjectStoreError, OSError):
            self._finish_copying(look)
        self._stop = threading.Event()

    def ended(self) -> None:
        # What other trials' notes need stays; it is small.
        self._objects.remove_local([self._claim.folder / name for name in ALL if name not in (HISTORY, SUMMARY)])

    def close(self) -> None:
        self._stop.set()
        for path in self._downloads:
            artifacts.remove(path)
        self._objects.remove_empty(self._claim.folder)

    @property
    def _trial(self) -> tuple[int, str]:
        return self._claim.number, self._claim.study

    def _checkpoint_state(self) -> tuple[int, int] | None:
        try:
            status = (self.folder / CHECKPOINT).stat()
        except OSError:  # it does not exist, or the disk fails: then there is none to be copied
            return None
        return status.st_ino, status.st_mtime_ns

    def _copy_checkpoint(self) -> None:
        state = self._checkpoint_state()  # before: it may be replaced meanwhile, and then is copied again
        self._copy(CHECKPOINT)
        self._state = state

    def _copy(self, name: str) -> None:
        self._objects.keep(self._claim.folder / name)
        self._kept.add(name)

    def _finish_copying(self, look: Callable[[], None]) -> None:
        copying, self._copying = self._copying, None
        if copying is not None:
            self._result(copying, look)

    def _in_background(self, call: Callable[[], T]) -> "Future[T]":
        """`call` in a thread that does not keep a process from ending, as those of an executor do."""
        future: Future[T] = Future()
        stop = self._stop

        def run() -> None:
            try:
                future.set_result(self._objects.with_patience(call, self._patience, stop))
            except BaseException as error:  # noqa: BLE001 - carried to the thread that asks
                future.set_exception(error)

        threading.Thread(target=run, name="copy", daemon=True).start()
        return future

    def _result(self, future: "Future[T]", look: Callable[[], None]) -> T:
        while not wait([future], POLL_SECONDS).done:
            look()
        return future.result()


def of_attempt(store: ArtifactStore, claim: Claim, patience: float) -> AttemptFiles:
    """The files of the attempt of `claim`."""
    return AttemptObjects(store, claim, patience) if isinstance(store, ObjectStore) else AttemptFiles(store, claim)
