"""A ``tf.data.Dataset`` that a user's own function returns, read once into arrays. Imports no TensorFlow itself."""

import hashlib
from typing import Any

import numpy as np
import psutil

from search.errors import DataError
from search.images import Array

INFINITE = -1  # tf.data.INFINITE_CARDINALITY


def is_stream(value: object) -> bool:
    """Whether `value` is a ``tf.data.Dataset``."""
    return hasattr(value, "element_spec") and hasattr(value, "as_numpy_iterator")


def arrays(stream: Any, what: str) -> tuple[Array, Array]:
    """All images and labels of `stream`, of pairs (image, label) or of batches of them.

    They are put in an order that depends on them alone, so that a shuffled stream gives the same data each time. Images
    of keras.utils.image_dataset_from_directory, floats from 0 to 255, become uint8. `what` names the stream in errors.
    Raises DataError if it is infinite, larger than half of the free memory, empty, or not of pairs.
    """
    if int(stream.cardinality()) == INFINITE:
        raise DataError(f"{what} is an infinite tf.data.Dataset: leave .repeat() out, because each epoch reads it once")
    limit = psutil.virtual_memory().available // 2
    from_folder = hasattr(stream, "class_names")
    images: list[Array] = []
    labels: list[Array] = []
    size = 0
    for element in stream.as_numpy_iterator():
        if not (isinstance(element, tuple) and len(element) == 2):
            raise DataError(f"{what} must be a tf.data.Dataset of pairs (image, label): map it to pairs")
        x, y = map(np.asarray, element)
        if y.ndim == 0 or len(x) != len(y):  # not a batch
            x, y = x[np.newaxis], y[np.newaxis]
        if from_folder:
            x = np.rint(x).astype(np.uint8)
        size += x.nbytes
        if size > limit:
            raise DataError(
                f"{what} has more than {limit / 1e9:.1f} GB of images, half of the free memory: make the images "
                "smaller, .take(n) fewer, or cast them to uint8"
            )
        images += list(x)
        labels += list(y)
    if not images:
        raise DataError(f"{what} is an empty tf.data.Dataset: give images")
    if len({image.shape for image in images}) > 1:
        raise DataError(f"{what} has images of several shapes: resize them in its map function")
    digests = [hashlib.sha256(x.tobytes() + y.tobytes()).digest() for x, y in zip(images, labels, strict=True)]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return np.stack([images[index] for index in order]), np.stack([labels[index] for index in order])
