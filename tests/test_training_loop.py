"""Training is a function of its arguments, keeps the best epoch, and stops on request."""

import errno
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import search.training_loop
from search import data
from search.data import Dataset
from search.errors import DataError, ModelError
from search.messages import Batches, Epoch, Repeated, Trained
from search.training_loop import NotANumber, train
from storage.artifacts import CHECKPOINT, HISTORY, MODEL, SUMMARY
from studies.definition import Data

HYPERPARAMETERS = {"width": 0.1, "batch_size": 20, "learning_rate": 1e-2, "dropout": 0.2}


@pytest.fixture
def dataset(write_npz: Callable[..., Path]) -> Dataset:
    """240 training and 60 validation images of 8x8."""
    return data.load(str(write_npz()), Data(validation=0.2), [])


def _train(dataset: Dataset, folder: Path, **changed: Any) -> tuple[Trained, list[Epoch]]:
    records: list[Epoch] = []
    arguments: dict[str, Any] = {
        "model": "mnist_cnn",
        "hyperparameters": HYPERPARAMETERS,
        "dataset": dataset,
        "epochs": 3,
        "seed": 1,
        "precision": ("float32", "the test asks for it"),
        "folder": folder,
        "checkpoints": [folder / CHECKPOINT],
        "identity": {"study": "a", "sources": {"mine:build": "0"}},
        "on_epoch": records.append,
        "stopping": lambda: None,
    }
    return train(**arguments | changed), records


def _probabilities(path: Path, images: Any) -> Any:
    """What the saved model gives; without `predict`, which compiles for a second."""
    return np.asarray(keras.models.load_model(path)(images, training=False))


def _figures(records: list[Epoch]) -> list[tuple[float, ...]]:
    return [(record.loss, record.accuracy, record.val_loss, record.val_accuracy) for record in records]


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_the_same_arguments_give_the_same_numbers(dataset: Dataset, tmp_path: Path, precision: str) -> None:
    (_, one), (_, same), (_, other) = (
        _train(dataset, tmp_path / str(at), seed=seed, precision=(precision, "")) for at, seed in enumerate((1, 1, 2))
    )
    assert _figures(one) == _figures(same)
    assert _figures(one) != _figures(other)


def test_watching_the_batches_changes_no_number(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Batches] = []
    _, plain = _train(dataset, tmp_path / "plain")
    monkeypatch.setattr(search.training_loop, "BATCHES_SECONDS", 0.0)
    _, watched = _train(dataset, tmp_path / "watched", on_batches=batches.append)
    assert _figures(watched) == _figures(plain)
    assert batches == [Batches(epoch=epoch, done=batch, total=12) for epoch in (1, 2, 3) for batch in range(1, 13)]
    monkeypatch.setattr(search.training_loop, "BATCHES_SECONDS", 1000.0)
    batches.clear()
    _train(dataset, tmp_path / "seldom", on_batches=batches.append)
    assert batches == [Batches(epoch=1, done=1, total=12)]


