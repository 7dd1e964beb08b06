"""Can a search train, save and load a user's own model? Tried on a few images, before a trial is spent.

Runs in a trainer process. Each problem is one sentence that names the function.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from types import FunctionType
from typing import Any

import keras
import numpy as np

from search.batches import batches
from search.data import Dataset
from search.errors import ModelError
from search.images import Array
from search.model import NOT_OF_THE_MODEL, accuracy_of, build, call_own, losses_of, name_of, targets
from storage.errors import named_error
from studies import model_rules, recipe
from studies.definition import Definition
from studies.space import Point, high_point, low_point, random_point

IMAGES = 16
TRIES = 10  # random points at which a hyperparameter may be read, if it was not read at the first ones
NEAR = 1e-2  # apart: outputs of two classes of which bfloat16 may make either the larger
MODEL_RELATIVE, MODEL_ABSOLUTE = 1e-3, 1e-4  # by which the outputs of a loaded model may differ


def check(definition: Definition, hyperparameters: Mapping[str, Any], dataset: Dataset, policy: str) -> tuple[str, ...]:
    """Builds the model, trains it on one batch, saves it and loads it again; returns notes, a sentence each.

    `policy` is Keras's dtype policy of the trials. Raises ModelError with what is wrong, and MachineError if the
    function cannot be imported.
    """
    name = definition.model
    keras.backend.clear_session()
    keras.config.set_dtype_policy(policy)
    net = build(name, hyperparameters, dataset.image_shape, dataset.classes)
    images, labels = dataset.x_train[:IMAGES], dataset.y_train[:IMAGES]
    notes = _check_outputs(net, name, images, dataset.classes)
    if definition.confirm is not None and not _gives_classes(net(images[:1], training=False), 1, dataset.classes):
        raise ModelError(
            f"{name} gives something else than one number for each of the {dataset.classes} classes, so its answers to "
            "the test images cannot be counted: return one output of (n, classes)"
        )
    _check_momentum(net, name)
    if getattr(net.optimizer, "use_ema", False):
        raise ModelError(
            f"{name} is compiled with an optimizer that has use_ema=True, whose averages would replace the weights at "
            "the end of each epoch, and not only at the end of the training: leave it out"
        )
    _try_one_batch(net, name, images, labels, dataset.classes)
    _check_saving(net, name, images)
    if definition.confirm is None:
        notes += _check_reads(definition, hyperparameters, dataset)
    return tuple(notes)


def _check_outputs(net: keras.Model, name: str, images: Array, classes: int) -> list[str]:
    outputs = net(images, training=False)
    if not _gives_classes(outputs, len(images), classes):
        # A loss of its own may want another form; the batch tells.
        return [f"{name} gives something else than one number for each class, so its trials cannot be confirmed"]
    if _is_short(outputs):
        raise ModelError(f"{name} computes its probabilities in {_dtype(outputs)}, which has three digits: {FLOAT32}")
    sums = keras.ops.convert_to_numpy(outputs).astype(np.float64).sum(axis=1)
    if np.allclose(sums, 1.0, atol=1e-3):
        return []
    problem = (
        f"{name} must give probabilities, and for the first images the outputs of the {classes} classes sum to "
        f"{sums.min():.3g} to {sums.max():.3g}"
    )
    if _wants_probabilities(net):
        raise ModelError(f'{problem}: end it with layers.Activation("softmax", dtype="float32")')
    return [f"{problem}: its loss may allow that, but exported models give what the model gives"]


FLOAT32 = 'give its last layer the argument dtype="float32", or write precision = "float32" in the definition'


def _is_short(outputs: Any) -> bool:
    return _dtype(outputs) in ("bfloat16", "float16")


def _dtype(outputs: Any) -> str:
    return str(keras.backend.standardize_dtype(outputs.dtype))


def _wants_probabilities(net: keras.Model) -> bool:
    """Whether its loss is one of Keras's cross-entropies of probabilities."""
    known = ("categorical_crossentropy", "sparse_categorical_crossentropy")
    losses = losses_of(net)
    return any(name_of(loss) in known and not getattr(loss, "from_logits", False) for loss in losses)


def _check_momentum(net: keras.Model, name: str) -> None:
    for layer in net._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.momentum >= model_rules.TOO_MUCH_MOMENTUM:
            raise ModelError(
                f"{name} has a BatchNormalization of momentum {layer.momentum:g}: its averages would need "
                f"{model_rules.batches_of(layer.momentum):,} batches to follow: choose at most 0.999"
            )


def _gives_classes(outputs: Any, images: int, classes: int) -> bool:
    return hasattr(outputs, "shape") and tuple(outputs.shape) == (images, classes)


def _try_one_batch(net: keras.Model, name: str, images: Array, labels: Array, classes: int) -> None:
    """Trains `net` on a batch, and judges it by the same. Raises ModelError if it cannot, or its accuracy is wrong."""
    wanted = targets(net, labels, classes)
    try:
        trained = net.fit(**batches(images, wanted, len(images)), shuffle=False, verbose=0).history
        judged = net.evaluate(**batches(images, wanted, len(images)), verbose=0, return_dict=True)
        outputs = net(images, training=False)
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        own_loss = any(isinstance(loss, FunctionType) for loss in losses_of(net))
        about_loss = ", or its loss, which gets class numbers only if its name begins with sparse_" if own_loss else ""
        raise ModelError(
            f"{name} cannot be trained and evaluated on a batch of {len(images)} images with labels of the shape "
            f"{wanted.shape} ({named_error(error, 200)}): correct the function{about_loss}"
        ) from error
    accuracy_of(trained, name)
    accuracy = accuracy_of(judged, name)
    if not _gives_classes(outputs, len(images), classes):
        return
    scores, again = (keras.ops.convert_to_numpy(each) for each in (outputs, net(images, training=False)))
    if not np.array_equal(scores, again):
        return  # it draws at random also where it is judged
    right = float((scores.argmax(axis=1) == labels).mean())
    highest = np.sort(scores.astype(np.float64), axis=1)[:, -2:]
    # Where two classes are as good as equal, rounding decides.
    doubtful = float((highest[:, 1] - highest[:, 0] < NEAR).mean())
    if abs(accuracy - right) > doubtful + 1e-3:
        raise ModelError(
            f"{name} reports an accuracy of {accuracy:.4f} for {len(images)} images, and answers {right:.4f} of them "
            "right: a train_step of its own needs a test_step that updates the same metric, and a metric of another "
            "kind must not be called accuracy"
        )


