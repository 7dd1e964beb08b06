"""The hyperparameters of the built-in models, and the rule for each.

A definition is checked against this table without Keras. `search.model` builds the models with the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from studies.space import Scalar, values_text

OPTIMIZERS = ("adam", "adamw", "nadam", "rmsprop", "sgd", "adadelta", "adagrad")
WITH_MOMENTUM = ("sgd", "rmsprop")  # the optimizers that take `momentum`
SCHEDULES = ("constant", "cosine", "one_cycle")  # of the learning rate
WITH_WARMUP = ("constant", "cosine")  # the schedules that take `warmup_epochs`; one_cycle has a warm-up of its own
AVERAGES = ("corrected", "keras")  # which moving averages of batch normalisation a model is judged with
DEPTHS = (3, 5, 7)
STORED_FUNCTION = "trialyard.functions."  # how the module of a function begins that was stored from a notebook
# Networks of keras.applications that bring their preprocessing, or take images from -1 to 1.
BACKBONES = (
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("efficientnet_v2_b0", "efficientnet_v2_s", "resnet50_v2"),
)
TOO_MUCH_MOMENTUM = 1.0 - 1e-4  # of batch normalisation, from here on: its averages follow too slowly


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number in an interval."""

    low: float
    high: float = float("inf")
    open_low: bool = False  # whether `low` itself is excluded
    open_high: bool = False  # whether `high` itself is excluded
    whole: bool = False

    def broken_by(self, value: Scalar) -> str | None:
        """The rule that `value` breaks, in words; None if it is allowed."""
        kind = "a whole number" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return f"must be {kind}"
        too_low = value <= self.low if self.open_low else value < self.low
        too_high = value >= self.high if self.open_high else value > self.high
        if not (too_low or too_high):
            return None
        least = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        most = f" and {'less than' if self.open_high else 'at most'} {self.high:g}"
        return f"must be {least}{most if self.high != float('inf') else ''}"


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """One of a few values."""

    values: tuple[Scalar, ...]

    def broken_by(self, value: Scalar) -> str | None:
        """The rule that `value` breaks, in words; None if it is allowed."""
        # True == 1 in Python, but a depth of `true` is a mistake.
        if any(value == known and type(value) is type(known) for known in self.values):
            return None
        return f"must be one of {values_text(self.values)}"


@dataclass(frozen=True, kw_only=True)
class WordOrFile:
    """One of a few words, or the path of a file with a certain ending."""

    words: tuple[str, ...]
    ending: str

    def broken_by(self, value: Scalar) -> str | None:
        """The rule that `value` breaks, in words; None if it is allowed."""
        if isinstance(value, str) and (value in self.words or value.endswith(self.ending)):
            return None
        return f"must be one of {values_text(self.words)}, or the path of a file that ends in {self.ending}"


Rule = Number | OneOf | WordOrFile

_RATE = Number(low=0.0, high=1.0, open_high=True)
_SWITCH = OneOf(values=(True, False))

# The hyperparameters of the training, for every model, also a user's own.
TRAINING: Mapping[str, Rule] = {
    "batch_size": Number(low=1, whole=True),
    "optimizer": OneOf(values=OPTIMIZERS),
    "learning_rate": Number(low=0.0, open_low=True),
    "schedule": OneOf(values=SCHEDULES),
    "warmup_epochs": Number(low=0.0, high=100_000.0),
    "patience_epochs": Number(low=1, high=100_000, whole=True),
    "momentum": _RATE,
    "weight_decay": Number(low=0.0),
    "label_smoothing": _RATE,
    "batch_norm_averages": OneOf(values=AVERAGES),
}

# What is done to training images at random; never to images that judge a model.
_AUGMENTATION: Mapping[str, Rule] = {
    "shift": Number(low=0.0, high=0.5),  # share of the height and width
    "rotate": Number(low=0.0, high=180.0),  # degrees
    "zoom": Number(low=0.0, high=0.5),  # share of the size
    "flip": _SWITCH,  # left to right
}

_ARCHITECTURE: Mapping[str, Mapping[str, Rule]] = {
    "convnet": {
        "depth": OneOf(values=DEPTHS),
        "dropout": _RATE,
        "conv_dropout": _RATE,
        "dense_dropout": _RATE,
        "dropout_layers": _SWITCH,
        "batch_norm": _SWITCH,
        "batch_norm_momentum": _RATE,
        "width": Number(low=0.0, open_low=True, high=16.0),
        "global_pooling": _SWITCH,
        "dense_units": Number(low=0, high=65_536, whole=True),
        **_AUGMENTATION,
    },
    "mnist_cnn": {
        "dropout": _RATE,
        "conv_dropout": _RATE,
        "dense_dropout": _RATE,
        "width": Number(low=0.0, open_low=True, high=16.0),
        **_AUGMENTATION,
    },
    "resnet": {
        "depth": Number(low=1, high=100, whole=True),  # blocks in each stage
        "stages": Number(low=1, high=6, whole=True),
        "dropout": _RATE,
        "conv_dropout": _RATE,
        "batch_norm": _SWITCH,
        "batch_norm_momentum": _RATE,
        "width": Number(low=0.0, open_low=True, high=16.0),
        **_AUGMENTATION,
    },
    "backbone": {
        "backbone": OneOf(values=BACKBONES),
        "weights": WordOrFile(words=("none", "imagenet"), ending=".h5"),
        "frozen": _SWITCH,
        "dropout": _RATE,
        **_AUGMENTATION,
    },
}
# Hyperparameters without which a model cannot be built.
REQUIRED = {"convnet": "depth", "backbone": "backbone"}

NAMES = tuple(_ARCHITECTURE)


def batches_of(momentum: float) -> int:
    """How many batches the moving averages of batch normalisation look back: their time constant."""
    return round(1.0 / (1.0 - momentum))


def rules(model: str) -> Mapping[str, Rule] | None:
    """The hyperparameters of `model`, each with its rule; None for a user's own model, which may accept any."""
    known = _ARCHITECTURE.get(model)
    return None if known is None else {**known, **TRAINING}


def smallest_image(model: str, depth: Scalar | None) -> int:
    """The smallest height and width, in pixels, that the model takes.

    Every convolution of `convnet` and `mnist_cnn` is `valid`: a kernel of size k removes k - 1 pixels. A pooling layer
    halves the image. keras.applications has limits of its own.
    """
    if model == "resnet":
        return 1
    if model == "backbone":
        return 32
    if model == "mnist_cnn":
        return 6
    return {3: 20, 5: 24, 7: 16}[int(depth or DEPTHS[0])]
