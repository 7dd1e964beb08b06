"""A worker machine: for each slot, claim -> objective -> finish, until the studies are done or a signal comes."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

import optuna

from search import checks, objective
from search.devices import Slot
from search.errors import MachineError
from search.objective import Study
from search.presence import Presence
from search.progress import Watcher
from search.publisher import Publisher
from search.trainer import Trainer
from storage import claims, ledger, owners
from storage.database import PatientStorage
from storage.errors import StorageError, StudyGone, StudyUnreadable, TrialyardError
from storage.settings import Settings
from studies import registry
from studies.errors import StudyError

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between looks for work while other workers hold what is left, or none is there
TICK_SECONDS = 0.2
LEFT_SECONDS = 300.0  # between two looks at a study that this machine cannot train: somebody may have repaired it
LEAVE_SECONDS = 5.0  # beyond the trainers' own time: for the last words to the database


def work(
    names: Sequence[str] | None,
    storage: PatientStorage,
    settings: Settings,
    slots: Sequence[Slot],
    watcher: Watcher,
    *,
    leave: bool = False,
) -> bool:
    """Fills `slots` with trials of the studies `names`, the first study first; None: of all studies, for ever.

    A study that this machine cannot train is left to other workers with a warning where `leave` is true or `names` is
    None, and checked again every LEFT_SECONDS. Otherwise it ends the work: the caller has called `check_fit` before.

    Returns True when all of them have ended or are paused, False when a signal ended the work: the first SIGINT or
    SIGTERM has the trainers write a checkpoint and puts their trials back into the queue, a second one leaves at once.
    """
    interrupted = threading.Event()
    errors: list[BaseException] = []
    open_studies = _OpenStudies(names, storage, settings, leave=leave or names is None)
    publisher = Publisher(watcher, storage, settings.artifact_folder)
    presence = Presence(publisher, storage, settings.beat_seconds, slots)

    def fill(slot: Slot, trainer: Trainer) -> None:
        try:
            _fill(open_studies, settings, trainer, presence.worker(slot), presence, interrupted)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            if not storage.shutting_down.is_set():  # which is no error, but makes some
                errors.append(error)
            interrupted.set()

    with ExitStack() as stack:
        trainers = [stack.enter_context(_trainer(slot, settings)) for slot in slots]
        threads = [
            threading.Thread(target=fill, args=pair, name=pair[0].name, daemon=True)
            for pair in zip(slots, trainers, strict=True)
        ]
        stack.enter_context(_signals(interrupted))
        stack.enter_context(presence)
        for thread in threads:
            thread.start()
        leave_at = float("inf")
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(TICK_SECONDS)
            if interrupted.is_set() and leave_at == float("inf"):
                leave_at = time.monotonic() + settings.stop_seconds + LEAVE_SECONDS
                # From here: a slot's own thread may be waiting for a database that is away.
                for trainer in trainers:
                    trainer.stop("keep")
            if time.monotonic() > leave_at:
                # Their trials stay RUNNING: they are taken back as those of a process that ended, and go on from
                # their checkpoints.
                storage.shutting_down.set()
                break
        for thread in threads:
            thread.join(LEAVE_SECONDS)
    if errors:
        raise errors[0]
    return not interrupted.is_set()


def check_fit(name: str, storage: PatientStorage, settings: Settings) -> None:
    """Raises a TrialyardError with the reason, unless this machine can train study `name` with its data and software.

    The software comes last: a study without trials takes that of the first machine as its own.
    """
    data = checks.check(registry.definition_of(name, storage), settings)
    registry.check_direction(name, storage)
    registry.check_data(name, storage, data)
    registry.check_software(name, storage, checks.software())


def _trainer(slot: Slot, settings: Settings) -> Trainer:
    log_file = settings.log_folder / f"trainer-{slot.name.replace(':', '-')}-{os.getpid()}.log"
    return Trainer(slot, log_file, settings.memory_growth)


def _fill(
    open_studies: "_OpenStudies",
    settings: Settings,
    trainer: Trainer,
    me: owners.Owner,
    watcher: Watcher,
    interrupted: threading.Event,
) -> None:
    """One slot's loop."""
    while not interrupted.is_set():
        for study in open_studies.now():
            try:
                claim = claims.claim(study.storage, study.name, me, settings.grace_seconds, study.incarnation)
            except (StudyGone, StudyUnreadable):
                continue  # deleted or overwritten a moment ago; the next look will not find it
            if claim is not None:
                try:
                    objective.run(study, claim, trainer, settings, watcher, interrupted)
                except MachineError as error:
                    open_studies.leave(study, error)
                break
        else:
            if open_studies.done():
                return
            # Others run what is left. They may die, and then it is ours.
            interrupted.wait(IDLE_SECONDS)


@dataclass(frozen=True, kw_only=True)
class _Left:
    """A study that is left to other workers."""

    why: str
    until: float  # by the monotonic clock


