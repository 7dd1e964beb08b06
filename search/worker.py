"""A worker machine: for each slot, claim -> attempt -> outcome, until the studies are done or a signal comes."""

import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from search import checks
from search.attempt import Attempt, StudyHandle
from search.devices import Slot, common_precision
from search.errors import AcceleratorError, DeviceError, MachineError
from search.heartbeat import Heartbeat
from search.idle import FIRST_SECONDS, Looks
from search.interruption import INTERRUPTED, STOPPING_SIGNALS
from search.limits import Limits
from search.progress import Listener
from search.publisher import Publisher
from search.trainer import Trainer
from storage import claims, ledger
from storage.claims import Claim
from storage.errors import DiskError, StorageError, StudyGone, StudyUnreadable, TrialyardError
from storage.ledger import Study
from storage.settings import Settings
from storage.slots import present
from storage.transactions import PatientStorage, read
from storage.trial_cache import TrialCache
from studies import definition as definitions
from studies import registry
from studies.definition import Definition
from studies.wording import one_line

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # for how long the list of open studies is not read again
WAIT_SECONDS = 1.0  # for how long free slots wait for the checks of new studies: most of them take a moment
CHECKS = 2  # studies that are checked at once: each check may take the memory of a trainer
TICK_SECONDS = 0.2
LEFT_SECONDS = 300.0  # between two looks at a study that this machine cannot train: somebody may have repaired it
SILENT_SECONDS = 60.0  # since the last heartbeat of a worker that is taken for living
LEAVE_SECONDS = 5.0  # beyond the trainers' own time: for the last words to the database, and once more to end


