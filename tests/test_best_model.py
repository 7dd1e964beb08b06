"""The best model predicts as at the end of its training; an error says what to do if it cannot be loaded."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

import studies
from search import data, training_loop
from search.training_loop import train
from storage import claims, database, ledger, owners
from studies import model_file, registry
from studies.definition import parse
from studies.errors import StudyError

DEFINITION = """
name = "{name}"
dataset = "{dataset}"
model = "{model}"
budget.trials = 1
space.dropout = {{ low = 0.0, high = 0.7 }}
"""

OWN = """
import keras

@keras.saving.register_keras_serializable()
class Twice(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs

def build(hyperparameters, image_shape, classes):
    return keras.Sequential(
        [keras.Input(image_shape), Twice(), keras.layers.Flatten(), keras.layers.Dense(classes, activation="softmax")]
    )
"""


@pytest.fixture
def place(home: Path) -> RDBStorage:
    """The database that the settings name."""
    return database.create(f"sqlite:///{home}/yard/studies.db")


def _ended(
    place: RDBStorage, name: str, attrs: dict[str, Any], model: str = "mnist_cnn", dataset: str = "d.npz"
) -> Path:
    """A study with one complete trial; returns the trial's folder."""
    fixed = "fixed.depth = 3" if model == "convnet" else ""
    definition = parse(DEFINITION.format(name=name, model=model, dataset=dataset) + fixed)
    registry.create(definition, place, {"fingerprint": "0" * 16})
    claim = claims.claim(place, ledger.find(place, name), owners.this_slot("cpu:0"), 60.0)
    assert claim is not None
    files = {key: str(claim.folder / name) for key, name in attrs.items() if key == "model"}
    claims.finish(place, claim, TrialState.COMPLETE, 0.9, attrs | files)
    return Path("yard/artifacts").absolute() / claim.folder


@pytest.mark.parametrize(
    ("model", "hyperparameters", "precision"),
    [
        ("mnist_cnn", {"width": 0.1, "dropout": 0.2}, "float32"),
        ("convnet", {"depth": 3, "width": 0.1, "dropout": 0.2}, "float32"),
        ("convnet", {"depth": 3, "width": 0.1, "dropout": 0.2, "batch_norm": True}, "mixed_bfloat16"),
    ],
)
def test_it_predicts_to_the_bit_as_at_the_end_of_its_training(
    place: RDBStorage,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    hyperparameters: dict[str, Any],
    precision: str,
) -> None:
    dataset = data.load("digits", parse(DEFINITION.format(name="n", dataset="digits", model="mnist_cnn")).data, [])
    images = dataset.x_validation[:64]
    predicted: list[Any] = []
    kept = training_loop._kept

    def spy(net: keras.Model, weights: Any, *others: Any) -> keras.Model:
        net.set_weights(weights)  # the best epoch's, in the very model that was trained
        predicted.append(net.predict(images, verbose=0))
        return kept(net, weights, *others)

    monkeypatch.setattr(training_loop, "_kept", spy)
    folder = _ended(place, "mine", {"model": "model.keras"}, model, "digits")
    train(
        model=model,
        hyperparameters=hyperparameters | {"batch_size": 64},
        dataset=dataset,
        epochs=2,
        seed=1,
        precision=(precision, "the test asks for it"),
        folder=folder,
        on_epoch=lambda epoch: None,
        stopping=lambda: None,
    )
    keras.backend.clear_session()
    keras.config.set_dtype_policy("float32")  # as a fresh process has it
    best = studies.best_model("mine")
    np.testing.assert_array_equal(best.predict(images, verbose=0), predicted[0])
    assert len(np.unique(predicted[0])) > 10


def test_a_file_that_is_elsewhere_is_named_with_the_way_out(place: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _ended(place, "mine", {"model": "model.keras"})
    with pytest.raises(StudyError, match=r"not on this machine \(.*mine-.*/0/1/model.keras .*set TRIALYARD_ARTIFACTS"):
        studies.best_model("mine")
    artifacts_elsewhere = folder.parents[3] / "elsewhere"
    moved = artifacts_elsewhere / folder.relative_to(folder.parents[2])
    moved.mkdir(parents=True)
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]).save(moved / "model.keras")
    monkeypatch.setenv("TRIALYARD_ARTIFACTS", str(artifacts_elsewhere))
    assert studies.best_model("mine").output_shape == (None, 3)


