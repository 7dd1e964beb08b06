"""The models: one function from hyperparameters to a compiled keras.Model. Uses only ``keras.*``.

Images are on the scale 0 to 255, and the first layer divides them by 255. A dropout layer exists if its rate is given,
also if the rate is 0.0. The softmax is always computed in float32.

With the notebook's hyperparameters the models have as many parameters as the notebook's: 668,810 (depth 3), 154,186
(5), 2,980,682 (7), 1,199,882 (mnist_cnn).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from search import backbone, resnet
from search.data import import_function
from search.errors import MachineError, MetricError, ModelError
from search.images import Array
from search.layers import BatchNormalization, Dropout
from storage.errors import named_error
from studies.model_rules import WITH_MOMENTUM

Hyperparameters = Mapping[str, Any]

BATCH_SIZE = 128  # as in the notebook
LEARNING_RATE = 0.001  # Adam's default, also in the notebook
NOT_OF_THE_MODEL = ("batch_norm_averages", "patience_epochs")
# One cycle: from a 25th of the learning rate up to it in 30 % of the steps, then down to a 10,000th of where it began.
# Smith and Topin (2018), arXiv:1708.07120, with the shares that PyTorch's OneCycleLR has made common.
ONE_CYCLE_START, ONE_CYCLE_WARMUP, ONE_CYCLE_END = 1 / 25, 0.3, 1e-4


def build(
    name: str,
    hyperparameters: Hyperparameters,
    image_shape: tuple[int, int, int],
    classes: int,
    *,
    plain: bool = False,
    steps: tuple[int, int] = (1, 1),
) -> keras.Model:
    """A compiled model that takes (n, height, width, channels) on 0 to 255 and gives (n, classes) probabilities.

    `steps` is how many batches an epoch has, and how many epochs the learning rate's schedule is for.

    `plain` builds the model that is saved: only of Keras's own layers, with the same weights in the same order, without
    augmentation, and not compiled. It loads without Trialyard, and without an optimizer's state, which would triple its
    size.

    Raises ModelError if a user's own function fails or returns no model, or the images are too small; MachineError if
    that function, or a module that it needs, cannot be imported.
    """
    if ":" in name:
        return _own(name, hyperparameters, image_shape, classes, steps)
    batch_norm, dropout = (layers.BatchNormalization, layers.Dropout) if plain else (BatchNormalization, Dropout)
    augmentation = [] if plain else _augmentation(hyperparameters)
    # Probabilities in bfloat16 would have three digits.
    head = [layers.Dense(classes), layers.Activation("softmax", dtype="float32")]
    try:
        if name == "resnet":
            inputs, x = _applied(image_shape, [layers.Rescaling(1.0 / 255.0), *augmentation])
            outputs = _chained(resnet.features(x, hyperparameters, batch_norm, dropout), head)
            model = keras.Model(inputs, outputs)
        elif name == "backbone":
            inputs, x = _applied(image_shape, augmentation)
            outputs = _chained(backbone.features(x, hyperparameters, dropout, plain=plain), head)
            model = keras.Model(inputs, outputs)
        else:
            body = _convnet if name == "convnet" else _mnist_cnn
            stack = body(hyperparameters, batch_norm, dropout)
            first = [keras.Input(image_shape, name="images"), layers.Rescaling(1.0 / 255.0)]
            model = keras.Sequential([*first, *augmentation, *stack, *head])
    except ValueError as error:
        raise ModelError(
            f"{name} cannot be built for images of {image_shape[0]}x{image_shape[1]} "
            f"({str(error).splitlines()[0]}): they are too small for its convolutions"
        ) from error
    if not plain:
        _compile(model, hyperparameters, steps)
    return model


def _applied(image_shape: tuple[int, int, int], stack: Sequence[layers.Layer]) -> tuple[Any, Any]:
    """The symbolic images, and what comes out of these layers."""
    images = keras.Input(image_shape, name="images")
    return images, _chained(images, stack)


def _chained(x: Any, stack: Sequence[layers.Layer]) -> Any:
    for layer in stack:
        x = layer(x)
    return x


def accuracy_of(measured: Mapping[str, Any], name: str) -> Any:
    """The accuracy that Keras measured. Raises MetricError if the model `name` has no such metric."""
    if "accuracy" not in measured:
        raise MetricError(
            f"{name} is compiled with the metrics {', '.join(measured)}, and trials are judged by the metric accuracy: "
            "add 'accuracy' to its metrics, or leave compiling to Trialyard"
        )
    return measured["accuracy"]


def summary(model: keras.Model) -> str:
    """One line per layer: its kind, its output for one image, its weights.

    The table of Keras's ``model.summary`` is ten times as long. The dashboard would send it for hundreds of trials at
    every poll.
    """
    rows = [("layer", "output", "weights")]
    for layer in model.layers:
        rows.append((type(layer).__name__, _output(layer), f"{layer.count_params():,}" if layer.built else "?"))
    rows.append(("all", "", f"{model.count_params():,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{kind:<{widths[0]}}  {output:<{widths[1]}}  {count:>{widths[2]}}" for kind, output, count in rows]
    return "\n".join(lines) + "\n"


def _output(layer: layers.Layer) -> str:
    try:
        shapes = [tensor.shape for tensor in keras.tree.flatten(layer.output)]
    except (AttributeError, ValueError):  # a layer that is called twice, or is in a subclass of keras.Model
        return "?"
    return " and ".join("x".join("?" if size is None else str(size) for size in shape[1:]) for shape in shapes)


def _convnet(h: Hyperparameters, batch_norm: Any, dropout: Any) -> list[layers.Layer]:
    """The notebook's ConvNets of depth 3, 5 and 7: everything between the rescaling and the last Dense."""
    depth = h["depth"]
    common_rate = h.get("dropout")
    conv_rate = h.get("conv_dropout", common_rate)
    # `dropout` adds a layer after Dense 128 only at depth 3; `dense_dropout` adds it at every depth.
    dense_rate = h.get("dense_dropout", common_rate if depth == 3 else None)

    def conv(filters: int, kernel: int) -> layers.Layer:
        return layers.Conv2D(max(1, round(filters * h.get("width", 1.0))), kernel, activation="relu")

    def pool() -> layers.Layer:
        return layers.MaxPooling2D(2)

    def norm() -> list[layers.Layer]:
        wanted = h.get("batch_norm", depth != 3)
        return [batch_norm(momentum=h.get("batch_norm_momentum", 0.99))] if wanted else []

    def drop(rate: float | None) -> list[layers.Layer]:
        return [dropout(rate)] if rate is not None and h.get("dropout_layers", True) else []

    if depth == 3:
        convolutions = [conv(32, 7), conv(64, 5), pool(), conv(128, 5), *norm(), *drop(conv_rate)]
    elif depth == 5:
        convolutions = [
            # Dropout comes after the pool. Before it, dropout scales up the values that it keeps, so the maximum of
            # four values is larger than without dropout, and the batch normalisation that follows learns wrong
            # averages: on the digits a rate of 0.5 cost 46 points of accuracy.
            *(conv(32, 3), conv(32, 3), pool(), *drop(conv_rate)),
            *(conv(32, 5), *norm()),
            *(conv(64, 3), pool(), *drop(conv_rate)),
            *(conv(128, 2), *norm()),
        ]
    else:
        convolutions = [
            *(conv(32, 3), conv(32, 3), conv(32, 3), *drop(conv_rate)),
            *(conv(64, 3), conv(64, 3), *drop(conv_rate), *norm()),
            *(conv(64, 5), conv(128, 2), *norm()),
        ]
    units = h.get("dense_units", 128)
    hidden = [layers.Dense(units, activation="relu"), *drop(dense_rate)] if units else []
    flat = layers.GlobalAveragePooling2D() if h.get("global_pooling", False) else layers.Flatten()
    return [*convolutions, flat, *hidden]


