"""The notebook's models to the parameter, own models by name, and Keras's numbers from the faster layers."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from search import layers
from search.errors import MachineError, ModelError
from search.model import build, summary, targets
from studies import definition as definitions
from studies import model_rules

MNIST = (28, 28, 1)


@pytest.fixture(autouse=True)
def _float32() -> None:
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("name", "hyperparameters", "parameters", "not_trained"),
    [
        ("convnet", {"depth": 3}, 668_810, 0),
        ("convnet", {"depth": 3, "dropout": 0.0}, 668_810, 0),
        ("convnet", {"depth": 5}, 154_186, 320),
        ("convnet", {"depth": 7}, 2_980_682, 384),
        ("convnet", {"depth": 7, "dropout": 0.2}, 2_980_682, 384),
        ("mnist_cnn", {}, 1_199_882, 0),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_the_notebook_s_values_give_the_notebook_s_models(
    name: str, hyperparameters: dict[str, Any], parameters: int, not_trained: int, plain: bool
) -> None:
    model = build(name, hyperparameters, MNIST, 10, plain=plain)
    assert model.count_params() == parameters
    assert sum(int(np.prod(weight.shape)) for weight in model.non_trainable_weights) == not_trained


def test_a_summary_has_each_layer_and_all_weights() -> None:
    lines = summary(build("convnet", {"depth": 5, "dropout": 0.1}, MNIST, 10)).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["layer", "output", "weights"],
        ["Rescaling", "28x28x1", "0"],
        ["Conv2D", "26x26x32", "320"],
    ]
    assert ["BatchNormalization", "8x8x32", "128"] in [line.split() for line in lines]
    assert lines[-1].split() == ["all", "154,186"]
    assert len(set(map(len, lines))) == 1


def test_a_summary_of_an_own_kind_of_model_says_what_is_known() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.dense, self.idle = (
                keras.layers.Flatten(),
                keras.layers.Dense(10),
                keras.layers.Dense(10),
            )

        def call(self, images: Any) -> Any:
            return self.dense(self.flat(images))

    model = Own()
    model(np.zeros((1, 8, 8, 1)))
    rows = [tuple(line.split()) for line in summary(model).splitlines()]
    assert sorted(rows[1:]) == [("Dense", "?", "650"), ("Dense", "?", "?"), ("Flatten", "?", "0"), ("all", "650")]


def _rates(hyperparameters: dict[str, Any], name: str = "convnet") -> list[tuple[str, float]]:
    """Each dropout layer: what it follows, and its rate."""
    model = build(name, hyperparameters, MNIST, 10)
    return [
        (type(before).__name__, layer.rate)
        for before, layer in zip(model.layers, model.layers[1:], strict=False)
        if isinstance(layer, keras.layers.Dropout)
    ]


def test_dropout_layers_are_where_the_notebook_has_them() -> None:
    conv, dense, pool = "Conv2D", "Dense", "MaxPooling2D"
    assert _rates({"depth": 3}) == []
    assert _rates({"depth": 3, "dropout": 0.0}) == [(conv, 0.0), (dense, 0.0)]
    assert _rates({"depth": 3, "dense_dropout": 0.07}) == [(dense, 0.07)]
    assert _rates({"depth": 5, "dropout": 0.3}) == [(pool, 0.3), (pool, 0.3)]
    assert _rates({"depth": 7, "dropout": 0.2}) == [(conv, 0.2), (conv, 0.2)]
    assert _rates({"depth": 7, "conv_dropout": 0.1, "dense_dropout": 0.5}) == [(conv, 0.1), (conv, 0.1), (dense, 0.5)]
    assert _rates({"depth": 3, "dropout": 0.4, "dropout_layers": False}) == []
    assert _rates({}, "mnist_cnn") == [(pool, 0.25), (dense, 0.5)]
    assert _rates({"conv_dropout": 0.1, "dropout": 0.3}, "mnist_cnn") == [(pool, 0.1), (dense, 0.3)]


def test_depth_seven_drops_after_its_third_and_fifth_convolution() -> None:
    kinds = [type(layer).__name__ for layer in build("convnet", {"depth": 7, "dropout": 0.2}, MNIST, 10).layers]
    assert kinds == [
        "Rescaling",
        *("Conv2D", "Conv2D", "Conv2D", "Dropout", "Conv2D", "Conv2D", "Dropout", "BatchNormalization"),
        *("Conv2D", "Conv2D", "BatchNormalization", "Flatten", "Dense", "Dense", "Activation"),
    ]


@pytest.mark.parametrize(("name", "depth"), [("convnet", 3), ("convnet", 5), ("convnet", 7), ("mnist_cnn", None)])
def test_the_smallest_image_is_the_smallest_that_can_be_built(name: str, depth: int | None) -> None:
    smallest = model_rules.smallest_image(name, depth)
    hyperparameters = {} if depth is None else {"depth": depth}
    build(name, hyperparameters, (smallest, smallest, 1), 10)
    with pytest.raises(ModelError, match="too small for its convolutions"):
        build(name, hyperparameters, (smallest - 1, smallest - 1, 1), 10)


@pytest.mark.parametrize("optimizer", model_rules.OPTIMIZERS)
def test_every_optimizer_that_a_definition_may_name_can_be_built(optimizer: str) -> None:
    training = {"optimizer": optimizer, "learning_rate": 0.5, "weight_decay": 0.01, "label_smoothing": 0.1}
    model = build("mnist_cnn", training | {"width": 0.1}, (8, 8, 1), 10)
    assert type(model.optimizer).__name__.lower() == optimizer
    assert float(model.optimizer.learning_rate) == pytest.approx(0.5)
    assert model.optimizer.weight_decay == 0.01
    assert model.loss.label_smoothing == 0.1


@pytest.mark.long
def test_every_hyperparameter_that_a_definition_may_name_is_used() -> None:
    """Changing any one of them changes the model's configuration or its optimizer's."""
    values = {
        "depth": 5,
        "dropout": 0.4,
        "conv_dropout": 0.4,
        "dense_dropout": 0.4,
        "dropout_layers": False,
        "batch_norm": True,
        "batch_norm_momentum": 0.5,
        "width": 0.5,
        "learning_rate": 0.3,
        "optimizer": "rmsprop",
        "momentum": 0.3,
        "weight_decay": 0.3,
        "label_smoothing": 0.3,
        "schedule": "cosine",
        "warmup_epochs": 1,
        "global_pooling": True,
        "dense_units": 16,
        "shift": 0.1,
        "rotate": 10.0,
        "zoom": 0.1,
        "flip": True,
    }
    base = {"depth": 3, "dropout": 0.1, "optimizer": "sgd"}

    def configuration(hyperparameters: dict[str, Any]) -> str:
        keras.backend.clear_session()
        model = build("convnet", hyperparameters, MNIST, 10)
        return str((model.get_config(), model.optimizer.get_config(), model.loss.get_config()))

    rules = model_rules.rules("convnet")
    assert rules is not None
    of_training = {"batch_size", "batch_norm_averages", "patience_epochs"}
    assert set(values) | of_training == set(rules)
    normed = base | {"batch_norm": True, "batch_norm_momentum": 0.9}
    starts = {"batch_norm_momentum": (normed, configuration(normed))}
    usual = (base, configuration(base))
    assert configuration(base) == usual[1], "the same hyperparameters have the same configuration"
    for name, value in values.items():
        start, before = starts.get(name, usual)
        assert configuration(start | {name: value}) != before, name


@pytest.mark.parametrize(
    ("hyperparameters", "rates"),
    [
        ({}, {0: 1.0, 99: 1.0}),
        ({"warmup_epochs": 2}, {0: 1 / 21, 10: 0.5 + 0.5 / 21, 20: 1.0, 99: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "warmup_epochs": 2}, {0: 1 / 21, 20: 1.0, 60: 0.5, 100: 0.0}),
        ({"schedule": "one_cycle"}, {0: 0.04, 15: 0.52, 30: 1.0, 65: 0.5, 100: 4e-6}),
    ],
)
def test_the_learning_rate_follows_its_schedule(hyperparameters: dict[str, Any], rates: dict[int, float]) -> None:
    model = build("mnist_cnn", hyperparameters | {"width": 0.1, "learning_rate": 1.0}, (8, 8, 1), 10, steps=(10, 10))
    for step, rate in rates.items():
        model.optimizer.iterations.assign(step)
        assert float(model.optimizer.learning_rate) == pytest.approx(rate, abs=1e-3 if 0.01 < rate < 1 else 1e-7), step


@pytest.mark.parametrize(("name", "depth", "weights"), [("mnist-best", 5, 88_522), ("mnist-tiny", 5, 9_190)])
def test_the_small_models_of_the_catalog_are_small(name: str, depth: int, weights: int) -> None:
    definition = definitions.load(name)
    point = dict(definition.points[0])
    assert {**definition.fixed, **point}["depth"] == depth
    assert build("convnet", definition.fixed | point, MNIST, 10).count_params() == weights


def test_augmentation_changes_training_images_only_and_is_not_saved() -> None:
    changes = {"depth": 5, "width": 0.1, "shift": 0.1, "rotate": 15.0, "zoom": 0.1}
    model = build("convnet", changes, MNIST, 10)
    names = [type(layer).__name__ for layer in model.layers]
    assert names[:5] == ["Rescaling", "RandomRotation", "RandomZoom", "RandomTranslation", "Conv2D"]
    plain = build("convnet", changes, MNIST, 10, plain=True)
    assert not any("Random" in type(layer).__name__ for layer in plain.layers)
    plain.set_weights(model.get_weights())
    x = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1)).astype("float32")
    assert np.array_equal(model(x, training=False), plain(x, training=False))

    image = np.zeros((64, 28, 28, 1), dtype="float32")
    image[:, 10:18, 10:18] = 255.0
    for name, layer in zip(("rotate", "zoom", "shift"), model.layers[1:4], strict=True):
        changed = keras.ops.convert_to_numpy(layer(image / 255.0, training=True))
        assert len(np.unique(changed.reshape(64, -1), axis=0)) > 32, f"{name}: each image has a change of its own"
        assert changed.min() >= 0.0
        assert changed.max() <= 1.0 + 1e-6
    moved = keras.ops.convert_to_numpy(model.layers[3](image / 255.0, training=True))
    centres = (moved.sum(axis=2)[..., 0] * np.arange(28)).sum(axis=1) / moved.sum(axis=(1, 2, 3))
    assert 1.5 < np.abs(centres - 13.5).max() <= 2.8 + 1e-3  # a tenth of 28


def test_augmentation_is_computed_in_float32() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = build("convnet", {"depth": 5, "width": 0.1, "shift": 0.1, "rotate": 15.0, "zoom": 0.1}, MNIST, 10)
    keras.config.set_dtype_policy("float32")
    assert [layer.compute_dtype for layer in model.layers[:5]] == ["bfloat16", *["float32"] * 3, "bfloat16"]
    model.fit(np.zeros((4, *MNIST), dtype="uint8"), np.eye(10)[:4], verbose=0)


@pytest.mark.parametrize(("units", "pooled"), [(128, False), (128, True), (0, True), (16, False)])
def test_the_hidden_layer_and_what_comes_before_it(units: int, pooled: bool) -> None:
    hyperparameters = {"depth": 5, "dense_units": units, "global_pooling": pooled, "dense_dropout": 0.5}
    model = build("convnet", hyperparameters, MNIST, 10)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert ("GlobalAveragePooling2D" in kinds) == pooled == ("Flatten" not in kinds)
    assert [layer.units for layer in model.layers if isinstance(layer, keras.layers.Dense)] == [units, 10][not units :]
    assert ("Dropout" in kinds) == (units > 0)


def test_softmax_is_in_float32_whatever_the_rest() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = build("convnet", {"depth": 5, "width": 0.1}, MNIST, 10)
    probabilities = model.predict(np.zeros((2, *MNIST), dtype=np.uint8), verbose=0)
    assert probabilities.dtype == np.float32
    assert probabilities.sum(axis=1) == pytest.approx([1.0, 1.0], abs=1e-6)


# --- the faster layers ------------------------------------------------------------------------------------


def _trained_once(layer: Any, inputs: Any) -> tuple[Any, Any, Any]:
    """Outputs, the gradient of a weighted sum of them for the inputs, and the weights afterwards."""
    import tensorflow as tf

    weights = tf.constant(np.random.default_rng(1).normal(size=inputs.shape).astype("float32"))
    x = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x, training=True)
        total = tf.reduce_sum(tf.cast(outputs, "float32") * weights)
    return outputs.numpy(), tape.gradient(total, x).numpy(), layer.get_weights()


def test_fused_batch_normalisation_is_keras_s() -> None:
    inputs = np.random.default_rng(0).normal(2.0, 3.0, size=(16, 5, 5, 4)).astype("float32")
    ours, theirs = layers.BatchNormalization(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for layer in (ours, theirs):
        layer.build(inputs.shape)
        layer.set_weights([np.array(w, dtype="float32") for w in ([1, 2, 3, 4], [4, 3, 2, 1], [0] * 4, [1] * 4)])
    for mine, reference in zip(_trained_once(ours, inputs), _trained_once(theirs, inputs), strict=True):
        for one, other in zip(mine, reference, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours(inputs), theirs(inputs), rtol=1e-5, atol=1e-5)  # with the moving averages


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.7])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    layer = layers.Dropout(rate, seed=3)
    inputs = np.ones((101, 99, 31), dtype="float32")  # an odd number of values: the last random word is cut
    outputs, gradient, _ = _trained_once(layer, inputs)
    dropped = outputs == 0.0
    # Five standard deviations of a binomial share.
    assert abs(dropped.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / inputs.size)
    assert outputs[~dropped] == pytest.approx(1 / (1 - rate), rel=1e-4)
    assert np.array_equal(gradient == 0.0, dropped), "what was dropped learns nothing"
    assert np.array_equal(layer(inputs, training=False), inputs)
    assert not np.array_equal(layer(inputs, training=True), outputs), "each batch has a mask of its own"


def test_dropout_s_mask_is_a_function_of_its_seed() -> None:
    inputs = np.ones((8, 100), dtype="float32")
    one, same, other = (layers.Dropout(0.5, seed=seed)(inputs, training=True) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_neighbouring_values_are_dropped_independently() -> None:
    """Two 16-bit numbers come from one 32-bit word."""
    outputs = np.asarray(layers.Dropout(0.5, seed=0)(np.ones((200_000, 2), dtype="float32"), training=True))
    left, right = (outputs == 0.0).T
    assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(200_000)


def test_a_plain_model_takes_the_weights_and_gives_the_same_predictions() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(5, *MNIST), dtype=np.uint8)
    hyperparameters = {"depth": 7, "dropout": 0.3, "width": 0.25}
    ours = build("convnet", hyperparameters, MNIST, 10)
    ours.fit(images, np.eye(10)[:5], verbose=0)
    plain = build("convnet", hyperparameters, MNIST, 10, plain=True)
    assert {type(layer).__module__.partition(".")[0] for layer in plain.layers} == {"keras"}
    plain.set_weights(ours.get_weights())
    assert np.array_equal(plain.predict(images, verbose=0), ours.predict(images, verbose=0))


def test_targets_are_keras_s_one_hot_vectors_in_float32() -> None:
    model, labels = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]), np.array([2, 0, 1, 2])
    model.compile(loss=keras.losses.CategoricalCrossentropy())
    one_hot = targets(model, labels, 4)
    assert one_hot.dtype == np.float32
    assert np.array_equal(one_hot, keras.utils.to_categorical(labels, 4))
    model.compile(loss="sparse_categorical_crossentropy")
    assert targets(model, labels, 4) is labels


# --- a user's own -----------------------------------------------------------------------------------------

OWN = """
import keras

