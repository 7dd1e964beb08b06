"""`check` tries a user's own model before a trial is spent. The models train, are saved and are loaded for real."""

from collections.abc import Callable
from typing import Any

import keras
import pytest

from search import data, own_model, trainer_process
from search.errors import ModelError
from search.model import build
from search.own_model import ReadHyperparameters
from studies.definition import Data, Definition, parse
from studies.space import low_point

OWN = """
import keras
from keras import layers

def _net(shape, classes, *body, last="softmax", dtype="float32"):
    return keras.Sequential([keras.Input(shape), layers.Rescaling(1 / 255), *body, layers.Flatten(),
                             layers.Dense(classes, activation=last, dtype=dtype)])

def good(h, shape, classes):
    return _net(shape, classes, layers.Conv2D(h.get("filters", 2), 3))

def short(h, shape, classes):
    return _net(shape, classes, dtype=None)

def logits(h, shape, classes):
    return _net(shape, classes, last=None)

def own_logits(h, shape, classes):
    net = _net(shape, classes, last=None)
    net.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return net

def sparse(h, shape, classes):
    net = _net(shape, classes)
    net.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return net

def sparse_in_a_list(h, shape, classes):
    net = _net(shape, classes)
    net.compile("adam", ["sparse_categorical_crossentropy"], metrics=["accuracy"])
    return net

def own_loss(h, shape, classes):
    def numbers(true, predicted):
        return keras.losses.sparse_categorical_crossentropy(true, predicted)

    net = _net(shape, classes)
    net.compile("adam", numbers, metrics=["accuracy"])
    return net

def wrong_loss(h, shape, classes):
    net = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(classes + 1)])
    net.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return net

def without_accuracy(h, shape, classes):
    net = _net(shape, classes)
    net.compile("adam", "categorical_crossentropy")
    return net

class Applied(layers.Layer):
    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def call(self, x):
        return self.function(x)

def unsaveable(h, shape, classes):
    return _net(shape, classes, Applied(lambda x: 2 * x))

def with_lambda(h, shape, classes):
    return _net(shape, classes, layers.Lambda(lambda x: 2 * x))

@keras.saving.register_keras_serializable()
class Forgetful(layers.Layer):
    def __init__(self, factor=1.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):
        return {"name": self.name}

def forgetful(h, shape, classes):
    return _net(shape, classes, Forgetful(factor=3.0))

class Double(layers.Layer):
    def call(self, x):
        return 2 * x

def unregistered(h, shape, classes):
    return _net(shape, classes, Double())

def slow_averages(h, shape, classes):
    return _net(shape, classes, layers.BatchNormalization(momentum=0.9999))

def conditional(h, shape, classes):
    return _net(shape, classes, *([layers.Dropout(h["rate"])] if h["kind"] == "dropout" else []))

def impossible(h, shape, classes):
    return _net(shape, classes, layers.Conv2D(2, 100 if h["size"] == 1 else 3))

@keras.saving.register_keras_serializable()
class OwnStep(keras.Model):
    # It trains in its own way, and is evaluated in that of Keras, which updates no metric of it.
    def __init__(self, classes, **options):
        super().__init__(**options)
        self.classes = classes
        self.flat = layers.Flatten()
        # It answers class 0 for every image.
        self.dense = layers.Dense(
            classes,
            "softmax",
            kernel_initializer="zeros",
            bias_initializer=lambda shape, dtype=None: 3 * keras.ops.one_hot(0, shape[0]),
        )
        self.counted = keras.metrics.CategoricalAccuracy(name="accuracy")

    def call(self, x):
        return self.dense(self.flat(x))

    def train_step(self, pair):
        x, y = pair
        predicted = self(x, training=True)
        self.counted.update_state(y, predicted)
        return {"loss": self.compute_loss(x, y, predicted), "accuracy": self.counted.result()}

    def get_config(self):
        return {"classes": self.classes}

def own_step(h, shape, classes):
    net = OwnStep(classes)
    net.compile("sgd", "categorical_crossentropy")
    return net

def averaged(h, shape, classes):
    net = _net(shape, classes)
    net.compile(keras.optimizers.Adam(use_ema=True), "categorical_crossentropy", metrics=["accuracy"])
    return net

def with_default(h, shape, classes):
    return _net(shape, classes, layers.Conv2D(h.setdefault("filters", 2), 3))

def unpacked(h, shape, classes):
    def of(filters=2, **rest):
        return _net(shape, classes, layers.Conv2D(filters, 3))
    return of(**h)
"""


@pytest.fixture
def check(write_module: Callable[[str, str], None], write_npz: Callable[..., Any]) -> Callable[..., tuple[str, ...]]:
    write_module("own_models", OWN)
    dataset = data.load(str(write_npz()), Data(), [])

    def run(function: str, policy: str = "float32", **changes: str) -> tuple[str, ...]:
        definition = _definition(function, **changes)
        first = {**definition.fixed, **low_point(definition.space)}
        return own_model.check(definition, first, dataset, policy)

    yield run
    keras.config.set_dtype_policy("float32")


