"""Tells the database which slots this worker has and what each is at, so that `status` anywhere shows them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from search.devices import Slot
from search.messages import Epoch
from search.progress import Relay, Watcher
from storage import owners
from storage.claims import Claim
from storage.database import PatientStorage, write
from storage.errors import StorageError
from storage.owners import Owner, SlotActivity

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
LEAVE_SECONDS = 2.0


class Presence(Relay):
    """Hears what another watcher hears, and beats for all slots while the ``with`` block runs.

    It also gives the other its ticks, from a thread of its own: whoever looks into the database may have to wait,
    and the worker's main thread must be free to hear a signal.
    """

    def __init__(self, inner: Watcher, storage: PatientStorage, seconds: float, slots: Sequence[Slot]) -> None:
        super().__init__(inner)
        self._storage, self._seconds = storage, seconds
        self._slots = {owners.this_slot(slot.name): slot.device.name for slot in slots}
        self._doing: dict[Owner, SlotActivity] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def worker(self, slot: Slot) -> Owner:
        """This process's `slot`, as it is told to others."""
        return next(worker for worker in self._slots if worker.slot == slot.name)

    def __enter__(self) -> "Presence":
        super().__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        # It may be waiting for a database that is away.
        self._thread.join(LEAVE_SECONDS)
        super().__exit__(kind, error, trace)

    def began(self, claim: Claim, point: dict[str, Any], epochs: int) -> None:
        """Remembers the slot's trial."""
        self._doing[claim.owner] = SlotActivity(study=claim.study, trial=claim.number, epoch=0)
        super().began(claim, point, epochs)

    def epoch(self, claim: Claim, record: Epoch) -> None:
        """Remembers the epoch."""
        self._doing[claim.owner] = SlotActivity(study=claim.study, trial=claim.number, epoch=record.epoch)
        super().epoch(claim, record)

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """Forgets the trial."""
        self._doing[claim.owner] = SlotActivity()
        super().ended(claim, trial)

    def gone(self, claim: Claim) -> None:
        """Forgets the trial."""
        self._doing[claim.owner] = SlotActivity()
        super().gone(claim)

    def _run(self) -> None:
        beaten = float("-inf")
        while not self._done.is_set():
            if time.monotonic() - beaten >= self._seconds:
                self._told(self._beat)
                beaten = time.monotonic()
            self._told(self._inner.tick)
            self._done.wait(TICK_SECONDS)
        self._told(lambda: write(self._storage, None, lambda connection: owners.leave(connection, list(self._slots))))

    def _beat(self) -> None:
        write(self._storage, None, lambda connection: owners.beat(connection, self._slots, dict(self._doing)))

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OptunaError, SQLAlchemyError, StorageError) as error:
            log.warning("the workers' list or the display waits for the database: %s", error)