def _check_saving(net: keras.Model, name: str, images: Array) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        try:
            net.save(file)
        except Exception as error:  # as above
            raise ModelError(f"{name} cannot be saved ({named_error(error, 200)}): {SERIALIZABLE}") from error
        check_file(file, net, name, images)


def check_file(file: Path, net: keras.Model, name: str, images: Array) -> None:
    """Raises ModelError unless the model that was saved to `file` loads, and gives what `net` gives for `images`."""
    try:
        loaded = keras.models.load_model(file, compile=False)
    except Exception as error:  # a user's own layers may raise anything
        advice = INSTEAD_OF_LAMBDA if "lambda" in str(error).lower() else SERIALIZABLE
        raise ModelError(f"{name} can be saved, but not loaded again ({named_error(error, 200)}): {advice}") from error
    expected, outputs = (_flat_outputs(model, images) for model in (net, loaded))
    if not np.allclose(expected, outputs, rtol=MODEL_RELATIVE, atol=MODEL_ABSOLUTE):
        raise ModelError(
            f"{name} gives other outputs after it was saved and loaded (up to {np.abs(expected - outputs).max():.2g} "
            f"apart): {SERIALIZABLE}"
        )


SERIALIZABLE = (
    "decorate each class of your own with @keras.saving.register_keras_serializable(), and give it a get_config that "
    "returns all its arguments as plain values"
)
INSTEAD_OF_LAMBDA = (
    "write the Lambda layer as a class with @keras.saving.register_keras_serializable(), or use a layer of Keras"
)


def _flat_outputs(net: keras.Model, images: Array) -> Array:
    tensors = keras.tree.flatten(net(images, training=False))
    return np.concatenate([keras.ops.convert_to_numpy(each).astype(np.float64).ravel() for each in tensors])


# --- which hyperparameters are read -----------------------------------------------------------------------


class ReadHyperparameters(dict[str, Any]):
    """The hyperparameters that a user's own function gets, with the names that it reads in `read`.

    Whoever takes all of them, as ``f(**hyperparameters)`` does, reads all.
    """

    def __init__(self, hyperparameters: Mapping[str, Any]) -> None:
        super().__init__(hyperparameters)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().setdefault(name, default)

    def popitem(self) -> tuple[str, Any]:
        self._read_all()
        return super().popitem()

    def pop(self, name: str, *default: Any) -> Any:
        self.read.add(name)
        return super().pop(name, *default)

    def _read_all(self) -> None:
        self.read.update(super().keys())

    def __iter__(self) -> Iterator[str]:
        self._read_all()
        return super().__iter__()

    def keys(self) -> Any:
        self._read_all()
        return super().keys()

    def values(self) -> Any:
        self._read_all()
        return super().values()

    def items(self) -> Any:
        self._read_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        self._read_all()
        return super().copy()

    def __or__(self, other: Any) -> Any:
        self._read_all()
        return super().__or__(other)

    def __ror__(self, other: Any) -> Any:
        self._read_all()
        return super().__ror__(other)


def _check_reads(definition: Definition, first: Mapping[str, Any], dataset: Dataset) -> list[str]:
    """Raises ModelError if a searched hyperparameter is read at no point; notes those of [fixed]."""
    unread = {name for name in (*definition.space, *definition.fixed) if name not in NOT_OF_THE_MODEL}
    for hyperparameters in (
        first,
        *(recipe.of_trial(definition, 0, each).hyperparameters for each in _points(definition)),
    ):
        unread -= _names_read(definition.model, hyperparameters, dataset)
        if not unread:
            return []
    function = definition.model
    searched = [name for name in definition.space if name in unread]
    if searched:
        raise ModelError(
            f"{function} never reads the hyperparameter {' or '.join(searched)}, so a search over it would find "
            "nothing: read it in the function, or leave it out of [space]"
        )
    fixed = [name for name in definition.fixed if name in unread]
    return [f"{function} never reads {' and '.join(fixed)} of [fixed]"]


def _points(definition: Definition) -> Iterator[Point]:
    yield low_point(definition.space)
    yield high_point(definition.space)
    random = Random(0)
    for _ in range(TRIES):
        yield random_point(definition.space, random)


def _names_read(name: str, hyperparameters: Mapping[str, Any], dataset: Dataset) -> set[str]:
    """The hyperparameters that the function or the training reads at this point."""
    noted = ReadHyperparameters(hyperparameters)
    keras.backend.clear_session()
    try:
        net = call_own(name, noted, dataset.image_shape, dataset.classes)
    except ModelError:  # not every combination must be possible; a trial of this one fails with the reason
        return noted.read
    used_in_training = {"batch_size"} if net.compiled else set(model_rules.TRAINING)
    return noted.read | used_in_training
