"""The studies that a worker takes trials from: which are open, which this machine can train, and whose turn it is."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from search import checks
from search.attempt import StudyHandle
from search.devices import Slot, common_precision
from search.errors import MachineError
from storage import ledger
from storage.errors import DiskError, StorageError, StudyUnreadable, TrialyardError
from storage.ledger import Study
from storage.settings import Settings
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import definition as definitions
from studies import registry
from studies.definition import Definition
from studies.wording import one_line

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # for how long the list of open studies is not read again
WAIT_SECONDS = 1.0  # for how long free slots wait for the checks of new studies: most of them take a moment
CHECKS = 2  # studies that are checked at once: each check may take the memory of a trainer
RETRY_SECONDS = 300.0  # between two looks at a study that this machine cannot train: somebody may have repaired it


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


def _key(study: Study) -> tuple[int, str]:
    return study.id, study.incarnation


@dataclass(frozen=True, kw_only=True)
class _PassedOver:
    """A study that is left to other workers for a while."""

    reason: str
    until: float  # by the monotonic clock
    could_train: bool  # this worker has trained it before, so what keeps it from it may pass


class OpenStudies:
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
        share: bool,
        interrupted: threading.Event | None = None,
        around_check: Callable[[], AbstractContextManager[None]] = nullcontext,
        found_something: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage, self._settings, self._slots = storage, settings, slots
        self._names, self._shares = names, share
        self._interrupted = interrupted or threading.Event()
        self._around_check, self._found_something = around_check, found_something
        self._lock = threading.RLock()  # the slots' threads look one after another
        self._checked = threading.Condition(self._lock)
        self._looked = float("-inf")
        self._open: list[Study] = []  # as the last look saw them
        # By id and incarnation: a later study of the same name is another one, and so is a copy under another name.
        self._admitted: dict[tuple[int, str], StudyHandle] = {}
        self._passed_over: dict[tuple[int, str], _PassedOver] = {}
        self._gone: set[str] = set()  # names of those that were named and deleted
        # The named ones that the caller has checked: those of the first look. None: there was none yet.
        self._checked_before: set[tuple[int, str]] | None = None
        self._to_check: deque[Study] = deque()
        self._checking: set[tuple[int, str]] = set()
        self._wait_until = float("-inf")  # for checks that have just begun
        self._error: Exception | None = None  # of a check: the database's
        self._read: dict[tuple[int, str], Study] = {}  # as the last look saw them; a handle's is that of its admission
        # Of its own: a look waits for the database, and a slot that has claimed a trial must not wait for it.
        self._counting = threading.Lock()
        # By id and incarnation: the trials that this worker has claimed since the last look, and in which order it
        # served the studies.
        self._claimed: Counter[tuple[int, str]] = Counter()
        self._served: dict[tuple[int, str], int] = {}
        self._trained: set[tuple[int, str]] = set()  # those of which a trial ended well here, since the last refusal

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
            return self._share(handles) if self._shares else handles

    def all_checked(self) -> bool:
        """Whether no study is being checked that may have something to do, too."""
        with self._lock:
            return not self._checking and not self._to_check

    def served(self, study: Study) -> None:
        """This worker has claimed a trial of `study`."""
        with self._counting:
            self._claimed[_key(study)] += 1
            self._served[_key(study)] = max(self._served.values(), default=0) + 1

    def trained(self, study: Study) -> None:
        """An attempt at a trial of `study` has ended here without a fault of this machine."""
        with self._counting:
            self._trained.add(_key(study))

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
        """Whether nothing will come: all have ended or are paused. Never, where studies are waited for.

        One that this worker could train before is tried once more, after RETRY_SECONDS.
        """
        if self._names is None:
            return False
        with self._lock:
            self._look()
            tried_again = any(left.could_train or key in self._trained for key, left in self._passed_over.items())
            return not self._open and not tried_again

    def pass_over(self, study: Study, error: MachineError) -> None:
        """Leaves `study` to other workers for a while, and says why. Raises `error` if it was named."""
        if not self._shares:
            checks.forget_keras()
            raise error
        with self._lock:
            if self._admitted.pop(_key(study), None) is not None:  # else another slot was first
                checks.forget_keras()
                self._pass_over_for_now(study, error)

    def _pass_over_for_now(self, study: Study, error: Exception) -> None:
        reason = str(error) if isinstance(error, TrialyardError) else f"{type(error).__name__}: {one_line(error, 300)}"
        with self._lock:
            key = _key(study)
            before = self._passed_over.get(key)
            with self._counting:
                could_train = key in self._trained
                self._trained.discard(key)
            until = time.monotonic() + RETRY_SECONDS
            self._passed_over[key] = _PassedOver(reason=reason, until=until, could_train=could_train)
            self._open = [other for other in self._open if _key(other) != _key(study)]
        if (before is None or before.reason != reason) and not self._interrupted.is_set():
            log.warning("study %s is left to other workers: %s", study.name, reason)

    def _look(self) -> None:
        """Reads which studies are open, and has the new ones checked."""
        with self._counting:
            self._claimed.clear()
        existing = {study.name: study for study in ledger.studies(self._storage)}
        if self._checked_before is None:
            self._checked_before = {_key(study) for study in existing.values()}
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
                self._passed_over.pop(key, None)
                continue
            left = self._passed_over.get(key)
            if key not in self._admitted and left is not None and time.monotonic() < left.until:
                continue
            self._read[key] = study
            self._open.append(study)
            if key not in self._admitted and key not in self._checking:
                new.append(study)
        if self._shares:
            # Those that were never refused first: the check of another one may take long again.
            self._check(sorted(new, key=lambda study: _key(study) in self._passed_over))
            return
        for study in new:
            if _key(study) in self._checked_before:
                self._admit_if_it_exists(study)
        self._check([study for study in new if _key(study) not in self._checked_before])

    def _forget_all_but(self, keys: set[tuple[int, str]]) -> None:
        """Drops what is known of studies that were deleted: a worker may run for months."""
        tables: list[dict[tuple[int, str], Any]] = [self._admitted, self._passed_over, self._read]
        for table in tables:
            for key in table.keys() - keys:
                del table[key]
        with self._counting:
            self._served = {key: turn for key, turn in self._served.items() if key in keys}
            self._trained &= keys

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
        # version. Those that were named have been checked already, unless one was deleted and made again since.
        try:
            definition = (
                check_fit(study, self._storage, self._settings, self._interrupted)
                if self._shares or _key(study) not in (self._checked_before or ())
                else definitions.from_json(study.definition)
            )
        except StorageError as error:
            # Of this study, or of a file of this machine; else the database's.
            if not isinstance(error, StudyUnreadable) and not (isinstance(error, DiskError) and self._shares):
                raise
            self._pass_over_for_now(study, error)
            return None
        except TrialyardError as error:
            if self._interrupted.is_set():
                return None  # the check was stopped
            if not self._shares or not self._exists(study):
                raise
            self._pass_over_for_now(study, error)
            return None
        except Exception as error:  # reading its images runs code of libraries, and of its users
            if not self._shares or isinstance(error, (OptunaError, SQLAlchemyError)) or not self._exists(study):
                raise
            log.debug("the whole error", exc_info=error)
            self._pass_over_for_now(study, error)
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
