"""The built-in models for photos: a residual network, and networks of keras.applications."""

import hashlib
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from locked_folder import locked

from search import averages, backbone, checks, trainer_process
from search.data import Dataset
from search.errors import DataError, MachineError, ModelError
from search.model import build
from studies import model_rules
from studies.definition import differences, parse
from studies.errors import DefinitionError
from studies.sources import weights_file

SMALL = {"depth": 1, "stages": 2, "width": 0.25}
BACKBONE = """
name = "photos"
dataset = "photos/"
model = "backbone"
[budget]
trials = 2
[space]
dropout = { low = 0.0, high = 0.5 }
[fixed]
backbone = "mobilenet_v3_small"
weights = "none"
"""


def _dataset(shape: tuple[int, int, int]) -> Dataset:
    x, y = np.zeros((300, *shape), np.uint8), np.zeros(300, np.int64)
    return Dataset(
        x_train=x, y_train=y, x_validation=x, y_validation=y, classes=2, fingerprint="", validated_on="validation"
    )


def _layers(model: keras.Model, kind: type) -> int:
    return sum(isinstance(layer, kind) for layer in model.layers)


def test_a_resnet_is_the_resnet_20_of_its_paper_by_default() -> None:
    net = build("resnet", {}, (32, 32, 3), 10)
    # 20 layers with weights in the longest path, and two shortcuts that change the number of filters.
    assert _layers(net, keras.layers.Conv2D) + _layers(net, keras.layers.Dense) == 20 + 2
    assert [layer.filters for layer in net.layers if isinstance(layer, keras.layers.Conv2D)][-1] == 64
    assert 270_000 < net.count_params() < 280_000, "0.27 million, as in table 6 of arXiv:1512.03385"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 2),
        ("stages", 3),
        ("width", 0.5),
        ("dropout", 0.3),
        ("conv_dropout", 0.3),
        ("batch_norm", False),
        ("batch_norm_momentum", 0.5),
        ("flip", True),
        ("shift", 0.1),
        ("rotate", 10.0),
        ("zoom", 0.1),
    ],
)
def test_every_hyperparameter_of_a_resnet_changes_it(name: str, value: Any) -> None:
    def configuration(h: dict[str, Any]) -> str:
        keras.backend.clear_session()
        return str(build("resnet", h, (8, 8, 1), 2).get_config())

    assert configuration(SMALL | {name: value}) != configuration(SMALL)
    rules = model_rules.rules("resnet")
    assert rules is not None
    assert rules[name].broken_by(value) is None


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 3)])
def test_a_resnet_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    assert build("resnet", SMALL, shape, 3)(np.zeros((2, *shape))).shape == (2, 3)


def test_the_saved_resnet_has_the_weights_of_the_trained_one() -> None:
    h = SMALL | {"dropout": 0.3, "conv_dropout": 0.1, "flip": True, "shift": 0.1}
    trained, images = build("resnet", h, (8, 8, 1), 3), np.random.default_rng(0).integers(0, 255, (4, 8, 8, 1))
    trained.fit(images, np.eye(3)[[0, 1, 2, 0]], verbose=0)
    plain = build("resnet", h, (8, 8, 1), 3, plain=True)
    plain.set_weights(trained.get_weights())
    assert np.array_equal(plain.predict(images, verbose=0), trained.predict(images, verbose=0))
    assert not [layer for layer in plain.layers if not type(layer).__module__.startswith("keras.")]


def test_a_resnet_is_scored_with_fair_averages() -> None:
    net = build("resnet", SMALL, (8, 8, 1), 3)
    assert len(averages.of_builtin(net).now()) == 2 * _layers(net, keras.layers.BatchNormalization) > 0


# --- backbones --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_rules.BACKBONES)
def test_every_backbone_is_one_of_keras(name: str) -> None:
    assert callable(backbone._network(name).create)


