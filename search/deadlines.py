"""Until when a trainer process may start, train, and end once it was asked to stop."""

from time import monotonic

from search.stall import LOOK_SECONDS
from search.trainer import START_SECONDS

NEVER = float("inf")


class Deadlines:
    """The deadlines of one job, by the monotonic clock.

    `trial_minutes` is how long it may train, None for ever; `stop_seconds` is how long it may take to stop.
    """

    def __init__(self, trial_minutes: float | None, stop_seconds: float) -> None:
        self._trial_minutes, self._stop_seconds = trial_minutes, stop_seconds
        self._start_by = monotonic() + START_SECONDS
        self._train_by = NEVER  # set when Keras is imported: how long that takes is not the trial's fault
        self.stop_by = NEVER  # set when it is asked to stop

    def looked(self, waited: float, handled: float) -> None:
        """A look for a message has `waited` so many seconds, and what it gave was `handled` in so many.

        To handle it may take long, such as waiting for the database: that is not the trial's time. Nor is the time for
        which this worker was stopped (SIGSTOP, a scheduler's suspension): the training may have ended meanwhile.
        """
        self._train_by += handled + max(0.0, waited - LOOK_SECONDS)
        self.stop_by += handled

    def trains(self) -> None:
        """Keras is imported: from the first call on, the time of the training counts."""
        if self._trial_minutes and self._train_by == NEVER:
            self._train_by = monotonic() + self._trial_minutes * 60

    def stop(self) -> None:
        """It is asked to stop."""
        self.stop_by = monotonic() + self._stop_seconds

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self.stop_by != NEVER

    @property
    def start_is_over(self) -> bool:
        """Whether Keras should be imported by now."""
        return monotonic() > self._start_by

    @property
    def training_is_over(self) -> bool:
        """Whether it has trained for too long."""
        return monotonic() > self._train_by

    @property
    def stop_is_over(self) -> bool:
        """Whether it should have stopped by now."""
        return monotonic() > self.stop_by
