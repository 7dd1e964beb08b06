"""When a training hangs: it has been silent for much longer than its epochs take."""

from search.messages import Epoch

EPOCHS = 20  # the silence of so many of its longest epochs is no slow epoch any more
# Before two epochs have ended, nobody knows how long one takes: loading and compiling belong to the first.
UNKNOWN_SECONDS = 24 * 3600.0
LOOK_SECONDS = 1.0  # a look takes a fraction of it, unless the worker was stopped or the machine slept meanwhile


class Stall:
    """Measures how long a training has been silent, and how long it may be: `least` seconds in any case.

    Only the time of the looks counts. So neither a worker that was stopped (SIGSTOP, a scheduler's suspension) nor a
    database that is away make a training that waits for them look like one that hangs.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._silent = self._longest = 0.0
        self._epochs = 0

    def looked(self, seconds: float, message: object | None) -> None:
        """Counts a look for a message, which took `seconds` and gave `message`, or None."""
        self._silent += min(seconds, LOOK_SECONDS)
        if isinstance(message, Epoch):
            if self._epochs > 0:
                # Epochs that waited while the database was away arrive at once.
                self._longest = max(self._longest, self._silent, message.seconds)
            self._epochs += 1
        if message is not None:
            self._silent = 0.0

    @property
    def limit(self) -> float:
        """For how many seconds the training may be silent now."""
        return max(self._least, UNKNOWN_SECONDS if self._epochs < 2 else EPOCHS * self._longest)

    @property
    def is_over(self) -> bool:
        """Whether it has been silent for longer."""
        return self._silent > self.limit
