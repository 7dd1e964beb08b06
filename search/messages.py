"""What the two processes of a slot say to each other: the worker's `search.trainer` and its `search.trainer_process`.

Apart from the code that trains, because the worker reads these messages without Keras. They are pickled, so a class
must be importable under the same name in both processes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from search.devices import Slot
from storage.hits import Hits
from storage.tables import storable
from studies.definition import Definition
from studies.recipe import Recipe

StopMode = Literal["keep", "drop"]  # whether a training that is stopped writes a checkpoint of its last whole epoch


# --- to the trainer process; its slot comes first -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training; or with `folder` None only a check: load the data, and try a user's own model."""

    definition: Definition
    recipe: Recipe
    slot: Slot
    data_folders: tuple[Path, ...]
    folder: Path | None  # for model, history and checkpoint
    checkpoints: tuple[Path, ...] = ()  # where earlier attempts may have left one
    study: str = ""  # the study's incarnation: no other training continues from its checkpoints
    trial: str = ""  # for the log
    checkpoint_seconds: float = 30.0
    precision: str | None = None  # Keras's dtype policy that the study began with; None: the device's own
    # Digests of the source files of a user's own functions, by function; the trainer refuses to train with others.
    sources: Mapping[str, str] = field(default_factory=dict)
    data_fingerprint: str | None = None  # of the data that the study began with; the trainer trains with no others
    measure: bool = False  # with a check: also how large the models are, and how fast


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Ends the running job after its batch. Without a job nothing happens."""

    mode: StopMode


# --- from the trainer process -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The process has imported Keras. What happens from now on is about its job."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Models of a search, measured on this machine."""

    parameters: tuple[int, int]  # weights of the smallest and the largest model that was built
    start_seconds: float  # until a training has made its first batch
    epoch_seconds: float  # of training and evaluation; the mean of the smallest and the largest model


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The end of a check."""

    data: dict[str, Any]  # a summary, see `Dataset.summary`
    notes: tuple[str, ...] = ()  # what the user may not expect, a sentence each
    sources: dict[str, str] = field(default_factory=dict)  # digests, as in Job
    measured: Measured | None = None  # only if the job asks for it, and a training is possible


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How far the running epoch is, at most once a second. For people to see: nothing is recorded of it."""

    epoch: int  # from 1, through all repeats
    done: int  # batches of this epoch
    total: int  # batches of an epoch


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The end of a job in an error that it would meet again."""

    kind: str  # one of `storage.faults.FAULTS`
    message: str

    def __post_init__(self) -> None:
        # A user's exception may name a file whose name is not UTF-8, and no report could be written with that.
        object.__setattr__(self, "message", storable(self.message))


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch gave. Losses are means of the categorical cross-entropy, accuracies are of 0 to 1.

    A model of one's own may measure an accuracy that is not finite, such as 0 / 0; losses always are.
    """

    epoch: int  # from 1, through all repeats
    loss: float  # on the training images, while the weights still change
    accuracy: float
    val_loss: float  # on the validation images, after the epoch
    val_accuracy: float
    seconds: float  # of training, without the validation
    images_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The epoch as JSON, which has no NaN: null means a number that is not finite."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Epoch":
        """The epoch that `to_json` wrote; null becomes NaN."""
        values: dict[str, Any] = {key: math.nan if value is None else value for key, value in stored.items()}
        return cls(**values)


def best_epoch(history: Sequence[Epoch]) -> Epoch | None:
    """The epoch with the highest finite validation accuracy; None if no accuracy is finite.

    Of equal ones the one with the lowest validation loss, then the first.
    """
    # max() over a NaN depends on the order: what comes before it is forgotten, or what comes after it.
    finite = [epoch for epoch in history if math.isfinite(epoch.val_accuracy)]
    return max(finite, key=lambda epoch: (epoch.val_accuracy, -epoch.val_loss), default=None)


def versions(backend: str) -> dict[str, str]:
    """The versions of the software that a training's numbers depend on, with this backend of Keras."""
    packages = ("trialyard", "keras", backend, "optuna", "numpy")
    return {"backend": backend} | {package: version(package) for package in packages}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training that came to its end, or was asked to stop."""

    value: float  # validation accuracy of the best epoch; in a confirmation the test accuracy of the last one
    repeats: tuple[float, ...]  # that of each whole repeat; with several, `value` is their mean
    best_epoch: int  # of the model that is kept, from 1 in each repeat; in a confirmation the last one
    val_loss: float | None  # of that epoch, with several repeats their mean; None if no epoch ended
    train_accuracy: float  # in that epoch, while the weights still changed
    epochs: int  # that were trained whole, in all repeats
    stopped: bool  # asked to, before the last epoch's end
    parameters: int  # weights in the model
    seconds: float  # of training, all epochs
    images_per_second: float  # median over the epochs but the first, which also compiles
    precision: str  # Keras's dtype policy
    precision_reason: str
    data_fingerprint: str
    versions: dict[str, str]
    # Of the model that is kept. None if it was stopped, gives something else than classes, or is the best of several
    # repeats, which says too much.
    hits: Hits | None
    has_predictions: bool = False  # whether the file of `studies.predictions` was written
    unsaved: str | None = None  # why the model cannot be saved


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The end of one of several repeats."""

    repeat: int  # from 1
    value: float  # validation accuracy of its best epoch


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A training that goes on from a checkpoint: the epochs that it has already."""

    history: tuple[Epoch, ...]


Message = Batches | Epoch | Repeated | Resumed | Trained | Checked | Failed  # about a job