class _OpenStudies:
    """The studies that trials are taken from, oldest first: those that were named, or whatever is there."""

    def __init__(
        self, names: Sequence[str] | None, storage: PatientStorage, settings: Settings, *, leave: bool
    ) -> None:
        self._storage, self._settings = storage, settings
        self._names, self._leave = names, leave
        self._lock = threading.Lock()  # the slots' threads look one after another
        self._looked = float("-inf")
        self._studies: list[Study] = []
        self._admitted: dict[tuple[int, str | None], Study] = {}
        self._left: dict[tuple[int, str | None], _Left] = {}
        self._ended: set[ledger.Study] = set()  # whose budget is spent: a larger one makes another entry
        self._gone: set[str] = set()  # of those that were named, which were deleted

    def now(self) -> list[Study]:
        """Those that may have something to do."""
        with self._lock:
            if time.monotonic() - self._looked >= IDLE_SECONDS:
                self._studies = self._look()
                self._looked = time.monotonic()
            return list(self._studies)

    def done(self) -> bool:
        """Whether nothing will come: all have ended or are paused. Never, where studies are waited for."""
        if self._names is None:
            return False
        with self._lock:
            return not self._look()

    def leave(self, study: Study, error: MachineError) -> None:
        """Leaves `study` to other workers for a while, and says why. Raises `error` where it was named."""
        if not self._leave:
            raise error
        key = (study.study_id, study.incarnation)
        with self._lock:
            if self._admitted.pop(key, None) is not None:  # else another slot was first
                checks.check_keras.cache_clear()
                self._studies = [other for other in self._studies if (other.study_id, other.incarnation) != key]
                self._leave_for_now(key, study.name, error)

    def _leave_for_now(self, key: tuple[int, str | None], name: str, error: TrialyardError) -> None:
        before = self._left.get(key)
        if before is None or before.why != str(error):
            log.warning("study %s is left to other workers: %s", name, error)
        self._left[key] = _Left(why=str(error), until=time.monotonic() + LEFT_SECONDS)

    def _look(self) -> list[Study]:
        found = []
        standing = {entry.name: entry for entry in ledger.studies(self._storage)}
        for name in standing if self._names is None else self._names:
            if name not in standing:
                if name not in self._gone:
                    log.warning("study %s was deleted, or is not readable: this worker goes on with the others", name)
                self._gone.add(name)
                continue
            entry = standing[name]
            if entry.state != "open" or self._has_ended(entry):
                continue
            key = (entry.id, entry.incarnation)
            left = self._left.get(key)
            if key not in self._admitted and left is not None and time.monotonic() < left.until:
                continue
            try:
                study = self._admitted.get(key) or self._admit(name, *key)
            except (StudyError, StudyGone, KeyError):
                if name in registry.names(self._storage):
                    raise
                continue  # deleted while it was looked at
            if study is not None:
                self._admitted[key] = study
                found.append(study)
        return found

    def _has_ended(self, entry: ledger.Study) -> bool:
        if entry in self._ended:
            return True
        ended = ledger.has_ended(self._storage, entry.id)
        # It may have been stopped since the entry was read, and can be resumed; what is spent stays spent.
        if ended and ledger.counts(self._storage, entry.id).finished >= entry.budget.total:
            self._ended.add(entry)
        return ended

    def _admit(self, name: str, study_id: int, incarnation: str | None) -> Study | None:
        # One study that this machine cannot serve must not keep it from the others: its definition may be of a later
        # version. Those that were named have been looked at already.
        try:
            definition = registry.definition_of(name, self._storage)
            if self._leave and not _is_done(self._storage, study_id):
                check_fit(name, self._storage, self._settings)
        except StorageError as error:
            if not isinstance(error, StudyUnreadable):
                raise
            self._leave_for_now((study_id, incarnation), name, error)
            return None
        except TrialyardError as error:
            if name not in registry.names(self._storage):
                raise  # deleted a moment ago
            if not self._leave:
                raise
            self._leave_for_now((study_id, incarnation), name, error)
            return None
        return Study(
            name=name,
            study_id=study_id,
            incarnation=incarnation,
            definition=definition,
            storage=self._storage,
            # One each: Optuna's would give the finished trials of a deleted study that had the same number.
            cached=optuna.storages.get_storage(self._storage),
        )


def _is_done(storage: PatientStorage, study_id: int) -> bool:
    return ledger.has_ended(storage, study_id) or ledger.state(storage, study_id) != "open"


@contextmanager
def _signals(interrupted: threading.Event) -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into `interrupted`, and leaves at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone: somebody else handles them
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            os._exit(130)  # the trainers notice and end; the next claim takes the trials back
        log.warning("%s: ending the running batches; once more to leave at once", signal.Signals(number).name)
        interrupted.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
