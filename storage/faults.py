"""What can go wrong with a trial: whose fault it is, and what follows. No other file says what follows from a kind.

A kind is the ``kind`` of a trial's user attribute `failure`, of a trainer's message about a failed job, or the outcome
of an attempt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Whose = Literal[
    "hyperparameters",  # the trial fails, and the sampler learns that they are bad
    "trial",  # it is not known whether its hyperparameters or the study are to blame: the trial fails
    "study",  # no hyperparameters can help: the trial fails, and the study pauses
    "machine",  # the trial waits again, and the study is left to other machines for minutes
    "slot",  # the trial waits again, and the slot closes for minutes
    "nobody",  # the trial waits again
]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault."""

    whose: Whose
    # What becomes of the trainer process. "fresh": it is replaced, and what failed in a process that has run other
    # jobs before is tried once more in a new one, because one of those jobs may have caused the failure.
    process: Literal["kept", "replaced", "fresh"] = "fresh"
    # How often in a row, without a new epoch, a trial waits again before it fails. None: always. An attempt that ends
    # by another kind with a number here counts as "crashed", with the limit of that.
    retries: int | None = None
    # A study in which no trial has ended well pauses after so many failures in a row that are alike. None: never.
    pauses_after: int | None = 3

    @property
    def waits(self) -> bool:
        """Whether the trial waits again; else it fails."""
        return self.whose in ("machine", "slot", "nobody")


# More than for other kinds: in a wide space most of the first trainings may fail.
BAD_POINTS = 10
CRASHES = 3
LOSSES = 20

FAULTS: Mapping[str, Fault] = {
    # A loss that is not finite, or no epoch with a finite score.
    "nan": Fault(whose="hyperparameters", process="kept", pauses_after=BAD_POINTS),
    "memory": Fault(whose="hyperparameters", pauses_after=BAD_POINTS),  # it ran out
    "timeout": Fault(whose="hyperparameters", process="replaced", pauses_after=BAD_POINTS),  # trial_minutes
    "data": Fault(whose="hyperparameters", process="kept"),  # they do not fit the data: a batch is larger
    "model": Fault(whose="hyperparameters"),  # no model can be built with them
    "error": Fault(whose="trial"),  # an exception while it trained
    "sampler": Fault(whose="trial", process="kept"),  # the sampler raised an exception
    "exhausted": Fault(whose="trial", process="kept", pauses_after=None),  # each point of the space has a trial already
    "metric": Fault(whose="study", pauses_after=1),  # the model does not report what trials are judged by
    "import": Fault(whose="machine"),  # Keras, its backend, or a user's module
    "load": Fault(whose="machine", process="replaced"),  # the data
    "store": Fault(whose="machine", process="kept"),  # the object store of the trials' files is away, or refuses
    # Full, not writable, or it fails: each slot of the machine will see it.
    "disk": Fault(whose="slot", process="replaced"),
    "device": Fault(whose="slot"),  # the framework does not see it, or it does not compute
    "start": Fault(whose="slot"),  # the trainer process ended before it had imported Keras
    # An error of CUDA, cuDNN, cuBLAS or the driver in a training. A training that always ends so must not close one
    # slot after another for ever, so it also counts as a crash of the trial.
    "accelerator": Fault(whose="slot", retries=CRASHES),
    "crashed": Fault(whose="nobody", retries=CRASHES),  # the trainer process died
    "lost": Fault(whose="nobody", retries=LOSSES, pauses_after=None),  # the worker was killed, or vanished
    "interrupted": Fault(whose="nobody", process="kept"),  # a signal, a pause, a stop
}

UNKNOWN = Fault(whose="trial", pauses_after=None)


def of(kind: str) -> Fault:
    """The fault of this kind. Other programs and other versions may store any kind: that is a trial's own fault."""
    return FAULTS.get(kind, UNKNOWN)