def _mnist_cnn(h: Hyperparameters, batch_norm: Any, dropout: Any) -> list[layers.Layer]:
    """The example that the notebook cites (keras-team/keras, examples/mnist_cnn.py)."""
    width = h.get("width", 1.0)
    return [
        layers.Conv2D(max(1, round(32 * width)), 3, activation="relu"),
        layers.Conv2D(max(1, round(64 * width)), 3, activation="relu"),
        layers.MaxPooling2D(2),
        dropout(h.get("conv_dropout", h.get("dropout", 0.25))),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        dropout(h.get("dense_dropout", h.get("dropout", 0.5))),
    ]


def _augmentation(h: Hyperparameters) -> list[layers.Layer]:
    """Random changes of training images, none of which is made when a model is judged.

    Each image is changed by its own amount, drawn evenly from minus to plus the hyperparameter. What comes in from
    outside the image is black.
    """
    made: list[layers.Layer] = []
    # In float32: in bfloat16 a pixel's place in a large image would be off by a pixel.
    options: dict[str, Any] = {"fill_mode": "constant", "fill_value": 0.0, "dtype": "float32"}
    if h.get("flip", False):
        made.append(layers.RandomFlip("horizontal", dtype="float32"))
    if h.get("rotate", 0.0):
        made.append(layers.RandomRotation(h["rotate"] / 360.0, **options))  # Keras takes shares of a full turn
    if h.get("zoom", 0.0):
        made.append(layers.RandomZoom(h["zoom"], **options))
    if h.get("shift", 0.0):
        made.append(layers.RandomTranslation(h["shift"], h["shift"], **options))
    return made


def _own(
    name: str,
    hyperparameters: Hyperparameters,
    image_shape: tuple[int, int, int],
    classes: int,
    steps: tuple[int, int],
) -> keras.Model:
    # How a model is judged, and for how long it is trained, is no business of the function that builds it.
    given = {key: value for key, value in hyperparameters.items() if key not in NOT_OF_THE_MODEL}
    model = call_own(name, given, image_shape, classes)
    if not getattr(model, "compiled", False):
        _compile(model, hyperparameters, steps)
    return model


