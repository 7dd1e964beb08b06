"""Tells the database which slots this worker has and what each is at, so that `status` anywhere shows them."""

import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from search.devices import Slot
from search.display import Watcher
from search.records import Epoch
from storage import workers
from storage.claims import Claim
from storage.database import PatientStorage, write
from storage.errors import StorageError
from storage.workers import Doing, Worker

log = logging.getLogger(__name__)

LEAVE_SECONDS = 2.0


class Presence(Watcher):
    """Hears what another watcher hears, and beats for all slots while the ``with`` block runs."""

    def __init__(self, inner: Watcher, storage: PatientStorage, seconds: float, slots: Sequence[Slot]) -> None:
        self._inner, self._storage, self._seconds = inner, storage, seconds
        self._slots = {workers.worker(slot.name): slot.device.name for slot in slots}
        self._doing: dict[Worker, Doing] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def worker(self, slot: Slot) -> Worker:
        """This process's `slot`, as it is told to others."""
        return next(worker for worker in self._slots if worker.slot == slot.name)

    def __enter__(self) -> "Presence":
        self._inner.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        self._done.set()
        # It may be waiting for a database that is away.
        self._thread.join(LEAVE_SECONDS)

    def began(self, claim: Claim, point: dict[str, Any], epochs: int) -> None:
        """Remembers the slot's trial."""
        self._doing[claim.worker] = Doing(study=claim.study, trial=claim.number, epoch=0)
        self._inner.began(claim, point, epochs)

    def epoch(self, claim: Claim, record: Epoch) -> None:
        """Remembers the epoch."""
        self._doing[claim.worker] = Doing(study=claim.study, trial=claim.number, epoch=record.epoch)
        self._inner.epoch(claim, record)

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """Forgets the trial."""
        self._doing[claim.worker] = Doing()
        self._inner.ended(claim, trial)

    def tick(self) -> None:
        """Passed on."""
        self._inner.tick()

    def _run(self) -> None:
        while True:
            self._tell(lambda connection: workers.beat(connection, self._slots, dict(self._doing)))
            if self._done.wait(self._seconds):
                break
        self._tell(lambda connection: workers.leave(connection, list(self._slots)))

    def _tell(self, work: Any) -> None:
        try:
            write(self._storage, None, work)
        except (OptunaError, SQLAlchemyError, StorageError) as error:
            log.warning("the workers' list could not be written, to be tried again: %s", error)
