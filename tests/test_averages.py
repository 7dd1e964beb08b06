"""Scores are fair from the first epoch: a model is judged with the statistics of the last batches of its training."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search import averages, data
from search.averages import MovingAverages
from search.data import Dataset
from search.messages import Epoch
from search.model import build
from search.training_loop import train
from storage.artifacts import MODEL
from studies.definition import Data

MOMENTUM = 0.9


@pytest.fixture(autouse=True)
def _float32() -> None:
    keras.backend.clear_session()
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)


@pytest.fixture
def dataset(write_npz: Callable[..., Path]) -> Dataset:
    """240 training and 60 validation images of 8x8."""
    return data.load(str(write_npz()), Data(validation=0.2), [])


def _weighted(values: list[Any]) -> Any:
    """The mean of the batches, where batch i of k has the weight m^(k - i)."""
    weights = [MOMENTUM ** (len(values) - 1 - index) for index in range(len(values))]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize(("batches", "before"), [(1, 0), (2, 0), (7, 0), (3, 20)])
def test_the_averages_of_some_batches_are_their_weighted_mean(batches: int, before: int) -> None:
    layer = keras.layers.BatchNormalization(momentum=MOMENTUM)
    net = keras.Sequential([keras.Input((4, 4, 3)), layer])
    moving = averages.of_builtin(net)
    random = np.random.default_rng(0)
    inputs = [random.normal(5.0, 3.0, size=(8, 4, 4, 3)).astype("float32") for _ in range(before + batches)]
    for batch in inputs[:before]:
        net(batch * 10.0, training=True)
    noted = moving.now()
    for batch in inputs[before:]:
        net(batch, training=True)
    raw = net.get_weights()
    with moving.of_batches(noted, moving.now(), batches):
        mean, variance = map(keras.ops.convert_to_numpy, (layer.moving_mean, layer.moving_variance))
    last = inputs[before:]
    np.testing.assert_allclose(mean, _weighted([batch.mean(axis=(0, 1, 2)) for batch in last]), rtol=1e-4)
    np.testing.assert_allclose(variance, _weighted([batch.var(axis=(0, 1, 2)) for batch in last]), rtol=1e-3)
    for now, was in zip(net.get_weights(), raw, strict=True):
        assert np.array_equal(now, was), "the training goes on with Keras's own averages"


@pytest.mark.parametrize(
    ("trained", "epoch", "batch_size", "batches"),
    [
        (9, 9, 128, 4),  # 512 images
        (9, 9, 500, 2),  # two batches are the least
        (200, 9, 128, 9),  # an epoch is the most
        (1, 1, 128, 1),
        (320, 32, 128, 20),  # a sixteenth of the batches so far
    ],
)
def test_the_window_is_short_while_a_model_learns_fast(trained: int, epoch: int, batch_size: int, batches: int) -> None:
    assert averages.window(trained, epoch, batch_size) == batches


# (batches run in one go, batches that count): 100 images are 12 batches of 8 and a smaller one, which does not count
# unless it cannot be told apart.
@pytest.mark.parametrize(("in_one_go", "counted"), [(1, slice(10, 12)), (4, slice(8, 12)), (20, slice(0, 13))])
def test_a_model_is_judged_with_its_last_whole_batches(
    in_one_go: int, counted: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averages, "LEAST_IMAGES", 16)
    layer = keras.layers.BatchNormalization(momentum=MOMENTUM)
    net = keras.Sequential([keras.Input((2,)), layer, keras.layers.Dense(1)])
    net.compile("sgd", "mse", steps_per_execution=in_one_go)
    moving = averages.of_builtin(net)
    x = np.random.default_rng(0).normal(5.0, 3.0, size=(100, 2)).astype("float32")
    last = averages.LastBatches(moving, images=100, batch_size=8, trained=0)
    net.fit(x, np.zeros((100, 1)), batch_size=8, shuffle=False, verbose=0, callbacks=[last])
    with last.applied():
        mean = keras.ops.convert_to_numpy(layer.moving_mean)
    batches = [x[start : start + 8] for start in range(0, 100, 8)][counted]
    np.testing.assert_allclose(mean, _weighted([batch.mean(axis=0) for batch in batches]), rtol=1e-4)


JAX = """
import keras, numpy as np
from search import averages
assert keras.backend.backend() == "jax"
layer = keras.layers.BatchNormalization(momentum=0.9)
net = keras.Sequential([keras.Input((2,)), layer, keras.layers.Dense(1)])
net.compile("sgd", "mse")
x = np.random.default_rng(0).normal(5.0, 3.0, size=(800, 2)).astype("float32")
last = averages.LastBatches(averages.of_builtin(net), images=800, batch_size=256, trained=0)
net.fit(x, np.zeros((800, 1)), batch_size=256, shuffle=False, verbose=0, callbacks=[last])
with last.applied():
    mean = keras.ops.convert_to_numpy(layer.moving_mean)
