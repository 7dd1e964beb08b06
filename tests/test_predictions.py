"""What a model got wrong is kept: counts, the most certain mistakes, sample images; and it is drawn."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

import studies
from search.answers import _highest
from storage import artifacts
from storage.errors import DiskError
from studies import pictures
from studies.predictions import MISTAKES, Predictions


def _predictions(count: int = 200, classes: int = 4, wrong: int = 40, size: int = 8) -> Predictions:
    """Of `count` images, of which the first `wrong` are taken for the next class, ever more certainly."""
    labels = np.arange(count) % classes
    predicted = labels.copy()
    predicted[:wrong] = (labels[:wrong] + 1) % classes
    return Predictions.of(
        judged_on="validation",
        images=np.full((count, size, size, 1), np.arange(count).reshape(-1, 1, 1, 1) % 256, np.uint8),
        labels=labels,
        predicted=predicted,
        probability=np.linspace(0.5, 1.0, count, dtype=np.float32),
        classes=classes,
    )


def test_counts_are_of_true_classes_by_predicted_ones() -> None:
    found = _predictions()
    assert found.counts.sum() == 200
    assert found.counts.tolist()[3] == [10, 0, 0, 40]
    assert found.accuracy_by_class == [0.8] * 4


def test_the_most_certain_mistakes_are_kept_with_their_images() -> None:
    found = _predictions()
    assert found.index.tolist() == list(range(39, 39 - MISTAKES, -1))
    assert found.mistakes[:, 0, 0, 0].tolist() == found.index.tolist()
    assert np.all(found.predicted == (found.true + 1) % 4)


def test_a_model_without_mistakes_and_a_class_without_images_are_no_error() -> None:
    found = _predictions(wrong=0)
    assert len(found.mistakes) == 0
    assert "the model made no mistake" in pictures.mistakes(found)
    few = Predictions.of(
        judged_on="test",
        images=np.zeros((2, 8, 8, 1), np.uint8),
        labels=np.array([0, 0]),
        predicted=np.array([0, 1]),
        probability=np.ones(2, np.float32),
        classes=3,
    )
    assert few.accuracy_by_class == [0.5, None, None]


@pytest.mark.parametrize("shape", [(200, 150, 3), (96, 96, 4), (28, 28, 2)])
def test_large_images_and_other_channels_become_small_pictures(shape: tuple[int, int, int]) -> None:
    found = Predictions.of(
        judged_on="validation",
        images=np.full((30, *shape), 300.0, np.float32),
        labels=np.zeros(30, np.int64),
        predicted=np.ones(30, np.int64),
        probability=np.ones(30, np.float32),
        classes=2,
    )
    height, width, channels = found.mistakes.shape[1:]
    assert max(height, width) <= 64
    assert channels in (1, 3)
    assert found.mistakes.max() == 255


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = _predictions()
    written.write(tmp_path / artifacts.PREDICTIONS)
    read = Predictions.read(tmp_path / artifacts.PREDICTIONS)
    assert (read.judged_on, read.counts.tolist()) == ("validation", written.counts.tolist())
    assert np.array_equal(read.mistakes, written.mistakes)
    (tmp_path / "folder").write_text("", encoding="utf-8")
    with pytest.raises(DiskError):
        written.write(tmp_path / "folder" / "file.npz")


def test_logits_become_probabilities_and_probabilities_stay() -> None:
    assert _highest(np.array([[0.2, 0.8]], np.float32)).tolist() == pytest.approx([0.8])
    assert _highest(np.array([[0.0, 2.0]], np.float32)).tolist() == pytest.approx([np.e**2 / (1 + np.e**2)])
    assert _highest(np.array([[1000.0, -1000.0]], np.float32)).tolist() == [1.0]
    # One rounding error makes no logits of probabilities; logits may be within 0 and 1, too.
    assert _highest(np.array([[0.0, 1.0000001], [0.1, 0.9]], np.float32)).tolist() == pytest.approx([1.0, 0.9])
    # Those of a sigmoid for each class do not sum to 1.
    assert _highest(np.array([[0.9, 0.8], [0.1, 0.0]], np.float32)).tolist() == pytest.approx([0.9, 0.1])
    assert _highest(np.array([[0.5, 0.9], [0.0, 2.0]], np.float32))[0] == pytest.approx(1 / (1 + np.exp(-0.4)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_becomes_a_png_that_others_read(channels: int) -> None:
    import tensorflow as tf

    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    decoded = tf.io.decode_png(base64.b64decode(pictures.png_uri(image).partition(",")[2]))
    assert np.array_equal(decoded.numpy(), image)


def test_pictures_are_svg_and_escape_the_names_of_classes() -> None:
    names = ["<b>one</b>", "two & more", "three", "four"]
    for svg in (pictures.confusion(_predictions(), names), pictures.mistakes(_predictions(), names)):
        ElementTree.fromstring(svg)
        assert "<b>" not in svg
        assert re.search(r"(?<![a-z-])background|<rect[^>]*fill=\"(white|#fff)", svg) is None
    history = [{"loss": None, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.4}]
    curves = pictures.curves(history)
    ElementTree.fromstring(curves)
    assert "dashed: other images" in curves  # in a confirmation, those do not judge the trial


def test_a_search_keeps_what_its_best_models_got_wrong(
    start: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_KEEP_MODELS", "1")
    process = start("run", "digits", "--trials", "2", "--epochs", "1", "--limit", "100")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    storage = f"sqlite:///{home}/yard/studies.db"
    best = studies.best_trial("digits", storage)
    folder = home / "yard" / "artifacts" / Path(best.user_attrs["predictions"]).parent
    assert {path.name for path in folder.iterdir()} == set(artifacts.ALL) - {artifacts.CHECKPOINT}
    found = Predictions.read(folder / artifacts.PREDICTIONS)
    # The same answers that gave the trial its value.
    assert found.counts.diagonal().sum() / found.counts.sum() == pytest.approx(best.value)
    assert len(json.loads((folder / artifacts.HISTORY).read_text(encoding="utf-8"))) == 1
    complete = studies.open("digits", storage).get_trials(states=[TrialState.COMPLETE])
    (other,) = [trial for trial in complete if trial.number != best.number]
    others = home / "yard" / "artifacts" / Path(other.user_attrs["history"]).parent
    assert {path.name for path in others.iterdir()} == {artifacts.HISTORY, *artifacts.WITH_HISTORY}