def work(
    names: Sequence[str] | None,
    storage: PatientStorage,
    settings: Settings,
    slots: Sequence[Slot],
    listeners: Sequence[Listener] = (),
    *,
    leave: bool = False,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> bool:
    """Fills `slots` with trials of the studies `names`, the first study first; None: of all studies, for ever.

    Where `leave` is true or `names` is None, nobody named the studies: they share the slots (`_OpenStudies._share`). A
    study that this machine cannot train is then left to other workers with a warning, and checked again every
    LEFT_SECONDS. Otherwise it ends the work: the caller has called `check_fit` before.

    A slot that cannot train, because its device fails or the disk is full, is closed and tried again after
    LEFT_SECONDS, while the others go on. Raises its error (DeviceError, DiskError) once all slots are closed, unless
    `names` is None.

    Returns True when all of them have ended or are paused, or the `limits` are reached: then the trials that run are
    put back into the queue with a checkpoint. Returns False when a signal ended the work: the first of the
    STOPPING_SIGNALS has the trainers write a checkpoint and puts their trials back into the queue; a second SIGINT or
    SIGTERM leaves at once. `stop` does the same as the first: whoever gives it also chose the GPUs of all slots.
    """
    interrupted = stop or threading.Event()
    errors: list[BaseException] = []
    looks, limits = Looks(), limits or Limits()
    open_studies = _OpenStudies(
        names,
        storage,
        settings,
        slots,
        leave=leave or names is None,
        interrupted=interrupted,
        around_check=limits.looking,
        found_something=looks.found_something,
    )
    heartbeat = Heartbeat(storage, settings.beat_seconds, slots)
    closed_slots = _ClosedSlots(heartbeat, open_studies, len(slots), forever=names is None)
    all_listeners = [Publisher(storage, settings.artifact_store), *listeners]

    def fill(slot: Slot, trainer: Trainer) -> None:
        try:
            _fill(open_studies, settings, trainer, heartbeat, all_listeners, interrupted, closed_slots, looks, limits)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            if not storage.shutting_down.is_set():  # then every call to the database ends in an error
                errors.append(error)
            interrupted.set()

    if stop is None:
        _warn_of_shared_gpus(storage, slots)
    with ExitStack() as stack:
        trainers = [stack.enter_context(_trainer(slot, settings)) for slot in slots]
        threads = [
            threading.Thread(target=fill, args=pair, name=pair[0].name, daemon=True)
            for pair in zip(slots, trainers, strict=True)
        ]
        received = stack.enter_context(stopping_signals(interrupted))
        for listener in all_listeners:
            stack.enter_context(listener)
        stack.enter_context(heartbeat)
        limits.start_idle()
        for thread in threads:
            thread.start()
        leave_at, over_limit = float("inf"), False
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(TICK_SECONDS)
            reason = None if interrupted.is_set() else limits.over(storage.last_away)
            if reason is not None:
                log.warning("%s: this worker ends", reason)
                over_limit = True
                interrupted.set()
            if interrupted.is_set() and leave_at == float("inf"):
                leave_at = time.monotonic() + settings.stop_seconds + LEAVE_SECONDS
                for number in received:
                    name = signal.Signals(number).name
                    log.warning("%s: ending the running batches; once more to leave at once", name)
                # From here: a slot's own thread may be waiting for a database that is away.
                for trainer in trainers:
                    trainer.stop("keep")
            if time.monotonic() > leave_at:
                # Their trials stay RUNNING: they are taken back as those of a process that ended, and go on from
                # their checkpoints.
                storage.shutting_down.set()
                break
        end_by = time.monotonic() + LEAVE_SECONDS
        for thread in threads:
            thread.join(max(0.0, end_by - time.monotonic()))
    if errors:
        raise errors[0]
    return not interrupted.is_set() or (over_limit and not received)


def _warn_of_shared_gpus(storage: PatientStorage, slots: Sequence[Slot]) -> None:
    """Warns if a living process of this machine has slots on the same GPUs: each may take the memory of a whole one."""
    ours = {slot.gpu for slot in slots if slot.device.kind == "gpu"}
    for other in read(storage, present):
        near = other.host == socket.gethostname() and other.silent_seconds <= SILENT_SECONDS
        gpu = re.match(r"gpu:\d+(\.mig\d+)?", other.slot)
        if near and other.pid != os.getpid() and gpu is not None and gpu[0] in ours:
            log.warning(
                "process %d of this machine has the slot %s on the same GPU: give each worker GPUs of its own with "
                "--devices, or start one worker with --per-device",
                *(other.pid, other.slot),
            )


def check_fit(
    study: Study, storage: PatientStorage, settings: Settings, stop: threading.Event | None = None
) -> Definition:
    """Raises a TrialyardError with the reason, unless this machine can train `study` with its data and software.

    What the database tells comes first: the rest may take minutes, and ends when `stop` is set. A study without trials
    takes the software of the first machine as its own, so that is recorded last. Returns the study's definition.
    """
    definition = definitions.from_json(study.definition)
    registry.check_direction(study, storage)
    if study.software is not None:
        registry.check_software(study, storage, checks.software())
    checked = checks.check(definition, settings, stop=stop)
    registry.check_data(study, checked.data)
    registry.check_software(study, storage, checks.software() | checked.sources)
    return definition


def _trainer(slot: Slot, settings: Settings) -> Trainer:
    return Trainer(slot, settings.trainer_log(slot.name, os.getpid()), settings.memory_growth)


def _fill(
    open_studies: "_OpenStudies",
    settings: Settings,
    trainer: Trainer,
    heartbeat: Heartbeat,
    listeners: Sequence[Listener],
    interrupted: threading.Event,
    closed_slots: "_ClosedSlots",
    looks: Looks,
    limits: Limits,
) -> None:
    """One slot's loop."""
    owner = heartbeat.owner(trainer.slot)
    while not interrupted.is_set():
        if not looks.mine():
            interrupted.wait(TICK_SECONDS)
            continue
        with limits.looking():
            found = open_studies.now()
            in_time = [handle for handle in found if limits.has_time_for(handle)]
        for handle in in_time:
            try:
                with limits.looking():
                    claim = claims.claim(
                        handle.storage, handle.study, owner, settings.grace_seconds, settings.beat_seconds
                    )
            except (StudyGone, StudyUnreadable):
                continue  # deleted or overwritten a moment ago; the next look will not find it
            if claim is not None:
                looks.found_something()
                try:
                    with limits.busy(), heartbeat.of(claim) as pulse:
                        open_studies.served(handle.study)
                        Attempt(
                            handle,
                            claim,
                            trainer,
                            settings,
                            pulse=pulse,
                            listeners=listeners,
                            interrupted=interrupted,
                        ).run()
                except MachineError as error:
                    open_studies.leave(handle.study, error)
                except (DeviceError, DiskError) as error:
                    looks.found_something()  # the trial waits again, for the slots that are open
                    closed_slots.close(trainer.slot, claim, error, interrupted)
                else:
                    closed_slots.forget_suspicion(trainer.slot)
                looks.found_something()  # the trial may wait again
                break
        else:
            if open_studies.done() or (found and not in_time and open_studies.all_checked()):
                looks.found_something()  # the other slots end, too
                return
            # Others run what is left. They may die, and then it is ours.
            looks.found_nothing()


class _ClosedSlots:
    """The slots of this worker that cannot train at the moment."""

    def __init__(self, heartbeat: Heartbeat, open_studies: "_OpenStudies", slots: int, *, forever: bool) -> None:
        self._heartbeat, self._open_studies = heartbeat, open_studies
        self._slots, self._forever = slots, forever
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._suspects: dict[str, int] = {}  # by slot, the trial in which its accelerator failed last

    def close(self, slot: Slot, claim: Claim, error: DeviceError | DiskError, interrupted: threading.Event) -> None:
        """Closes `slot` for LEFT_SECONDS, or until nothing is left to do. Raises `error` if no other slot is open.

        If the trial may be to blame, the last open slot stays open until another trial ends so, too.
        """
        with self._lock:
            is_last = len(self._names) == self._slots - 1
            if is_last and isinstance(error, AcceleratorError):
                suspect = self._suspects.setdefault(slot.name, claim.trial_id)
                if suspect == claim.trial_id:
                    return
            if is_last and not self._forever:
                raise error
            self._names.add(slot.name)
        log.warning("slot %s is closed, and tried again in %.0f s: %s", slot.name, LEFT_SECONDS, error)
        self._heartbeat.close(slot, str(error))
        until = time.monotonic() + LEFT_SECONDS
        while time.monotonic() < until and not interrupted.is_set():
            if not self._open_studies.now() and self._open_studies.done():
                return
            interrupted.wait(FIRST_SECONDS)
        self._heartbeat.reopen(slot)
        with self._lock:
            self._names.remove(slot.name)
            self._suspects.pop(slot.name, None)

    def forget_suspicion(self, slot: Slot) -> None:
        """A trial has ended well on `slot`, or was interrupted: its device works."""
        with self._lock:
            self._suspects.pop(slot.name, None)


def _key(study: Study) -> tuple[int, str]:
    return study.id, study.incarnation


@dataclass(frozen=True, kw_only=True)
class _Left:
    """A study that is left to other workers."""

    reason: str
    until: float  # by the monotonic clock


class _OpenStudies:
    """The studies that trials are taken from: those that were named, in this order, or all, which share the slots.

    Where nobody named them, each is checked once before its first trial, by threads of its own: that may take minutes,
    and the slots go on with the other studies meanwhile.
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        storage: PatientStorage,
        settings: Settings,
        slots: Sequence[Slot],
        *,
        leave: bool,
        interrupted: threading.Event | None = None,
        around_check: Callable[[], AbstractContextManager[None]] = nullcontext,
        found_something: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage, self._settings, self._slots = storage, settings, slots
        self._names, self._leave = names, leave
        self._interrupted = interrupted or threading.Event()
        self._around_check, self._found_something = around_check, found_something
        self._lock = threading.RLock()  # the slots' threads look one after another
        self._checked = threading.Condition(self._lock)
        self._looked = float("-inf")
        self._open: list[Study] = []  # as the last look saw them
        # By id and incarnation: a later study of the same name is another one, and so is a copy under another name.
        self._admitted: dict[tuple[int, str], StudyHandle] = {}
        self._left: dict[tuple[int, str], _Left] = {}
        self._gone: set[str] = set()  # names of those that were named and deleted
        self._to_check: deque[Study] = deque()
        self._checking: set[tuple[int, str]] = set()
        self._wait_until = float("-inf")  # for checks that have just begun
        self._error: Exception | None = None  # of a check: the database's
        # By id and incarnation: the trials that this worker has claimed since the last look, and in which order it
        # served the studies.
        self._read: dict[tuple[int, str], Study] = {}  # as the last look saw them; a handle's is that of its admission
        # Of its own: a look waits for the database, and a slot that has claimed a trial must not wait for it.
        self._counting = threading.Lock()
        self._claimed: Counter[tuple[int, str]] = Counter()
        self._served: dict[tuple[int, str], int] = {}

    def now(self) -> list[StudyHandle]:
        """Those that may have something to do, in the order in which a free slot is to ask them."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._look()
                self._looked = time.monotonic()
            self._checked.wait_for(self.all_checked, timeout=max(0.0, self._wait_until - time.monotonic()))
            if self._error is not None:
                raise self._error
            handles = [self._admitted[_key(study)] for study in self._open if _key(study) in self._admitted]
            return self._share(handles) if self._leave else handles

    def all_checked(self) -> bool:
        """Whether no study is being checked that may have something to do, too."""
        with self._lock:
            return not self._checking and not self._to_check

    def served(self, study: Study) -> None:
        """This worker has claimed a trial of `study`."""
        with self._counting:
            self._claimed[_key(study)] += 1
            self._served[_key(study)] = max(self._served.values(), default=0) + 1

    def _share(self, handles: Sequence[StudyHandle]) -> list[StudyHandle]:
        """The studies of the highest priority first; of these the one that the fewest slots train for.

        Of several, the one that this worker has served least recently: with fewer slots than studies they take turns. A
        worker that has served none of them takes the one with the fewest finished trials, then the oldest. All of it is
        known from the look at the open studies, and what other workers claimed since then counts at the next one.
        """

        def rank(handle: StudyHandle) -> tuple[int, int, int, int, int]:
            study = self._read[_key(handle.study)]
            slots = study.running + self._claimed[_key(study)]
            own = study.finished - study.budget.imported
            return -study.priority, slots, self._served.get(_key(study), 0), own, study.id

        return sorted(handles, key=rank)

    def done(self) -> bool:
        """Whether nothing will come: all have ended or are paused. Never, where studies are waited for."""
        if self._names is None:
            return False
        with self._lock:
            self._look()
            return not self._open

    def leave(self, study: Study, error: MachineError) -> None:
        """Leaves `study` to other workers for a while, and says why. Raises `error` if it was named."""
        if not self._leave:
            checks.forget_keras()
            raise error
        with self._lock:
            if self._admitted.pop(_key(study), None) is not None:  # else another slot was first
                checks.forget_keras()
                self._leave_for_now(study, error)

    def _leave_for_now(self, study: Study, error: Exception) -> None:
        reason = str(error) if isinstance(error, TrialyardError) else f"{type(error).__name__}: {one_line(error, 300)}"
        with self._lock:
            before = self._left.get(_key(study))
            self._left[_key(study)] = _Left(reason=reason, until=time.monotonic() + LEFT_SECONDS)
            self._open = [other for other in self._open if _key(other) != _key(study)]
        if (before is None or before.reason != reason) and not self._interrupted.is_set():
            log.warning("study %s is left to other workers: %s", study.name, reason)

    def _look(self) -> None:
        """Reads which studies are open, and has the new ones checked."""
        with self._counting:
            self._claimed.clear()
        existing = {study.name: study for study in ledger.studies(self._storage)}
        self._forget_all_but({_key(study) for study in existing.values()})
        self._open, new = [], []
        for name in existing if self._names is None else self._names:
            if name not in existing:
                if name not in self._gone:
                    log.warning("study %s was deleted, or is not readable: this worker goes on with the others", name)
                self._gone.add(name)
                continue
            study = existing[name]
            key = _key(study)
            if study.state != "open" or study.has_ended:
                self._admitted.pop(key, None)  # its cached trials take memory
                continue
            left = self._left.get(key)
            if key not in self._admitted and left is not None and time.monotonic() < left.until:
                continue
            self._read[key] = study
            self._open.append(study)
            if key not in self._admitted and key not in self._checking:
                new.append(study)
        if self._leave:
            # Those that were never refused first: the check of another one may take long again.
            self._check(sorted(new, key=lambda study: _key(study) in self._left))
        else:
            for study in new:  # it was checked before the work began
                self._admit_if_it_exists(study)

    def _forget_all_but(self, keys: set[tuple[int, str]]) -> None:
        """Drops what is known of studies that were deleted: a worker may run for months."""
        tables: list[dict[tuple[int, str], Any]] = [self._admitted, self._left, self._read]
        for table in tables:
            for key in table.keys() - keys:
                del table[key]
        with self._counting:
            self._served = {key: turn for key, turn in self._served.items() if key in keys}

    def _check(self, new: Sequence[Study]) -> None:
        """Has `new` studies checked by other threads."""
        waited_for = {_key(study) for study in self._to_check}
        self._to_check = deque(new)
        if waited_for >= {_key(study) for study in new}:
            return  # threads are busy with others
        self._wait_until = time.monotonic() + WAIT_SECONDS
        for _ in range(min(CHECKS - len(self._checking), len(new))):
            # Reserved for the thread here, so that no more of them start than CHECKS.
            study = self._to_check.popleft()
            self._checking.add(_key(study))
            threading.Thread(target=self._check_some, args=(study,), name="check", daemon=True).start()

    def _check_some(self, study: Study | None) -> None:
        """A thread's work: checks `study`, and then others as long as there are any."""
        while study is not None:
            try:
                with self._around_check():
                    self._admit_if_it_exists(study)
            except Exception as error:  # noqa: BLE001 - carried to the slots' threads, which raise it
                self._error = error
            with self._lock:
                self._checking.discard(_key(study))
                over = not self._to_check or self._interrupted.is_set() or self._error is not None
                study = None if over else self._to_check.popleft()
                if study is not None:
                    self._checking.add(_key(study))
                self._checked.notify_all()
            self._found_something()

    def _admit_if_it_exists(self, study: Study) -> None:
        try:
            handle = self._admit(study)
        except (TrialyardError, KeyError):
            if self._exists(study):
                raise
            return  # deleted while it was looked at
        if handle is not None:
            self._admitted[_key(study)] = handle

    def _exists(self, study: Study) -> bool:
        return any(_key(study) == _key(other) for other in ledger.studies(self._storage))

    def _admit(self, study: Study) -> StudyHandle | None:
        # One study that this machine cannot serve must not keep it from the others: its definition may be of a later
        # version. Those that were named have been looked at already.
        try:
            definition = (
                check_fit(study, self._storage, self._settings, self._interrupted)
                if self._leave
                else definitions.from_json(study.definition)
            )
        except StorageError as error:
            if not isinstance(error, StudyUnreadable):
                raise
            self._leave_for_now(study, error)
            return None
        except TrialyardError as error:
            if not self._leave or not self._exists(study):
                raise
            self._leave_for_now(study, error)
            return None
        except Exception as error:  # reading its images runs code of libraries, and of its users
            if not self._leave or isinstance(error, (OptunaError, SQLAlchemyError)) or not self._exists(study):
                raise
            log.debug("the whole error", exc_info=error)
            self._leave_for_now(study, error)
            return None
        return StudyHandle(
            study=study,
            definition=definition,
            storage=self._storage,
            # Read again: a study without trials has taken over this machine's.
            sources=registry.sources(ledger.find(self._storage, study.name)),
            precision=ledger.record_precision(
                self._storage,
                study,
                common_precision(self._slots, definition.precision, own_model=definition.has_own_model),
            ),
            # One each: Optuna's would give the finished trials of a deleted study that had the same number.
            cached=TrialCache(self._storage),
        )


@contextmanager
def stopping_signals(interrupted: threading.Event) -> Iterator[list[int]]:
    """Turns the first of the STOPPING_SIGNALS into `interrupted`, and leaves at the second; yields the list of it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python gives signals to the main thread alone: somebody else handles them
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            if number in (signal.SIGHUP, signal.SIGUSR1):
                return  # a terminal that is closed sends it twice, and a scheduler to every process
            os._exit(INTERRUPTED)  # the trainers notice and end; the next claim takes the trials back
        # It logs nothing: the signal may come in the middle of a line of the log.
        received.append(number)
        interrupted.set()

    # `nohup` has SIGHUP ignored, so that a worker outlives its terminal.
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in STOPPING_SIGNALS if number != signal.SIGHUP or not outlives]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
