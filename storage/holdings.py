"""Which trials this very process holds.

A process that lives does not prove that its worker does: in a notebook a worker ends by an error, and the process goes
on. What it claimed and does not hold any more is lost, and is taken back as if the process had ended.
"""

_held: set[tuple[str, int, int]] = set()  # a study's incarnation, a trial's id, the number of the attempt


def hold(incarnation: str, trial_id: int, attempt: int) -> None:
    """From now on a worker of this process holds this attempt."""
    _held.add((incarnation, trial_id, attempt))


def let_go(incarnation: str, trial_id: int, attempt: int) -> None:
    """It does not hold it any more, whatever became of it."""
    _held.discard((incarnation, trial_id, attempt))


def holds(incarnation: str, trial_id: int, attempt: int) -> bool:
    """Whether a worker of this process holds this attempt."""
    return (incarnation, trial_id, attempt) in _held
