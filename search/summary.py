"""A study or a trial on one line. Imports nothing heavy: queries print these lines, too."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studies.results import Status


def progress_line(status: "Status") -> str:
    """One line: trials done of the budget, the best so far, the time left."""
    left = "ended" if status.ended else _left(status.seconds_left)
    return f"{status.study}: {status.finished} of {status.budget} trials{so_far(status)}, {left}"


def so_far(status: "Status") -> str:
    """How many of the finished trials were pruned, and the best one; it continues a sentence.

    A confirmation has no best trial: its trials differ by their seeds.
    """
    pruned = f" ({status.pruned} pruned)" if status.pruned else ""
    if status.protocol == "confirmation":
        return pruned
    best = "none yet" if status.best is None else f"{status.best:.4f} (trial {status.best_number})"
    return f"{pruned}, best {best}"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "time left unknown"
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


def shown(point: dict[str, Any]) -> str:
    """Hyperparameters on one line, real numbers with four digits."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())
