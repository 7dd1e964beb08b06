"""Keeps the notes and figures in optuna-dashboard up to date while a worker runs, without delaying it."""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from search.progress import Listener
from storage.artifact_store import ArtifactStore
from storage.claims import Claim
from storage.errors import StudyGone
from storage.ledger import Study
from storage.transactions import PatientStorage
from studies import notes, registry
from studies.errors import StudyError

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
LEAVE_SECONDS = 10.0  # how long a worker that ends waits for the last publication
LONGEST_PAUSE_SECONDS = 600.0  # between two attempts at what fails each time
UNUSED_SECONDS = 600.0  # after which the trials of a study are no longer held: other workers may have ended it


@dataclass(kw_only=True)
class _Cache:
    """Optuna's cache of a study's finished trials."""

    # A database uses the ids of deleted studies again, and Optuna's cache goes by the id.
    incarnation: str
    storage: BaseStorage
    used: float  # by `time.monotonic`


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What the last attempt at publishing a study met, and how long the next one waits."""

    message: str
    pause: float  # seconds


class Publisher(Listener):
    """Publishes the studies whose trials end, in a thread of its own.

    A failure or a slow database is only logged: training and claims never wait for it.
    """

    def __init__(self, storage: PatientStorage, artifacts: ArtifactStore | Path) -> None:
        self._storage, self._artifacts = storage, artifacts
        self._caches: dict[str, _Cache] = {}  # by the study's name
        self._failures: dict[str, _Failure] = {}  # of studies that could not be published
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
            self._look()
        with self._lock:
            remaining = list(self._due)
        for study in remaining:
            self._publish(study, last=True)

    def _look(self) -> None:
        """Publishes what is due."""
        now = time.monotonic()
        with self._lock:
            due = [study for study, when in self._due.items() if when <= now]
            for study in due:
                del self._due[study]
        for study in due:
            pause = self._publish(study, last=False)
            if pause is not None:
                with self._lock:
                    self._due[study] = time.monotonic() + pause
        self._caches = {name: cache for name, cache in self._caches.items() if now - cache.used < UNUSED_SECONDS}

    def _publish(self, study: str, *, last: bool) -> float | None:
        """Publishes the study, if it is its turn; returns the seconds until the next attempt, None: none is needed."""
        try:
            found = registry.find(study, self._storage)
            is_current = notes.publish(study, self._storage, self._artifacts, self._cached(found), last=last)
        except (StudyError, StudyGone) as error:  # it was deleted: no attempt will do better
            self._caches.pop(study, None)
            self._failures.pop(study, None)
            log.debug("the notes and figures of study %s are not needed: %s", study, error)
            return None
        except Exception as error:
            # Training must continue after any failure.
            log.debug("the notes and figures of study %s failed", study, exc_info=error)
            return self._failed(study, error)
        if not is_current:
            return notes.PAUSE_SECONDS
        self._failures.pop(study, None)
        if found.has_ended:
            self._caches.pop(study, None)
        return None

    def _cached(self, study: Study) -> BaseStorage:
        cache = self._caches.get(study.name)
        if cache is None or cache.incarnation != study.incarnation:
            storage = optuna.storages.get_storage(self._storage)
            cache = self._caches[study.name] = _Cache(incarnation=study.incarnation, storage=storage, used=0.0)
        cache.used = time.monotonic()
        return cache.storage

    def _failed(self, study: str, error: Exception) -> float:
        """Logs the error once, not at each attempt; returns the seconds until the next one."""
        before, message = self._failures.get(study), f"{type(error).__name__}: {error}"
        if (before is None or before.message != message) and not self._storage.shutting_down.is_set():
            log.warning("the notes and figures of study %s were not written: %s", study, error)
        pause = notes.PAUSE_SECONDS if before is None else min(2 * before.pause, LONGEST_PAUSE_SECONDS)
        self._failures[study] = _Failure(message=message, pause=pause)
        return pause