one, two = x[256:512].mean(axis=0), x[512:768].mean(axis=0)
np.testing.assert_allclose(mean, (0.9 * one + two) / 1.9, rtol=1e-4)
"""


@pytest.mark.long
def test_the_last_batches_are_seen_on_jax() -> None:
    """JAX keeps the averages in a state of its own while a fit runs."""
    subprocess.run([sys.executable, "-c", JAX], env=os.environ | {"KERAS_BACKEND": "jax"}, check=True, timeout=300)


def _shared(h: Any) -> keras.Model:
    """One layer that is called twice, one that is frozen, and one in a model inside the model."""
    images = keras.Input((8, 8, 1))
    twice = keras.layers.BatchNormalization(momentum=MOMENTUM, name="twice")
    frozen = keras.layers.BatchNormalization(name="frozen", trainable=False, moving_mean_initializer="ones")
    inner = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.BatchNormalization(name="inner")])
    x = twice(keras.layers.Rescaling(1 / 255)(images))
    x = inner(frozen(twice(x)))
    x = keras.layers.Dropout(0.1)(x)
    net = keras.Model(images, keras.layers.Dense(10, "softmax")(keras.layers.Flatten()(x)))
    net.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return net


def _batch(dataset: Dataset) -> tuple[Any, Any]:
    return dataset.x_train[:32], np.eye(10)[dataset.y_train[:32]]


def test_it_is_measured_how_often_a_step_updates_each_layer_of_an_own_model(dataset: Dataset) -> None:
    net = _shared({})
    x, y = _batch(dataset)
    before = net.get_weights()
    moving = averages.of_own(net, lambda: net.fit(x, y, batch_size=32, verbose=0))
    assert {one.layer.name: one.updates for one in moving._averages} == {"twice": 2, "inner": 1}
    for was, now in zip(before, net.get_weights(), strict=True):
        assert np.array_equal(was, now), "looking changes nothing"
    # Without the measurement the same model trains to the same weights: the random generators were restored.
    net.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    other = _shared({})
    other.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for one, two in zip(net.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_model_without_batch_normalisation_is_not_touched(dataset: Dataset) -> None:
    net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10, "softmax")])
    net.compile("adam", "categorical_crossentropy")

    def train_one_batch() -> None:
        raise AssertionError("there is nothing to find out")

    assert averages.of_own(net, train_one_batch)._averages == ()


OWN = """
import keras
from search.model import build as ours

def build(h, image_shape, classes):
    net = ours("convnet", {"depth": 5, "width": 0.25}, image_shape, classes, plain=True)
    return net
