"""How long this process has watched the running attempts of others without a new heartbeat.

A heartbeat is taken as a value that changes, not as a time. So nobody is dead because the database's clock was set, or
because the machine slept: both stop every heartbeat, and the watcher's own monotonic clock, which stops while the
machine sleeps, has counted nothing meanwhile.

A process that was stopped (a paused container, SIGSTOP) has watched nobody meanwhile, though its monotonic clock went
on: the others may have been stopped with it. So a worker's heartbeat shows that this process runs, too (`watching`).
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic

from storage.attempt_table import Attempt

Key = tuple[int, int]  # the id of a trial, and the attempt at it


@dataclass(frozen=True, kw_only=True)
class _Look:
    """The first look at a heartbeat."""

    beat: datetime
    at: float  # by the monotonic clock


class _Watch:
    """Calls at a steady interval; where they did not come, this process was stopped."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._called = seconds, monotonic()
        self._stopped_until = float("-inf")

    def runs(self) -> None:
        """Notes a call."""
        self._stopped_until = self.stopped_until()
        self._called = monotonic()

    def stopped_until(self) -> float:
        """When this process was stopped last, by the monotonic clock; now, if calls are missing now."""
        now = monotonic()
        return now if now - self._called > MISSED_CALLS * self._seconds else self._stopped_until


MISSED_CALLS = 3  # one may take long: the database is busy
# By a study's incarnation, which no other database has, and its id: a copy in the same database has its incarnation.
_looks: dict[tuple[str, int], dict[Key, _Look]] = {}
_watches: list[_Watch] = []
_lock = threading.Lock()  # a worker's slots look at the same time


@contextmanager
def watching(seconds: float) -> Iterator[Callable[[], None]]:
    """While the block runs, what it yields must be called every `seconds`. While it is not, nobody was watched."""
    watch = _Watch(seconds)
    with _lock:
        _watches.append(watch)
    try:
        yield watch.runs
    finally:
        with _lock:
            _watches.remove(watch)


def watched_seconds(
    study: tuple[str, int], running: Iterable[tuple[int, Attempt]], not_before: float
) -> dict[Key, float]:
    """For how many seconds this process has seen the same last heartbeat of each running attempt of a study.

    `study` is its incarnation and its id. `running` is every running attempt with its trial's id, as read just now:
    what was seen before is compared with it and then replaced. A look before `not_before`, by the monotonic clock, does
    not count.
    """
    now = monotonic()
    with _lock:
        not_before = max([not_before, *(watch.stopped_until() for watch in _watches)])
        before = _looks.get(study, {})
        looks = {}
        for trial_id, attempt in running:
            key = trial_id, attempt.attempt
            look = before.get(key)
            if look is None or look.beat != attempt.beat or look.at < not_before:
                look = _Look(beat=attempt.beat, at=now)
            looks[key] = look
        _looks[study] = looks
    return {key: now - look.at for key, look in looks.items()}