def call_own(
    name: str, hyperparameters: dict[str, Any], image_shape: tuple[int, int, int], classes: int
) -> keras.Model:
    """The model that a user's own function returns, compiled or not. Raises as `build` does."""
    function = import_function(name)
    try:
        model = function(hyperparameters, image_shape, classes)
    except ImportError as error:  # the function imports a module when it is called
        raise MachineError(
            f"{name} needs a module that cannot be imported on this machine ("
            f"{named_error(error)}): install it, or put it into this folder or on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        raise ModelError(
            f"{name} failed to build a model with {dict(hyperparameters)} for images of {image_shape} "
            f"({named_error(error)}): correct the function"
        ) from error
    if not isinstance(model, keras.Model):
        raise ModelError(f"{name} returned a {type(model).__name__}: it must return a keras.Model")
    return model


def targets(model: keras.Model, y: Array, classes: int) -> Array:
    """The labels `y`, (n,), as the model's loss takes them: as they are for a sparse one, else one-hot, float32,
    (n, classes).
    """
    losses = losses_of(model)
    sparse = len(losses) == 1 and str(name_of(losses[0])).startswith("sparse_")
    if sparse:
        return y
    # Keras's to_categorical makes float64, twice the memory: much with a thousand classes.
    one_hot = np.zeros((len(y), classes), np.float32)
    one_hot[np.arange(len(y)), y] = 1.0
    return one_hot


def losses_of(model: keras.Model) -> list[Any]:
    """The losses that the model was compiled with, of each output one; that of the only output may be in a list."""
    loss = getattr(model, "loss", None)
    return list(loss.values() if isinstance(loss, Mapping) else loss) if isinstance(loss, Mapping | list) else [loss]


def name_of(loss: Any) -> Any:
    """The name of one of Keras's losses, or of a user's own function; a loss that is given by name is its name."""
    return getattr(loss, "name", getattr(loss, "__name__", loss))


def _compile(model: keras.Model, h: Hyperparameters, steps: tuple[int, int]) -> None:
    model.compile(
        optimizer=_optimizer(h, steps),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=h.get("label_smoothing", 0.0)),
        metrics=["accuracy"],
        # On CPUs, XLA made a step seven times slower than oneDNN's kernels. JAX always uses XLA.
        jit_compile=False if keras.backend.backend() == "tensorflow" and not _on_gpu() else "auto",
    )


def _on_gpu() -> bool:
    return any(device.startswith("gpu") for device in keras.distribution.list_devices("gpu"))


def _optimizer(h: Hyperparameters, steps: tuple[int, int]) -> keras.optimizers.Optimizer:
    kinds = {
        "adam": keras.optimizers.Adam,
        "adamw": keras.optimizers.AdamW,
        "nadam": keras.optimizers.Nadam,
        "rmsprop": keras.optimizers.RMSprop,
        "sgd": keras.optimizers.SGD,
        "adadelta": keras.optimizers.Adadelta,
        "adagrad": keras.optimizers.Adagrad,
    }
    name = h.get("optimizer", "adam")
    options: dict[str, Any] = {"learning_rate": _learning_rate(h, steps)}
    if "weight_decay" in h:
        options["weight_decay"] = h["weight_decay"]
    if "momentum" in h and name in WITH_MOMENTUM:
        options["momentum"] = h["momentum"]
    return kinds[name](**options)


def _learning_rate(h: Hyperparameters, steps: tuple[int, int]) -> Any:
    """The learning rate, or Keras's schedule that gives it for each batch."""
    rate = h.get("learning_rate", LEARNING_RATE)
    per_epoch, epochs = steps
    schedules, total = keras.optimizers.schedules, per_epoch * epochs
    kind, warmup = h.get("schedule", "constant"), round(h.get("warmup_epochs", 0) * per_epoch)
    if kind == "one_cycle":
        warmup = round(ONE_CYCLE_WARMUP * total)
        return schedules.CosineDecay(
            rate * ONE_CYCLE_START,
            decay_steps=max(1, total - warmup),
            alpha=ONE_CYCLE_START * ONE_CYCLE_END,
            warmup_target=rate,
            warmup_steps=warmup,
        )
    warmup = min(warmup, total)
    begin = rate / (warmup + 1)  # the first batch, too, should teach something
    if kind == "cosine" and warmup:
        return schedules.CosineDecay(begin, decay_steps=max(1, total - warmup), warmup_target=rate, warmup_steps=warmup)
    if kind == "cosine":
        return schedules.CosineDecay(rate, decay_steps=max(1, total))
    # A polynomial of power 1 that grows, and stays at its end.
    return schedules.PolynomialDecay(begin, decay_steps=warmup, end_learning_rate=rate) if warmup else rate
