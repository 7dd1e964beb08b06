"""The errors of Trialyard. Each message is one sentence that also says what to do next.

TrialyardError
├── SettingsError      the value of a TRIALYARD_* variable is invalid
├── StorageError       the database cannot be reached, opened or written, or a trial's file not be written
│   ├── DiskError      a file of a trial, or a trainer's log, cannot be written
│   ├── ObjectStoreError  the object store of the trials' files has no such bucket, or refuses
│   │   └── ObjectStoreAway   it cannot be reached
│   ├── Locked         another process has held a lock for too long
│   ├── StudyGone      the study was deleted meanwhile
│   ├── StudyUnreadable  an attribute of the study does not have the shape that Trialyard writes
│   ├── NotOurStudy      a study of this name was not made by Trialyard, and has trials
│   └── WrongDirection   the study does not maximize exactly one value
├── ClaimLost          another worker owns this trial now (never shown to a user: the result is dropped)
├── DefinitionError    (studies) a definition breaks a rule
├── StudyError         (studies) no such study, or it exists with another definition
├── PackageError       (studies) a package that Trialyard itself needs cannot be imported
├── DataError          (search) images or labels cannot be loaded or do not fit
├── ModelError         (search) a model cannot be built
│   └── MetricError      it does not report what trials are judged by
├── MachineError       (search) this machine cannot import or load what a study needs
├── DeviceError        (search) there is no such GPU, the framework does not see it, or it fails
│   └── AcceleratorError it failed in a training
├── DashboardError     (search) the dashboard cannot be served at this address
├── SlurmError         (search) Slurm cannot run these workers, or does not answer
├── RayError           (search) Ray is not installed, does not answer, or cannot run these slots
└── WorkerError        (search) a worker cannot be started as asked, or none is alive
"""

import difflib
from collections.abc import Iterable, Sequence


class TrialyardError(Exception):
    """Base of all errors above; the command line prints it as one line and exits with 1."""


class SettingsError(TrialyardError):
    """A TRIALYARD_* environment variable has a value that cannot be used."""


class StorageError(TrialyardError):
    """The database cannot be reached, opened or written, or the file of a trial cannot be written."""


class DiskError(StorageError):
    """A file of a trial, or a trainer's log, cannot be written: the disk may be full."""


class ObjectStoreError(StorageError):
    """The object store of the trials' files has no such bucket, or refuses: waiting does not help."""


class ObjectStoreAway(ObjectStoreError):  # noqa: N818 - it describes the store
    """The object store cannot be reached. It may be back in a moment."""


class Locked(StorageError):  # noqa: N818 - it describes the database
    """Another process has held a lock for too long. It may let go of it."""


class StudyGone(StorageError):  # noqa: N818 - it is an event, not a mistake
    """The study is no longer in the database; a worker goes on with the others."""


class StudyUnreadable(StorageError):  # noqa: N818 - it describes the study
    """An attribute with Trialyard's prefix has a shape that Trialyard never writes."""


class NotOurStudy(StorageError):  # noqa: N818 - as above
    """A study of this name was not made by Trialyard, and has trials."""


class WrongDirection(StorageError):  # noqa: N818 - as above
    """The study does not maximize exactly one value; the message completes a sentence that starts with its name."""


class ClaimLost(TrialyardError):  # noqa: N818 - it is an event, not a mistake
    """The trial was taken over by another worker while this one was silent."""


def error_text(error: BaseException, limit: int = 300) -> str:
    """The error's own words on one line, at most `limit` characters; its type, if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def named_error(error: BaseException, limit: int = 2000) -> str:
    """The error's type and its words on one line: ``ValueError: too short``."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]


def many(number: int, noun: str, plural: str | None = None) -> str:
    """``1 trial``, ``2 trials``, ``1,200 trials``; `plural` is for a noun that needs more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def trials_text(numbers: Sequence[int]) -> str:
    """``trial 3`` or ``trials 3, 5``; at most ten numbers are named."""
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"trial{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers[:10]))}{more}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'depth'?"`` for the known name that is most similar to `name`; ``""`` if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
