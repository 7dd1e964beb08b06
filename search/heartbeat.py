"""One thread a worker that tells the database, again and again, which slots live and which trials they hold."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from search.devices import Slot
from storage import claims, database, owners, silence
from storage import slots as slot_rows
from storage.claims import Claim
from storage.errors import StorageError
from storage.holdings import let_go
from storage.ledger import State
from storage.owners import Owner
from storage.transactions import PatientStorage, write

log = logging.getLogger(__name__)

EXIT_SECONDS = 2.0
LOOK_SECONDS = 0.02  # between two looks at whether a connection is free


class Pulse:
    """What the last heartbeat learned of one claim."""

    def __init__(self) -> None:
        self.lost = False  # somebody else has the trial by now, or it was deleted
        self.state: State = "open"  # of the study


class Heartbeat:
    """Sends a heartbeat for `slots`, and for the claims that they hold, while the ``with`` block runs.

    One that fails because the database is away is tried again at the next interval, of `seconds`.
    """

    def __init__(self, storage: PatientStorage, seconds: float, slots: Sequence[Slot]) -> None:
        self._storage, self._seconds = storage, seconds
        self._spare = database.spare(storage)
        self._slots = {owners.this_slot(slot.name): slot.device.name for slot in slots}
        self._closed: dict[Owner, str] = {}
        self._pulses: dict[Claim, Pulse] = {}
        self._lock = threading.Lock()  # the slots' threads change the claims and the closed slots
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def owner(self, slot: Slot) -> Owner:
        """This process's `slot`, as other processes know it."""
        return next(owner for owner in self._slots if owner.slot == slot.name)

    def close(self, slot: Slot, reason: str) -> None:
        """From the next heartbeat on, `slot` is shown as closed, for this reason."""
        with self._lock:
            self._closed[self.owner(slot)] = reason

    def reopen(self, slot: Slot) -> None:
        """From the next heartbeat on, `slot` is shown as open."""
        with self._lock:
            self._closed.pop(self.owner(slot), None)

    @contextmanager
    def of(self, claim: Claim) -> Iterator[Pulse]:
        """Sends heartbeats for `claim`, too, while the ``with`` block runs."""
        pulse = Pulse()
        with self._lock:
            self._pulses[claim] = pulse
        try:
            yield pulse
        finally:
            with self._lock:
                del self._pulses[claim]
            let_go(claim.incarnation, claim.trial_id, claim.attempt)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        # It may be waiting for a database that is away.
        self._thread.join(EXIT_SECONDS)

    def _run(self) -> None:
        with silence.watching(self._seconds) as runs:
            while not self._done.is_set():
                runs()
                self._beat()
                self._done.wait(self._seconds)
        try:
            write(self._storage, None, lambda connection: slot_rows.remove(connection, list(self._slots)))
        except (OptunaError, SQLAlchemyError, StorageError, OSError) as error:
            log.debug("the slots stay in the list of workers until they are forgotten: %s", error)

    def _is_exhausted(self) -> bool:
        """Whether the worker's connection stays in use for a whole interval: usually it is free in a moment.

        At the worker's end nothing is urgent: its slots have no trial any more.
        """
        look_until = time.monotonic() + self._seconds
        while not self._done.is_set() and database.is_exhausted(self._storage):
            if time.monotonic() > look_until:
                return True
            self._done.wait(LOOK_SECONDS)
        return False

    def _beat(self) -> None:
        with self._lock:
            held, closed = dict(self._pulses), dict(self._closed)
        # Transactions of the slots may hold the worker's connection for longer than the grace period.
        storage = self._spare if self._is_exhausted() else self._storage
        try:
            states = claims.beat(storage, self._slots, list(held), closed)
        except Exception as error:
            # Whatever failed: without heartbeats this worker would lose all its trials.
            log.warning("a heartbeat failed, and is sent again in %.0f s: %s", self._seconds, error)
            log.debug("the whole error", exc_info=error)
            return
        for claim, pulse in held.items():
            state = states[claim]
            if state is not None:
                pulse.state = state
            elif claim in self._pulses:  # else the trial has ended meanwhile
                pulse.lost = True
