"""What a training tells of itself. Apart from `search.training`, because the worker reads it without Keras."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch gave. Losses are means of the categorical cross-entropy, accuracies are of 0 to 1."""

    epoch: int  # from 1
    loss: float  # on the training images, while the weights still change
    accuracy: float
    val_loss: float  # on the validation images, after the epoch
    val_accuracy: float
    seconds: float  # of training, without the validation
    images_per_second: float


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
