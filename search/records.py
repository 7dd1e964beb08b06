"""What a training tells of itself. Apart from `search.training`, because the worker reads it without Keras."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch gave. Losses are means of the categorical cross-entropy, accuracies are of 0 to 1.

    A model of one's own may measure an accuracy that is not finite, such as 0 / 0; losses always are.
    """

    epoch: int  # from 1
    loss: float  # on the training images, while the weights still change
    accuracy: float
    val_loss: float  # on the validation images, after the epoch
    val_accuracy: float
    seconds: float  # of training, without the validation
    images_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The epoch as JSON, which has no NaN: null stands for a number that is not finite."""
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
    """The epoch with the highest finite validation accuracy, of equals the first; None if no accuracy is finite."""
    # max() over a NaN depends on the order: what comes before it is forgotten, or what comes after it.
    finite = [epoch for epoch in history if math.isfinite(epoch.val_accuracy)]
    return max(finite, key=lambda epoch: epoch.val_accuracy, default=None)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training that came to its end, or was told to stop."""

    value: float  # validation accuracy of the best epoch
    best_epoch: int
    epochs: int  # that were trained whole
    stopped: bool  # told to, before the last epoch's end
    parameters: int  # weights in the model
    seconds: float  # of training, all epochs
    images_per_second: float  # median over the epochs but the first, which also compiles
    precision: str  # Keras's dtype policy
    precision_reason: str
    data_fingerprint: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A training that goes on from a checkpoint: the epochs that it has already."""

    history: tuple[Epoch, ...]
