"""A ``tf.data.Dataset`` that a user's own function returns, read once into arrays. Imports no TensorFlow itself."""

import hashlib
from typing import Any

import numpy as np
import psutil

from search.errors import DataError
from search.images import Array

INFINITE = -1  # tf.data.INFINITE_CARDINALITY
# Of images on the scale 0 to 255 that were resized. At edges, bicubic and Lanczos filters go beyond black and white.
OVERSHOOT = 64.0
BRIGHT = 32.0  # no pixel of standardized images is so far from their mean
FEW = 0.1  # share of images whose largest value may be 1 or less, where others are on the scale 0 to 255: black ones


def is_stream(value: object) -> bool:
    """Whether `value` is a ``tf.data.Dataset``."""
    return hasattr(value, "element_spec") and hasattr(value, "as_numpy_iterator")


def arrays(stream: Any, what: str) -> tuple[Array, Array]:
    """All images and labels of `stream`, of pairs (image, label) or of batches of them.

    They are put in an order that depends on them alone, so that a shuffled stream gives the same data each time. Images
    of keras.utils.image_dataset_from_directory, floats from 0 to 255, become uint8, unless they were scaled after it.
    `what` names the stream in errors. Raises DataError if it is infinite, larger than half of the free memory, empty,
    not of pairs, or of images on several scales.
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
        batch = [_compact(image) if from_folder else image for image in x]
        size += sum(image.nbytes for image in batch)
        if size > limit:
            raise DataError(
                f"{what} has more than {limit / 1e9:.1f} GB of images, half of the free memory: make the images "
                "smaller, .take(n) fewer, or cast them to uint8"
            )
        images += batch
        labels += list(y)
    if not images:
        raise DataError(f"{what} is an empty tf.data.Dataset: give images")
    if len({image.shape for image in images}) > 1:
        raise DataError(f"{what} has images of several shapes: resize them in its map function")
    if from_folder:
        images = _on_one_scale(images, what)
    digests = [hashlib.sha256(x.tobytes() + y.tobytes()).digest() for x, y in zip(images, labels, strict=True)]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return np.stack([images[index] for index in order]), np.stack([labels[index] for index in order])


def _compact(image: Array) -> Array:
    """A copy of `image`, in uint8 if it is certainly on the scale 0 to 255. Else the whole stream tells its scale."""
    if image.size == 0 or image.dtype.kind not in "fiu":
        return image
    low, high = float(image.min()), float(image.max())
    return _as_bytes(image) if low >= -OVERSHOOT and BRIGHT < high <= 255.0 + OVERSHOOT else image.copy()


def _on_one_scale(images: list[Array], what: str) -> list[Array]:
    """The images in uint8 if they are on the scale 0 to 255; else as they are, and `search.data` judges them."""
    others = [image for image in images if image.dtype != np.uint8]
    if not others or any(image.size == 0 or image.dtype.kind not in "fiu" for image in others):
        return images
    ends = np.array([(image.min(), image.max()) for image in others], np.float64)
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    some_are_bytes, dark = len(others) < len(images), low >= 0.0 and 1.0 < high <= 255.0 + OVERSHOOT
    if not np.isfinite(ends).all() or not (some_are_bytes or dark):
        return images
    black = np.count_nonzero((ends[:, 1] > 0.0) & (ends[:, 1] <= 1.0))
    if some_are_bytes and (low < -OVERSHOOT or high > 255.0 + OVERSHOOT or black > FEW * len(images)):
        raise DataError(f"{what} has images on several scales: give all of them from 0 to 255, or all from 0 to 1")
    return [_as_bytes(image) for image in images]


def _as_bytes(image: Array) -> Array:
    whole: Array = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return whole