def test_it_learns(dataset: Dataset, tmp_path: Path) -> None:
    trained, records = _train(dataset, tmp_path, epochs=8)
    assert records[-1].loss < records[0].loss
    assert trained.value > 0.7


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends trace in other ways")
def test_a_training_step_is_traced_once(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []
    step = keras.Model.train_step

    def counted(model: keras.Model, batch: object) -> object:
        traced.append(batch)
        return step(model, batch)

    monkeypatch.setattr(keras.Model, "train_step", counted)
    _train(dataset, tmp_path)
    assert len(traced) == 1


def test_every_epoch_is_reported_and_written(dataset: Dataset, tmp_path: Path) -> None:
    trained, records = _train(dataset, tmp_path)
    assert [record.epoch for record in records] == [1, 2, 3]
    assert json.loads((tmp_path / HISTORY).read_text(encoding="utf-8")) == [vars(record) for record in records]
    assert f"{trained.parameters:,}" in (tmp_path / SUMMARY).read_text(encoding="utf-8")
    for record in records:
        assert record.images_per_second == pytest.approx(240 / record.seconds)
    assert trained.seconds == pytest.approx(sum(record.seconds for record in records))
    assert trained.images_per_second == np.median([record.images_per_second for record in records[1:]])
    assert (trained.epochs, trained.stopped, trained.precision) == (3, False, "float32")
    assert trained.versions["keras"] == keras.__version__
    assert trained.data_fingerprint == dataset.fingerprint


def test_the_model_that_is_saved_is_that_of_the_best_epoch(dataset: Dataset, tmp_path: Path) -> None:
    # With such a high learning rate the best epoch is not the last one.
    trained, records = _train(dataset, tmp_path, epochs=8, hyperparameters=HYPERPARAMETERS | {"learning_rate": 0.03})
    accuracies = [record.val_accuracy for record in records]
    assert trained.value == max(accuracies)
    assert trained.best_epoch == accuracies.index(max(accuracies)) + 1
    assert trained.best_epoch < len(records), "choose another seed: here the last epoch was the best"
    predicted = _probabilities(tmp_path / MODEL, dataset.x_validation).argmax(axis=1)
    assert (predicted == dataset.y_validation).mean() == pytest.approx(trained.value)
    assert keras.models.load_model(tmp_path / MODEL).count_params() == trained.parameters


def test_the_saved_model_loads_without_trialyard(dataset: Dataset, tmp_path: Path) -> None:
    trained, _ = _train(dataset, tmp_path)
    np.savez(tmp_path / "validation.npz", x=dataset.x_validation, y=dataset.y_validation)
    code = (
        "import sys, keras, numpy\n"
        "model, arrays = keras.models.load_model('model.keras'), numpy.load('validation.npz')\n"
        "print((model.predict(arrays['x'], verbose=0).argmax(axis=1) == arrays['y']).mean())\n"
        "assert not {'search', 'studies', 'storage'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert float(result.stdout.splitlines()[-1]) == pytest.approx(trained.value)


def test_patience_ends_a_training_that_gets_no_better(dataset: Dataset, tmp_path: Path) -> None:
    hyperparameters = HYPERPARAMETERS | {"optimizer": "sgd", "learning_rate": 1e-9, "patience_epochs": 2}
    ended: dict[str, Any] = {"epochs": 50, "hyperparameters": hyperparameters, "checkpoint_seconds": 0.0}
    trained, records = _train(dataset, tmp_path, **ended)
    assert trained.epochs == len(records) == trained.best_epoch + 2 < 50
    assert not trained.stopped
    assert (tmp_path / MODEL).is_file()
    # Killed after its last epoch, before its result was known: no further epoch is trained.
    again, records = _train(dataset, tmp_path, **ended)
    assert records == []
    assert (again.value, again.epochs) == (trained.value, trained.epochs)


def test_each_repeat_is_the_training_from_its_seed(dataset: Dataset, tmp_path: Path) -> None:
    alone = [_train(dataset, tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    repeats: list[Repeated] = []
    trained, records = _train(dataset, tmp_path / "all", more_seeds=(2, 3), on_repeat=repeats.append)
    assert [record.epoch for record in records] == list(range(1, 10))
    assert _figures(records) == [figures for _, own in alone for figures in _figures(own)]
    values = [one.value for one, _ in alone]
    assert [(each.repeat, each.value) for each in repeats] == list(enumerate(values, start=1))
    assert trained.repeats == tuple(values)
    assert trained.value == pytest.approx(np.mean(values))
    best = max((one for one, _ in alone), key=lambda one: one.value)
    assert (trained.best_epoch, trained.train_accuracy, trained.epochs) == (best.best_epoch, best.train_accuracy, 9)
    kept, expected = (
        _probabilities(folder / MODEL, dataset.x_validation)
        for folder in (tmp_path / "all", tmp_path / str(values.index(best.value) + 1))
    )
    assert np.array_equal(kept, expected)


# Killed in the middle of the second repeat, or in its last epoch.
@pytest.mark.parametrize("killed_in", [5, pytest.param(7, marks=pytest.mark.long)])
def test_resumed_repeats_give_the_numbers_of_uninterrupted_ones(
    dataset: Dataset, tmp_path: Path, killed_in: int
) -> None:
    whole, undisturbed = _train(dataset, tmp_path / "whole", more_seeds=(2, 3))
    records: list[Epoch] = []
    repeats: list[Repeated] = []

    def dies(record: Epoch) -> None:
        if record.epoch == killed_in:
            raise _Killed
        records.append(record)

    arguments: dict[str, Any] = {"more_seeds": (2, 3), "checkpoint_seconds": 0.0}
    with pytest.raises(_Killed):
        _train(dataset, tmp_path / "cut", **arguments, on_epoch=dies)
    trained, _ = _train(dataset, tmp_path / "cut", **arguments, on_epoch=records.append, on_repeat=repeats.append)
    assert _figures(records) == _figures(undisturbed)
    assert trained.repeats == whole.repeats == tuple(each.value for each in repeats)


def test_patience_ends_a_repeat_and_not_those_after_it(dataset: Dataset, tmp_path: Path) -> None:
    hyperparameters = HYPERPARAMETERS | {"optimizer": "sgd", "learning_rate": 1e-9, "patience_epochs": 2}
    repeats: list[Repeated] = []
    trained, records = _train(
        dataset, tmp_path, epochs=50, hyperparameters=hyperparameters, more_seeds=(2,), on_repeat=repeats.append
    )
    second = next(at for at, record in enumerate(records) if record.epoch == 51)
    assert second < 50
    assert [each.repeat for each in repeats] == [1, 2]
    assert trained.epochs == len(records) < 100


def test_a_schedule_may_be_for_more_epochs_than_are_trained(dataset: Dataset, tmp_path: Path) -> None:
    """A confirmation trains for the best epoch's number, as the search did it."""
    cosine = HYPERPARAMETERS | {"schedule": "cosine"}
    searched, confirmed, shorter = (
        _train(dataset, tmp_path / str(at), hyperparameters=cosine, epochs=epochs, schedule_epochs=schedule_epochs)[1]
        for at, (epochs, schedule_epochs) in enumerate(((6, None), (3, 6), (3, None)))
    )
    assert _figures(searched[:3]) == _figures(confirmed) != _figures(shorter)


def test_a_loss_that_is_not_a_number_ends_the_training_with_that_reason(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(NotANumber, match=r"loss became (nan|inf) in epoch \d"):
        _train(dataset, tmp_path, hyperparameters=HYPERPARAMETERS | {"optimizer": "sgd", "learning_rate": 1e30})
    assert not (tmp_path / MODEL).exists()


UNSURE = """
import keras
from keras import ops

def build(hyperparameters, image_shape, classes):
    def accuracy(labels, predicted):  # of no image at all: 0 / 0
        return ops.zeros_like(predicted[:, 0]) / ops.zeros_like(predicted[:, 0])

    net = keras.Sequential([keras.Input(image_shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                            keras.layers.Dense(classes, "softmax")])
    net.compile("adam", "categorical_crossentropy", metrics=[accuracy])
    return net
"""


def test_an_accuracy_that_is_finite_in_no_epoch_ends_the_training_with_that_reason(
    dataset: Dataset, tmp_path: Path, write_module: Callable[[str, str], None]
) -> None:
    write_module("unsure", UNSURE)
    with pytest.raises(NotANumber, match="the validation accuracy was nan in epoch 3, and finite in no epoch"):
        _train(dataset, tmp_path, model="unsure:build")
    assert not (tmp_path / MODEL).exists()


@pytest.mark.parametrize("scores", [(math.nan, 0.5, math.inf, 0.5), (0.2, 0.5, math.nan, 0.1)])
@pytest.mark.parametrize("cut", [False, True])
def test_an_epoch_without_a_finite_accuracy_is_never_the_best(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: tuple[float, ...], cut: bool
) -> None:
    weights: list[list[Any]] = []
    epochs = iter(scores)

    def scored(metrics: Any, model: str) -> Any:  # a fit has a list for each metric, an evaluation a number
        return [0.5] if isinstance(metrics["loss"], list) else next(epochs)

    class Remembers(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            weights.append(self.model.get_weights())

    fit = keras.Model.fit
    monkeypatch.setattr(search.training_loop, "accuracy_of", scored)
    monkeypatch.setattr(
        keras.Model,
        "fit",
        lambda net, *args, callbacks, **named: fit(net, *args, callbacks=[*callbacks, Remembers()], **named),
    )
    resumed: list[Epoch] = []
    if cut:  # after the first epoch

        def on_epoch(record: Epoch) -> None:
            if record.epoch == 2:
                raise _Killed

        with pytest.raises(_Killed):
            _train(dataset, tmp_path, epochs=4, on_epoch=on_epoch, checkpoint_seconds=0.0)
        epochs = iter(scores[1:])
        del weights[1:]
    trained, _ = _train(dataset, tmp_path, epochs=4, on_resume=resumed.extend)
    assert [repr(epoch.val_accuracy) for epoch in resumed] == ([repr(scores[0])] if cut else [])
    # Of two equal epochs the one with the lower validation loss: the later one here.
    best = 4 if scores[3] == 0.5 else 2
    assert (trained.value, trained.best_epoch, trained.epochs) == (0.5, best, 4)
    saved = keras.models.load_model(tmp_path / MODEL).get_weights()
    assert all(np.array_equal(one, other) for one, other in zip(saved, weights[best - 1], strict=True))

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    history = json.loads((tmp_path / HISTORY).read_text(encoding="utf-8"), parse_constant=refused)
    assert [epoch["val_accuracy"] for epoch in history] == [score if math.isfinite(score) else None for score in scores]


class _Killed(Exception):  # noqa: N818 - it is an event
    """Represents a process that is killed at this point."""


def test_a_stop_ends_the_running_batch_and_keeps_only_whole_epochs(dataset: Dataset, tmp_path: Path) -> None:
    batches = iter(range(1000))
    trained, records = _train(
        dataset, tmp_path, stopping=lambda: "drop" if next(batches) >= 15 else None
    )  # of 12 batches an epoch
    assert trained.stopped
    assert (trained.epochs, len(records)) == (1, 1)
    assert not (tmp_path / MODEL).exists()


VARIED = {"shift": 0.1, "rotate": 10.0, "zoom": 0.1, "schedule": "one_cycle"}


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("mnist_cnn", {}),
        pytest.param("mnist_cnn", VARIED, marks=pytest.mark.long),
        pytest.param("mine:build", {"schedule": "cosine"}, marks=pytest.mark.long),
        pytest.param("mine:subclassed", {}, marks=pytest.mark.long),
    ],
    ids=["ours", "augmented", "own", "subclassed"],
)
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_resumed_training_gives_the_numbers_of_an_uninterrupted_one(
    dataset: Dataset,
    tmp_path: Path,
    write_module: Callable[[str, str], None],
    model: str,
    more: dict[str, Any],
    end: str,
) -> None:
    write_module("mine", OWN)
    hyperparameters = HYPERPARAMETERS | more
    whole, undisturbed = _train(dataset, tmp_path / "whole", epochs=5, model=model, hyperparameters=hyperparameters)
    resumed: list[Epoch] = []
    records: list[Epoch] = []

    def on_epoch(record: Epoch) -> None:
        if end == "killed" and record.epoch == 4 and not resumed:
            raise _Killed
        records.append(record)

    arguments: dict[str, Any] = {"epochs": 5, "model": model, "on_epoch": on_epoch, "checkpoint_seconds": 0.0}
    arguments |= {"on_resume": resumed.extend, "hyperparameters": hyperparameters}
    if end == "stopped":
        # In the middle of epoch 4, long before a checkpoint is due.
        batches = itertools.count()
        arguments |= {"checkpoint_seconds": 1e9, "stopping": lambda: "keep" if next(batches) > 40 else None}
        trained, _ = _train(dataset, tmp_path / "cut", **arguments)
        assert (trained.stopped, trained.epochs) == (True, 3)
    else:
        with pytest.raises(_Killed):
            _train(dataset, tmp_path / "cut", **arguments)
    assert [record.epoch for record in records] == [1, 2, 3]
    np.random.seed(99)  # another process has other states
    keras.utils.set_random_seed(99)
    trained, _ = _train(dataset, tmp_path / "cut", **arguments | {"stopping": lambda: None})
    assert _figures(resumed) == _figures(undisturbed[:3])
    assert _figures(records) == _figures(undisturbed)
    assert (trained.value, trained.best_epoch, trained.epochs) == (whole.value, whole.best_epoch, 5)
    history = json.loads((tmp_path / "cut" / HISTORY).read_text(encoding="utf-8"))
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4, 5]
    one, other = (_probabilities(tmp_path / folder / MODEL, dataset.x_validation) for folder in ("whole", "cut"))
    assert np.array_equal(one, other)


OWN = """
import keras

@keras.saving.register_keras_serializable()
class Noise(keras.layers.Layer):  # draws from Keras's own generator
    def call(self, inputs, training=False):
        return inputs + keras.random.normal(keras.ops.shape(inputs)) if training else inputs

def build(hyperparameters, image_shape, classes):
    model = keras.Sequential([keras.Input(image_shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                              Noise(), keras.layers.BatchNormalization(), keras.layers.Dense(classes),
                              keras.layers.Softmax()])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return model

@keras.saving.register_keras_serializable()
class Own(keras.Model):  # has no variables before its first call
    def __init__(self, classes, **options):
        super().__init__(**options)
        self.classes = classes
        self.norm, self.out = keras.layers.BatchNormalization(), keras.layers.Dense(classes, "softmax")

    def call(self, images, training=False):
        flat = keras.ops.reshape(keras.ops.cast(images, "float32") / 255, (-1, 64))
        return self.out(self.norm(flat, training=training))

    def get_config(self):
        return {"classes": self.classes}

def subclassed(hyperparameters, image_shape, classes):
    return Own(classes)
"""


OTHERS: dict[str, dict[str, Any]] = {
    "another seed": {"seed": 2},
    "another model": {"hyperparameters": HYPERPARAMETERS | {"width": 0.2}},
    "another number of epochs": {"epochs": 4},
    "another precision": {"precision": ("mixed_bfloat16", "the test asks for it")},
    "another study": {"identity": {"study": "b", "sources": {"mine:build": "0"}}},
    "a changed source": {"identity": {"study": "a", "sources": {"mine:build": "1"}}},
}


def test_a_checkpoint_that_does_not_fit_is_not_used(dataset: Dataset, tmp_path: Path) -> None:
    cut = {"checkpoint_seconds": 0.0, "stopping": iter([None] * 20 + ["drop"] * 99).__next__}
    _train(dataset, tmp_path, **cut)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()

    def first_epoch(**changed: Any) -> tuple[list[Epoch], int]:
        """What a training has from the checkpoint, and the first epoch that it trains."""
        resumed: list[Epoch] = []
        records: list[Epoch] = []

        def dies(record: Epoch) -> None:
            records.append(record)
            raise _Killed

        with pytest.raises(_Killed):
            _train(dataset, tmp_path, on_resume=resumed.extend, on_epoch=dies, **changed)
        return resumed, records[0].epoch

    assert first_epoch()[1] == 2, "the whole checkpoint fits"
    for harm, changed in OTHERS.items():
        assert first_epoch(**changed) == ([], 1), harm
    for harmed in (whole[:-100], b"nothing of the kind"):
        path.write_bytes(harmed)
        assert first_epoch() == ([], 1)


def test_a_checkpoint_that_may_not_be_looked_at_is_not_used(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one in another user's folder: looking whether it exists raises an error, for all but the superuser."""
    _train(dataset, tmp_path / "other", checkpoint_seconds=0.0)
    exists = Path.exists

    def guarded(path: Path) -> bool:
        if path.parent == tmp_path / "other":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", guarded)
    resumed: list[Epoch] = []
    _, records = _train(
        dataset, tmp_path / "own", checkpoints=[tmp_path / "other" / CHECKPOINT], on_resume=resumed.extend
    )
    assert not resumed
    assert records[0].epoch == 1
    assert "Permission denied" in caplog.text


def test_the_longest_checkpoint_of_the_earlier_attempts_is_taken(dataset: Dataset, tmp_path: Path) -> None:
    """A damaged one is left out, and the earlier attempts' files stay as they are."""
    for epochs in (2, 1):
        stops = iter([None] * (epochs * 12 + 3) + ["keep"] * 99)
        _train(dataset, tmp_path / str(epochs), checkpoint_seconds=0.0, stopping=stops.__next__)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / CHECKPOINT).write_bytes(b"damaged")
    paths = [tmp_path / name / CHECKPOINT for name in ("3", "1", "2", "none")]
    before = [path.read_bytes() for path in paths[:3]]
    resumed: list[Epoch] = []
    _, records = _train(dataset, tmp_path / "4", checkpoints=paths, on_resume=resumed.extend)
    assert [epoch.epoch for epoch in resumed] == [1, 2]
    assert [epoch.epoch for epoch in records] == [3]
    assert [path.read_bytes() for path in paths[:3]] == before


def test_a_batch_larger_than_the_data_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size = 241 is larger than the 240 training images"):
        _train(dataset, tmp_path, hyperparameters=HYPERPARAMETERS | {"batch_size": 241})


JAX = """
import sys
from pathlib import Path
from search import data, training_loop
from studies.definition import Data

dataset = data.load(sys.argv[1], Data(validation=0.2), [])
trained = training_loop.train(
    model="convnet",
    hyperparameters={"depth": 7, "width": 0.1, "dropout": 0.2, "batch_size": 20, "learning_rate": 1e-2,
                     "batch_norm_momentum": 0.9},
    dataset=dataset, epochs=3, seed=0, precision=("float32", ""), folder=Path(sys.argv[2]),
    on_epoch=lambda record: None, stopping=lambda: None,
)
print(trained.versions["backend"], trained.value)
"""


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX, which is not installed")
@pytest.mark.long
def test_a_model_is_built_and_trained_on_jax(write_npz: Callable[..., Path], tmp_path: Path) -> None:
    images = np.load(write_npz())["x_train"].repeat(2, axis=1).repeat(2, axis=2)
    path = write_npz("enlarged.npz", x_train=images)
    result = subprocess.run(
        [sys.executable, "-c", JAX, str(path), str(tmp_path / "trial")],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    backend, value = result.stdout.split()
    assert backend == "jax"
    assert float(value) > 0.3  # guessing gives 0.1
    assert (tmp_path / "trial" / MODEL).is_file()


COMPILED = """
import keras

def build(hyperparameters, image_shape, classes):
    net = keras.Sequential([keras.Input(image_shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                            keras.layers.Dense(classes, "softmax")])
    net.compile("adam", "categorical_crossentropy", metrics=METRICS)
    return net
"""


def test_an_own_model_is_judged_by_its_accuracy_at_any_position(
    dataset: Dataset, tmp_path: Path, write_module: Callable[[str, str], None]
) -> None:
    write_module("judged", COMPILED.replace("METRICS", "['mse', 'accuracy']"))
    trained, records = _train(dataset, tmp_path, model="judged:build")
    right = _probabilities(tmp_path / MODEL, dataset.x_validation).argmax(axis=1) == dataset.y_validation
    assert trained.value == max(record.val_accuracy for record in records) == pytest.approx(right.mean())


def test_an_own_model_without_accuracy_is_refused(
    dataset: Dataset, tmp_path: Path, write_module: Callable[[str, str], None]
) -> None:
    write_module("unjudged", COMPILED.replace("METRICS", "['mse']"))
    with pytest.raises(ModelError, match=r"unjudged:build is compiled with the metrics .*, and trials are judged by"):
        _train(dataset, tmp_path, model="unjudged:build")


def test_labels_have_the_form_that_the_loss_takes(
    dataset: Dataset, tmp_path: Path, write_module: Callable[[str, str], None]
) -> None:
    values = []
    for loss in ("categorical_crossentropy", "sparse_categorical_crossentropy"):
        text = COMPILED.replace("METRICS", "['accuracy']").replace("categorical_crossentropy", loss)
        write_module(f"with_{loss}", text)
        values.append(_train(dataset, tmp_path / loss, model=f"with_{loss}:build")[0].value)
    assert values[0] == values[1], "the two losses are the same function"


UNSAVEABLE = """
import keras

class Applied(keras.layers.Layer):
    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def call(self, x):
        return self.function(x)

def build(hyperparameters, image_shape, classes, scaled=None):
    return keras.Sequential([keras.Input(image_shape), scaled or Applied(lambda x: x / 255), keras.layers.Flatten(),
                             keras.layers.Dense(classes, "softmax")])

def unloadable(*arguments):
    return build(*arguments, scaled=keras.layers.Lambda(lambda x: x / 255))
"""


@pytest.mark.parametrize(
    ("function", "reason"),
    [("build", "NotImplementedError: "), ("unloadable", "unsaveable:unloadable can be saved, but not loaded again (")],
)
def test_a_model_that_cannot_be_saved_keeps_its_value(
    dataset: Dataset, tmp_path: Path, write_module: Callable[[str, str], None], function: str, reason: str
) -> None:
    """`check` refuses such a model; one that only some hyperparameters make unsaveable comes to its end."""
    write_module("unsaveable", UNSAVEABLE)
    trained, records = _train(dataset, tmp_path, model=f"unsaveable:{function}")
    assert trained.value == max(record.val_accuracy for record in records)
    assert trained.hits is not None
    assert trained.unsaved is not None
    assert trained.unsaved.startswith(reason)
    assert not (tmp_path / MODEL).exists()
