"""Keras gets all images in order, and does not wait for a tuner at the end of an epoch."""

import keras
import numpy as np
import pytest

from search.batches import batches

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="other backends take the arrays themselves"
)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_batches_are_the_images_in_their_order(kind: str) -> None:
    x, y = np.arange(28).reshape(7, 2, 2, 1).astype(kind), np.eye(7)
    given = list(batches(x, y, 3)["x"])
    assert [len(images) for images, _ in given] == [3, 3, 1]
    assert np.array_equal(np.concatenate([images for images, _ in given]), x)
    assert np.array_equal(np.concatenate([targets for _, targets in given]), y)
    assert all(images.dtype == kind and targets.dtype == "float32" for images, targets in given)


def test_the_dataset_is_not_autotuned() -> None:
    dataset = batches(np.zeros((4, 2, 2, 1), np.uint8), np.eye(4), 2)["x"]
    assert dataset.options().autotune.enabled is False


def test_targets_in_float32_are_not_copied() -> None:
    targets = np.eye(4, dtype=np.float32)
    dataset = batches(np.zeros((4, 2, 2, 1), np.uint8), targets, 2)["x"]
    targets[:] = 7.0
    assert all((given == 7.0).all() for _, given in dataset.as_numpy_iterator())