def _definition(
    function: str, space: str = "learning_rate = { low = 1e-3, high = 1e-2 }", more: str = ""
) -> Definition:
    return parse(
        f'name = "own"\ndataset = "small.npz"\nmodel = "own_models:{function}"\n'
        f"budget.trials = 1\n{more}\n[space]\n{space}"
    )


FILTERS = "filters = { low = 2, high = 4 }"


@pytest.mark.parametrize(
    ("function", "space"),
    [
        ("good", FILTERS),
        ("unpacked", FILTERS),
        ("with_default", FILTERS),
        ("good", "batch_size = { low = 8, high = 16 }"),
        (
            "conditional",
            'kind = { choices = ["none", "dropout"] }\nrate = { low = 0.1, high = 0.5, when.kind = "dropout" }',
        ),
        ("impossible", "size = { choices = [0, 1] }"),
    ],
)
def test_a_good_model_passes_without_a_note(check: Callable[..., Any], function: str, space: str) -> None:
    assert check(function, space=space) == ()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("logits", r"must give probabilities, .* sum to .*: end it with layers.Activation\(\"softmax\""),
        ("wrong_loss", r"cannot be trained and evaluated on a batch of 16 .* of the shape \(16, 10\) \(ValueError"),
        (
            "own_loss",
            r"cannot be trained .* or its loss, which gets class numbers only if its name begins with sparse_",
        ),
        (
            "own_step",
            r"reports an accuracy of 0.0000 for 16 images, and answers 0\.\d+ of them right: a train_step of its own",
        ),
        ("averaged", r"an optimizer that has use_ema=True, whose averages would replace the weights"),
        ("without_accuracy", r"trials are judged by the metric accuracy"),
        ("unsaveable", r"cannot be saved \(NotImplementedError: .*get_config"),
        ("with_lambda", r"can be saved, but not loaded again .*: write the Lambda layer as a class with"),
        ("unregistered", r"can be saved, but not loaded again .*: decorate each class of your own with @keras.saving"),
        ("forgetful", r"gives other outputs after it was saved and loaded .* apart\): .* get_config"),
        ("slow_averages", r"BatchNormalization of momentum 0.9999: .* 10,000 batches to follow: choose at most 0.999"),
    ],
)
def test_a_model_that_cannot_serve_a_search_is_refused(check: Callable[..., Any], function: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check(function)
    assert "\n" not in str(caught.value)


def test_probabilities_in_bfloat16_are_refused_where_the_definition_asks_for_it(check: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r'probabilities in bfloat16, .* dtype="float32", or write precision'):
        check("short", policy="mixed_bfloat16")
    assert check("short") == ()
    assert check("good", policy="mixed_bfloat16", space=FILTERS) == ()


def test_a_loss_that_takes_logits_may_have_them(check: Callable[..., Any]) -> None:
    assert "probabilities" in check("own_logits", space="batch_size = { low = 8, high = 16 }")[0]


@pytest.mark.parametrize(
    ("function", "unread"),
    [
        ("good", "units = { low = 1, high = 9 }"),
        pytest.param("sparse", "learning_rate = { low = 0.1, high = 1.0 }", marks=pytest.mark.long),
    ],
)
def test_a_searched_hyperparameter_that_nobody_reads_is_refused(
    check: Callable[..., Any], function: str, unread: str
) -> None:
    with pytest.raises(ModelError, match=f"never reads the hyperparameter {unread.split()[0]}, .* leave it out"):
        check(function, space=f"batch_size = {{ low = 8, high = 16 }}\n{unread}")


@pytest.mark.long
def test_a_fixed_hyperparameter_that_nobody_reads_is_noted(check: Callable[..., Any]) -> None:
    assert "never reads unit of [fixed]" in check("good", space=FILTERS, more="fixed.unit = 3")[0]


def test_every_way_to_read_a_hyperparameter_is_noticed() -> None:
    def read(use: Callable[[dict[str, Any]], object]) -> set[str]:
        noted = ReadHyperparameters({"a": 1, "b": 2})
        use(noted)
        return noted.read

    for use in (lambda h: h["a"], lambda h: h.get("a"), lambda h: h.pop("a"), lambda h: "a" in h):
        assert read(use) == {"a"}
    for use in (
        lambda h: dict(**h),
        lambda h: {**h},
        dict,
        list,
        lambda h: h.copy(),
        lambda h: h | {},
        lambda h: {} | h,
    ):
        assert read(use) == {"a", "b"}
    assert read(len) == set()


def test_a_keras_json_with_channels_first_does_not_matter() -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        trainer_process._configure_keras()
        assert build("convnet", {"depth": 3, "width": 0.1}, (28, 28, 1), 10).output_shape == (None, 10)
    finally:
        keras.config.set_image_data_format("channels_last")


def test_labels_have_the_form_of_the_loss(check: Callable[..., Any]) -> None:
    for function in ("sparse", "sparse_in_a_list"):
        assert check(function, space="batch_size = { low = 8, high = 16 }") == ()
