"""Keeps the notes and figures in optuna-dashboard up to date while a worker runs, without delaying it."""

import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from search.progress import Listener
from storage.artifact_store import ArtifactStore
from storage.claims import Claim
from storage.transactions import PatientStorage
from studies import notes, registry

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
LEAVE_SECONDS = 10.0  # how long a worker that ends waits for the last publication


class Publisher(Listener):
    """Publishes the studies whose trials end, in a thread of its own.

    A failure or a slow database is only logged: training and claims never wait for it.
    """

    def __init__(self, storage: PatientStorage, artifacts: ArtifactStore | Path) -> None:
        self._storage, self._artifacts = storage, artifacts
        # By name, with the study's identity. A database uses the ids of deleted studies again, and Optuna's cache of
        # finished trials goes by the id.
        self._caches: dict[str, tuple[str, BaseStorage]] = {}
        self._due: dict[str, float] = {}  # studies with news, and when to look at them; by `time.monotonic`
        self._lock = threading.Lock()  # the slots' threads write, the publishing thread reads
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(LEAVE_SECONDS)
        if self._thread.is_alive():
            log.warning("the last notes and figures were not written: the database took too long")

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """Remembers to publish the study."""
        with self._lock:
            self._due.setdefault(claim.study, time.monotonic())

    def _run(self) -> None:
        while not self._done.wait(TICK_SECONDS):
            with self._lock:
                now = time.monotonic()
                due = [study for study, when in self._due.items() if when <= now]
                for study in due:
                    del self._due[study]
            for study in due:
                if not self._publish(study, last=False):
                    with self._lock:
                        self._due[study] = time.monotonic() + notes.PAUSE_SECONDS
        with self._lock:
            remaining = list(self._due)
        for study in remaining:
            self._publish(study, last=True)

    def _cached(self, study: str) -> BaseStorage:
        incarnation = registry.find(study, self._storage).incarnation
        if study not in self._caches or self._caches[study][0] != incarnation:
            self._caches[study] = (incarnation, optuna.storages.get_storage(self._storage))
        return self._caches[study][1]

    def _publish(self, study: str, *, last: bool) -> bool:
        try:
            return notes.publish(study, self._storage, self._artifacts, self._cached(study), last=last)
        except Exception as error:
            # Training must continue after any failure.
            if not self._storage.shutting_down.is_set():
                log.warning("the notes and figures of study %s were not written: %s", study, error)
                log.debug("the whole error", exc_info=error)
            return False