def test_a_backbone_takes_grey_images_begins_with_a_file_s_weights_and_can_be_saved(tmp_path: Path) -> None:
    file, shape = tmp_path / "body.weights.h5", (32, 32, 1)
    body = keras.applications.MobileNetV3Small(include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg")
    body.save_weights(file)
    h = {"backbone": "mobilenet_v3_small", "weights": str(file), "frozen": True, "dropout": 0.1, "flip": True}
    net, images = build("backbone", h, shape, 2), np.random.default_rng(0).integers(0, 255, (2, *shape))
    (inner,) = [layer for layer in net.layers if isinstance(layer, keras.Model)]
    assert all(map(np.array_equal, inner.get_weights(), body.get_weights()))
    assert len(net.trainable_weights) == 2, "the last Dense alone"
    plain = build("backbone", h, shape, 2, plain=True)
    plain.set_weights(net.get_weights())
    plain.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert np.allclose(loaded(images, training=False), net(images, training=False), atol=1e-5)
    wrong = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    wrong.save_weights(tmp_path / "wrong.weights.h5")
    with pytest.raises(ModelError, match=r"wrong.weights.h5 cannot be loaded into the backbone mobilenet_v3_small"):
        build("backbone", h | {"weights": str(tmp_path / "wrong.weights.h5")}, shape, 2)


def test_weights_that_cannot_be_downloaded_are_said_before_a_trial_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(**options: Any) -> None:
        assert options["weights"] == "imagenet"
        raise Exception("URL fetch failure on https://example.com: None -- no route")

    monkeypatch.setattr(keras.applications, "MobileNetV3Small", create)
    definition = parse(BACKBONE.replace('"none"', '"imagenet"'))
    with pytest.raises(ModelError, match=r"^the ImageNet weights of mobilenet_v3_small cannot be downloaded \(URL"):
        checks.check_with_keras(definition, _dataset((64, 64, 3)), "float32")


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((31, 64, 3), r"has images of 31x64, too small for backbone, which needs 32x32: enlarge them"),
        ((64, 64, 2), r"has images of 2 channels, and a backbone takes 1 or 3"),
    ],
)
def test_images_that_a_backbone_cannot_take_are_refused(shape: tuple[int, int, int], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        checks.check_with_keras(parse(BACKBONE), _dataset(shape), "float32")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", r"backbone is missing: give it in \[space\] or \[fixed\], one of mobilenet_v2, "),
        ('backbone = "vgg"', r'fixed.backbone = "vgg" must be one of'),
        ('backbone = "mobilenet_v2"\nweights = "x"', r'fixed.weights = "x" must be one of .*none.*ends in .h5'),
        ('backbone = "mobilenet_v2"\nwidth = 2.0', r"fixed.width: the model backbone has no hyperparameter 'width'"),
    ],
)
def test_a_wrong_backbone_is_refused(line: str, problem: str) -> None:
    with pytest.raises(DefinitionError, match=problem):
        parse(BACKBONE.partition("[fixed]")[0] + f"[fixed]\n{line}\n")


CHOICES = (
    BACKBONE.replace('weights = "none"\n', "").replace(
        "[space]",
        '[space]\nweights = { choices = ["none", "body.weights.h5"] }\n'
        'frozen = { choices = [true, false], when = { weights = "body.weights.h5" } }',
    )
    + '[[points]]\ndropout = 0.1\nweights = "body.weights.h5"\nfrozen = true\n'
)


def test_a_weights_file_is_searched_in_the_definition_s_folder(tmp_path: Path) -> None:
    (tmp_path / "body.weights.h5").touch()
    text, file = BACKBONE.replace('"none"', '"body.weights.h5"'), f"{tmp_path}/body.weights.h5"
    assert parse(text, folder=tmp_path).fixed["weights"] == file
    definition = parse(CHOICES, folder=tmp_path)
    assert definition.values_of("weights") == ("none", file)
    assert definition.space["frozen"].when == {"weights": (file,)}
    assert definition.points[0]["weights"] == file


def test_a_weights_file_in_a_folder_that_may_not_be_entered_is_searched_in_the_current_one(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    with locked(tmp_path / "closed"):
        assert weights_file(f"{tmp_path}/closed/body.weights.h5") == Path("body.weights.h5")


@pytest.mark.parametrize("text", [BACKBONE.replace('"none"', '"body.weights.h5"'), CHOICES])
def test_the_same_definition_may_have_its_weights_in_another_folder(text: str, tmp_path: Path) -> None:
    stored = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "body.weights.h5").touch()
        stored.append(parse(text, folder=folder))
    assert stored[0] != stored[1]
    assert differences(*stored) == []
    assert differences(stored[0], parse(text.replace("body.", "other."))) != []


def test_a_file_of_weights_is_compared_by_what_it_has_wherever_it_is(home: Path) -> None:
    file = home / "body.weights.h5"
    file.write_bytes(b"weights")
    moved = parse(BACKBONE.replace('"none"', f'"{home}/moved/body.weights.h5"'))
    first = trainer_process._sources(moved)
    assert first == {"weights:body.weights.h5": hashlib.sha256(b"weights").hexdigest()[:16]}
    file.write_bytes(b"others")
    os.utime(file, (0, 0))
    with pytest.raises(MachineError, match=r"the file of weights:body.weights.h5 was edited after the study began"):
        trainer_process._require_same_sources(trainer_process._sources(moved), first)


def test_weights_for_some_backbones_are_tried_with_these_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []
    monkeypatch.setattr(backbone, "_body", lambda name, shape, weights: tried.append((name, weights)))
    text = BACKBONE.replace('backbone = "mobilenet_v3_small"\nweights = "none"\n', "").replace(
        "[fixed]",
        'backbone = { choices = ["mobilenet_v2", "resnet50_v2"] }\n'
        'weights = { choices = ["none", "imagenet"], when = { backbone = "resnet50_v2" } }',
    )
    backbone.check(parse(text), (64, 64, 3))
    assert tried == [("resnet50_v2", "none"), ("resnet50_v2", "imagenet")]


def test_nothing_is_dropped_in_a_frozen_backbone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    for frozen in (True, False):
        net = build("backbone", {"backbone": "efficientnet_v2_b0", "frozen": frozen}, (64, 64, 3), 2)
        first, second = (keras.ops.convert_to_numpy(net(images, training=True)) for _ in range(2))
        assert np.array_equal(first, second) == frozen
