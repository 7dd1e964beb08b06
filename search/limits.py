"""When a worker ends by itself: after its minutes, or when there was nothing to do for long enough."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from search.attempt import StudyHandle
from search.errors import WorkerError
from search.summary import duration
from storage import attempt_table, queue
from storage.errors import StudyGone
from storage.transactions import read

log = logging.getLogger(__name__)

LAST_TRIALS = 10  # of a study, whose epochs say how long the next ones take


class Limits:
    """The time of one worker, for the threads of all its slots; it starts when this object is made.

    A copy that another process gets by pickle has the same end, by that machine's own clock. A worker is idle from the
    moment at which its slots start to look for work.

    Raises WorkerError unless `minutes` and `idle_minutes` are None, which is no limit, or a positive number.
    """

    def __init__(self, minutes: float | None = None, idle_minutes: float | None = None) -> None:
        for name, value in (("minutes", minutes), ("idle-minutes", idle_minutes)):
            if value is not None and not 0 < value < math.inf:
                raise WorkerError(
                    f"--{name} = {value:g} must be a finite number greater than 0: correct it, or leave it out"
                )
        self._lock = threading.Lock()
        self._minutes, self._idle_minutes = minutes, idle_minutes
        self._end = math.inf if minutes is None else monotonic() + minutes * 60
        self._end_time = math.inf if minutes is None else time.time() + minutes * 60  # for copies alone: clocks are set
        self._busy = 0  # slots that have a trial
        self._idle_since = monotonic()
        self._looking = 0  # slots that look for work
        self._look_began = 0.0  # of the first of them
        self._warned: set[str] = set()

    def start_idle(self) -> None:
        """The slots start to look for work: what came before, such as waiting for the database, was not idle."""
        self._idle_since = monotonic()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Around a look for work: its time is not idle, because it may check a study, or wait for a study's lock."""
        with self._lock:
            self._looking += 1
            if self._looking == 1:
                self._look_began = monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._looking -= 1
                if not self._looking:
                    now = monotonic()
                    self._idle_since = min(now, self._idle_since + now - self._look_began)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around a trial: the worker is not idle meanwhile."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._idle_since = monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether a slot has a trial."""
        with self._lock:
            return self._busy > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy, (self._minutes, self._idle_minutes, self._end_time)

    @property
    def are_set(self) -> bool:
        """Whether there is any limit."""
        return self._minutes is not None or self._idle_minutes is not None

    @property
    def idle_seconds(self) -> float:
        """How long a worker may have nothing to do."""
        return math.inf if self._idle_minutes is None else 60 * self._idle_minutes

    def minutes_are_over(self) -> bool:
        """Whether the minutes, if there are any, are over."""
        return monotonic() >= self._end

    def over(self, last_away: float = -math.inf) -> str | None:
        """Why the worker ends now, in words; None: it goes on.

        `last_away` is when the database was away last, by the monotonic clock: what there is to do was not known then.
        """
        if self.minutes_are_over():
            return f"the {self._minutes:g} minutes of --minutes have passed"
        with self._lock:
            now = self._look_began if self._looking else monotonic()
            idle = 0.0 if self._busy else now - max(self._idle_since, last_away)
        if self._idle_minutes is not None and idle >= self._idle_minutes * 60:
            return f"there was nothing to do for the {self._idle_minutes:g} minutes of --idle-minutes"
        return None

    def has_time_for(self, handle: StudyHandle) -> bool:
        """Whether the next trial of a study can end in time; also true where no trial has shown how long one takes."""
        if self._end == math.inf:
            return True
        study_id, budget = handle.study.id, handle.definition.budget
        epoch_seconds = read(
            handle.storage, lambda connection: attempt_table.epoch_seconds(connection, study_id, LAST_TRIALS)
        )
        if epoch_seconds is None:
            return True
        try:
            done = queue.epochs_of_next(handle.storage, handle.study)
        except StudyGone:
            return True  # the claim will notice it
        seconds, left = (budget.epochs * budget.repeats - done) * epoch_seconds, self._end - monotonic()
        if seconds > left and handle.study.name not in self._warned:
            self._warned.add(handle.study.name)
            log.warning(
                "study %s: its next trial takes about %s, and %s are left of --minutes %g: it is left to other workers",
                *(handle.study.name, duration(seconds), duration(max(0.0, left)), self._minutes),
            )
        return seconds <= left


def _copy(minutes: float | None, idle_minutes: float | None, end_time: float) -> Limits:
    limits = Limits(minutes, idle_minutes)
    limits._end = monotonic() + end_time - time.time()
    limits._end_time = end_time
    return limits