def linear(hyperparameters, image_shape, classes):
    model = keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), keras.layers.Dense(classes)])
    if hyperparameters.get("compiled"):
        model.compile(optimizer="sgd", loss="mse")
    return model

def broken(hyperparameters, image_shape, classes):
    raise ValueError("no such\\nlayer")

def nothing(hyperparameters, image_shape, classes):
    return None
"""


@pytest.fixture
def _own(write_module: Callable[[str, str], None]) -> None:
    write_module("own_model", OWN)


@pytest.mark.usefixtures("_own")
def test_an_own_model_is_built_with_its_hyperparameters_and_compiled_by_ours() -> None:
    model = build("own_model:linear", {"optimizer": "sgd", "learning_rate": 0.3}, (4, 4, 1), 3)
    assert model.output_shape == (None, 3)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.3)


@pytest.mark.usefixtures("_own")
def test_an_own_model_that_is_compiled_stays_as_it_is() -> None:
    assert build("own_model:linear", {"compiled": True}, (4, 4, 1), 3).loss == "mse"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere:build", MachineError, r"nowhere:build cannot be imported \(ModuleNotFoundError"),
        ("own_model:none", MachineError, r"own_model:none cannot be imported \(AttributeError"),
        ("own_model:broken", ModelError, r"own_model:broken failed to build .*\(ValueError: no such layer\)"),
        ("own_model:nothing", ModelError, r"own_model:nothing returned a NoneType: it must return a keras.Model"),
    ],
)
@pytest.mark.usefixtures("_own")
def test_an_own_model_that_fails_is_named(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        build(name, {}, (4, 4, 1), 3)
    assert "\n" not in str(caught.value)