def test_a_trial_without_a_model_says_so(place: RDBStorage) -> None:
    _ended(place, "mine", {})
    with pytest.raises(StudyError, match="trial 0 of study 'mine' has no model"):
        studies.best_model("mine")


def test_a_user_s_own_layers_are_loaded_from_their_module(
    place: RDBStorage, write_module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    write_module("mine_own", OWN)
    monkeypatch.syspath_prepend(str(home))
    import mine_own  # type: ignore[import-not-found]

    folder = _ended(place, "mine", {"model": "model.keras"}, "mine_own:build")
    folder.mkdir(parents=True)
    net = mine_own.build({}, (2, 2, 1), 3)
    net.save(folder / "model.keras")
    images = np.arange(8.0).reshape(2, 2, 2, 1)
    wanted = net.predict(images, verbose=0)
    registered = "Custom>Twice"
    keras.saving.get_custom_objects().pop(registered)
    monkeypatch.delitem(__import__("sys").modules, "mine_own")
    np.testing.assert_array_equal(studies.best_model("mine").predict(images, verbose=0), wanted)

    keras.saving.get_custom_objects().pop(registered)  # and now it is imported already, so nothing registers it
    with pytest.raises(StudyError, match=r"cannot be loaded \(.*register_keras_serializable.*import their module"):
        studies.best_model("mine")

    monkeypatch.delitem(__import__("sys").modules, "mine_own")
    write_module("mine_own", "import pickle\npickle.loads(b'')\n")  # as a stored function whose file is damaged
    with pytest.raises(StudyError, match=r"in mine_own, which cannot be imported \(EOFError: Ran out of input\)"):
        studies.best_model("mine")


@pytest.mark.parametrize(("from_logits", "in_list"), [(False, False), (True, False), (True, True)])
def test_the_model_can_be_evaluated_with_class_numbers(place: RDBStorage, from_logits: bool, in_list: bool) -> None:
    """However its function compiled it, and with the loss that fits its outputs."""
    folder = _ended(place, "mine", {"model": "model.keras"})
    folder.mkdir(parents=True)
    activation = None if from_logits else "softmax"
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation)])
    loss = keras.losses.CategoricalCrossentropy(from_logits=from_logits)
    net.compile("adam", [loss] if in_list else loss, metrics=["accuracy"])
    images, labels = np.random.default_rng(0).random((6, 4), np.float32), np.array([0, 1, 2, 0, 1, 2])
    wanted = net.evaluate(images, np.eye(3)[labels], verbose=0)
    net.save(folder / "model.keras")
    assert studies.best_model("mine").evaluate(images, labels, verbose=0) == pytest.approx(wanted, abs=1e-6)


LOGITS = {"class_name": "CategoricalCrossentropy", "config": {"from_logits": True}}


@pytest.mark.parametrize(
    ("compiled", "wanted"),
    [
        ({"loss": LOGITS}, True),
        ({"loss": [LOGITS]}, True),
        ({"loss": {"output": LOGITS}}, True),
        ({"loss": {"class_name": "CategoricalCrossentropy", "config": {"from_logits": False}}}, False),
        ({"loss": {"class_name": "function", "config": "mine"}}, False),
        ({"loss": "categorical_crossentropy"}, False),
        (None, False),
    ],
)
def test_a_file_says_whether_its_model_gives_logits(tmp_path: Path, compiled: Any, wanted: bool) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"compile_config": compiled}))
    assert model_file.gives_logits(tmp_path / "model.keras") == wanted


def test_a_damaged_file_is_one_sentence(place: RDBStorage) -> None:
    folder = _ended(place, "mine", {"model": "model.keras"})
    folder.mkdir(parents=True)
    (folder / "model.keras").write_bytes(b"no model")
    with pytest.raises(StudyError, match="cannot be loaded"):
        studies.best_model("mine")
