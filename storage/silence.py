"""How long this process has watched the running attempts of others without a new heartbeat.

A heartbeat is taken as a value that changes, not as a time. So nobody is dead because the database's clock was set, or
because the machine slept: both stop every heartbeat, and the watcher's own monotonic clock, which stops while the
machine sleeps, has counted nothing meanwhile.
"""

import threading
from collections.abc import Iterable
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


_looks: dict[str, dict[Key, _Look]] = {}  # by the study's incarnation, which no other database has
_lock = threading.Lock()  # a worker's slots look at the same time


def watched_seconds(incarnation: str, running: Iterable[tuple[int, Attempt]], not_before: float) -> dict[Key, float]:
    """For how many seconds this process has seen the same last heartbeat of each running attempt of a study.

    `running` is every running attempt with its trial's id, as read just now: what was seen before is compared with it
    and then replaced. A look before `not_before`, by the monotonic clock, does not count.
    """
    now = monotonic()
    with _lock:
        before = _looks.get(incarnation, {})
        looks = {}
        for trial_id, attempt in running:
            key = trial_id, attempt.attempt
            look = before.get(key)
            if look is None or look.beat != attempt.beat or look.at < not_before:
                look = _Look(beat=attempt.beat, at=now)
            looks[key] = look
        _looks[incarnation] = looks
    return {key: now - look.at for key, look in looks.items()}
