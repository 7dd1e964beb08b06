"""Images for ``fit`` and ``evaluate``: in batches, in the given order, and without a wait at the end of an epoch.

A batch is copied from the images when its turn comes. A whole array in a new order, and once more as a tensor, would
hold them three times.
"""

from typing import Any

import keras
import numpy as np

from search.images import Array, Images


def batches(x: Array | Images, y: Array, batch_size: int, order: Array | None = None) -> dict[str, Any]:
    """The arguments of ``fit`` and ``evaluate`` for images `x` and targets `y`, `batch_size` at a time.

    x: (n, height, width, channels), uint8 or float32; y: (n, classes); order: (n,), the indices in the order of their
    turn, None for the order that they have. On TensorFlow they are a ``tf.data.Dataset`` without autotuning. The
    dataset that Keras makes has a tuner thread that sleeps twice as long each time (10 ms, 20 ms, ... 5 s), and its end
    waits until that thread wakes up: an epoch of 6 s often took 10.3 s.
    """
    indices = np.arange(len(y)) if order is None else order
    targets = y.astype(np.float32, copy=False)
    if keras.backend.backend() != "tensorflow":
        return {"x": _Batches(x, targets, batch_size, indices)}
    import tensorflow as tf

    def copied(batch: Array) -> tuple[Array, Array]:
        return x[batch], targets[batch]

    def batch_of(chosen: Any) -> tuple[Any, Any]:
        images, labels = tf.numpy_function(copied, [chosen], (x.dtype, np.float32))
        return tf.ensure_shape(images, (None, *x.shape[1:])), tf.ensure_shape(labels, (None, *targets.shape[1:]))

    options = tf.data.Options()
    options.autotune.enabled = False
    with tf.device("CPU:0"):  # a GPU's memory is for the model
        dataset = tf.data.Dataset.from_tensor_slices(indices).batch(batch_size).map(batch_of)
        return {"x": dataset.prefetch(2).with_options(options)}


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches for Keras's backends other than TensorFlow, in the order of the indices."""

    def __init__(self, x: Array | Images, targets: Array, batch_size: int, indices: Array) -> None:
        super().__init__()
        self._x, self._targets, self._size, self._indices = x, targets, batch_size, indices

    def __len__(self) -> int:
        return -(-len(self._indices) // self._size)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        chosen = self._indices[index * self._size : (index + 1) * self._size]
        return self._x[chosen], self._targets[chosen]
