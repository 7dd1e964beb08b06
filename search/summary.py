"""A study or a trial on one line. Imports nothing heavy: queries print these lines, too."""

from typing import TYPE_CHECKING, Any

from storage.errors import many

if TYPE_CHECKING:
    from studies.results import Status


def progress_line(status: "Status", seconds_left: float | None = None) -> str:
    """One line: trials done of the budget, the best so far, the time left.

    `seconds_left` is given by who knows it better than the database does.
    """
    seconds = status.seconds_left if seconds_left is None else seconds_left
    left = "ended" if status.ended else "time left unknown" if seconds is None else f"about {duration(seconds)} left"
    return f"{status.study}: {status.finished} of {many(status.budget, 'trial')}{so_far(status)}, {left}"


def so_far(status: "Status") -> str:
    """How many of the finished trials were pruned, and the best one; it continues a sentence.

    A confirmation has no best trial: its trials differ by their seeds.
    """
    pruned = f" ({status.pruned} pruned)" if status.pruned else ""
    if status.protocol == "confirmation":
        return pruned
    best = "none yet" if status.best is None else f"{status.best:.4f} (trial {status.best_number})"
    return f"{pruned}, best {best}"


def not_shown(status: "Status", shown_rows: int) -> str | None:
    """Which trials a leaderboard with so many rows does not have; None if it has all."""
    counts = {
        "complete": max(0, status.complete - shown_rows),
        "pruned": status.pruned,
        "failed": status.failed,
        "running": status.running,
        "waiting": status.waiting,
    }
    rest = [f"{count} {state}" for state, count in counts.items() if count]
    return f"not shown: {', '.join(rest)}" if rest else None


def duration(seconds: float) -> str:
    """A rough duration, such as "40 s", "12 min" or "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"


def clock(seconds: float) -> str:
    """A duration as a clock shows it: 0:42, 12:05, 2:10:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shown(point: dict[str, Any]) -> str:
    """Hyperparameters on one line, real numbers with four digits."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())
