"""When the idle slots of a worker look for work: one slot for all, and less often the longer there is none."""

import random
import threading
from time import monotonic

FIRST_SECONDS = 1.0  # after the first look that found nothing
MOST_SECONDS = 5.0
GROWTH = 1.5
JITTER = 0.25  # share by which a pause differs, so that a hundred workers do not look at the same moment


class Looks:
    """The times of the next looks, for the threads of all slots.

    While there is work every slot looks whenever it is free. After a look that found nothing, one slot at a time does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pause = 0.0  # seconds between two looks; 0 while there is work
        self._next = float("-inf")  # by the monotonic clock

    def mine(self) -> bool:
        """Whether the slot that asks is to look now. If so, no other one looks for as long as the pause is."""
        with self._lock:
            if monotonic() < self._next:
                return False
            self._wait()
            return True

    def found_nothing(self) -> None:
        """Makes the pause longer."""
        with self._lock:
            self._pause = min(max(FIRST_SECONDS, self._pause * GROWTH), MOST_SECONDS)
            self._wait()

    def found_something(self) -> None:
        """There is work, or nothing will ever come: every free slot looks at once."""
        with self._lock:
            self._pause, self._next = 0.0, float("-inf")

    def _wait(self) -> None:
        self._next = monotonic() + self._pause * random.uniform(1 - JITTER, 1 + JITTER)