"""


def _train(dataset: Dataset, folder: Path, **changed: Any) -> list[Epoch]:
    records: list[Epoch] = []
    arguments: dict[str, Any] = {
        "model": "convnet",
        "hyperparameters": {"depth": 5, "width": 0.25, "batch_size": 32},
        "dataset": dataset,
        "epochs": 3,
        "seed": 1,
        "precision": ("float32", ""),
        "folder": folder,
        "on_epoch": records.append,
        "stopping": lambda: None,
    }
    train(**arguments | changed)
    return records


@pytest.fixture
def enlarged(write_npz: Callable[..., Path]) -> Dataset:
    """The same images at 24x24, which depth 5 needs."""
    images = np.load(write_npz())["x_train"].repeat(3, axis=1).repeat(3, axis=2)
    return data.load(str(write_npz("enlarged.npz", x_train=images)), Data(validation=0.2), [])


def test_the_correction_changes_scores_and_not_the_training(enlarged: Dataset, tmp_path: Path) -> None:
    hyperparameters = {"depth": 5, "width": 0.25, "batch_size": 32}
    fair = _train(enlarged, tmp_path / "fair")
    as_keras = _train(enlarged, tmp_path / "keras", hyperparameters=hyperparameters | {"batch_norm_averages": "keras"})
    assert [epoch.loss for epoch in fair] == [epoch.loss for epoch in as_keras]
    assert fair[-1].val_accuracy > as_keras[-1].val_accuracy + 0.2
    assert fair[-1].val_loss < as_keras[-1].val_loss


def test_an_own_model_is_scored_as_fairly_as_ours(
    enlarged: Dataset, tmp_path: Path, write_module: Callable[[str, str], None]
) -> None:
    write_module("mine", OWN)
    records = _train(enlarged, tmp_path, model="mine:build", epochs=4)
    assert records[-1].val_accuracy > 0.5  # with Keras's averages: chance
    saved = keras.models.load_model(tmp_path / MODEL, compile=False)
    right = saved.predict(enlarged.x_validation, verbose=0).argmax(axis=1) == enlarged.y_validation
    assert right.mean() == pytest.approx(max(record.val_accuracy for record in records))


def _reestimated(net: keras.Model, images: Any) -> None:
    """Sets each layer's averages to the mean and variance of its inputs over all `images`, the first layer first."""
    for layer in net.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            inputs = keras.Model(net.inputs, layer.input).predict(images, verbose=0)
            layer.moving_mean.assign(inputs.mean(axis=(0, 1, 2)))
            layer.moving_variance.assign(inputs.var(axis=(0, 1, 2)))


@pytest.mark.mnist
@pytest.mark.long
def test_the_score_of_a_short_run_is_that_of_re_estimated_statistics(mnist_folders: list[Path], tmp_path: Path) -> None:
    """800 images of MNIST and 26 batches: Keras's own averages give chance, the corrected ones what was learned."""
    images = data.load("mnist", Data(limit=1200, validation=400 / 1200), mnist_folders)
    # The last epoch's model is the one that is saved: nothing but one epoch is trained.
    hyperparameters = {"depth": 5, "dropout": 0.2, "batch_size": 32}
    (record,) = _train(images, tmp_path, epochs=1, hyperparameters=hyperparameters)
    saved = keras.models.load_model(tmp_path / MODEL)
    _reestimated(saved, images.x_train)
    right = saved.predict(images.x_validation, verbose=0).argmax(axis=1) == images.y_validation
    assert abs(record.val_accuracy - right.mean()) <= 0.02
    assert record.val_accuracy > 0.5


def test_without_batch_normalisation_nothing_is_changed() -> None:
    with MovingAverages().of_batches([], [], 3):
        pass


def test_depth_five_drops_after_its_pools() -> None:
    kinds = [type(layer).__name__ for layer in build("convnet", {"depth": 5, "dropout": 0.2}, (28, 28, 1), 10).layers]
    assert kinds == [
        *("Rescaling", "Conv2D", "Conv2D", "MaxPooling2D", "Dropout", "Conv2D", "BatchNormalization"),
        *("Conv2D", "MaxPooling2D", "Dropout", "Conv2D", "BatchNormalization", "Flatten", "Dense", "Dense"),
        "Activation",
    ]
