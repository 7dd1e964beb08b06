"""How fast the trials of a worker go, and how long the rest of a study takes at that pace."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studies.results import Status

MEASURED_SECONDS = 2.0  # of training, before its pace says anything


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where a training was at one moment."""

    moment: float  # by the monotonic clock
    position: float  # epochs, the running one as a part of 1


@dataclass(frozen=True, kw_only=True)
class Running:
    """A trial that trains now. The marks are None until its first batch: what comes before is not its pace."""

    epochs: int  # in all
    first: Mark | None = None
    last: Mark | None = None

    def moved(self, mark: Mark) -> "Running":
        """This trial at a later moment."""
        return Running(epochs=self.epochs, first=self.first or mark, last=mark)

    @property
    def epoch_seconds(self) -> float | None:
        """The seconds of one epoch; None while too little was trained to say it."""
        if self.first is None or self.last is None:
            return None
        seconds, epochs = self.last.moment - self.first.moment, self.last.position - self.first.position
        return seconds / epochs if seconds >= MEASURED_SECONDS and epochs > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """How long this trial still takes, if nothing stops it; None while that is unknown."""
        if self.last is None or self.epoch_seconds is None:
            return None
        since = now - self.last.moment
        return max(0.0, (self.epochs - self.last.position) * self.epoch_seconds - since)


def study_seconds_left(status: "Status", running: Sequence[Running], slots: int, now: float) -> float | None:
    """How long the rest of a study takes on `slots`, of which some train the trials `running`; None while unknown.

    A trial takes as long as the last finished ones of the study did. Before one has finished, the pace of those that
    run says it.
    """
    left = status.budget - status.finished
    if left <= 0:
        return 0.0
    trial_seconds = status.trial_seconds
    if trial_seconds is None:
        measured = [trial.epochs * trial.epoch_seconds for trial in running if trial.epoch_seconds is not None]
        if not measured:
            return None
        trial_seconds = mean(measured)
    begun = [trial_seconds if (own := trial.seconds_left(now)) is None else own for trial in running[:left]]
    rest = (left - len(begun)) * trial_seconds
    seconds = (sum(begun) + rest) / min(max(1, slots), left)
    if status.hours_left is not None:  # a trial that starts within the hours runs to its end
        seconds = min(seconds, 3600.0 * status.hours_left + trial_seconds if status.hours_left > 0 else 0.0)
    return max([seconds, *begun])
