"""Images for ``fit`` and ``evaluate``: in batches, in the given order, and without a wait at the end of an epoch."""

from typing import Any

import keras
import numpy as np

from search.data import Array


def batches(x: Array, y: Array, batch_size: int) -> dict[str, Any]:
    """The arguments of ``fit`` and ``evaluate`` for images `x` and targets `y`, `batch_size` at a time.

    x: (n, height, width, channels), uint8 or float32; y: (n, classes). On TensorFlow they are a ``tf.data.Dataset``
    without autotuning. The dataset that Keras makes has a tuner thread that sleeps twice as long each time (10 ms,
    20 ms, ... 5 s), and its end waits until that thread wakes up: an epoch of 6 s often took 10.3 s.
    """
    if keras.backend.backend() != "tensorflow":
        return {"x": x, "y": y, "batch_size": batch_size}
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    with tf.device("CPU:0"):  # a GPU's memory is for the model
        dataset = tf.data.Dataset.from_tensor_slices((x, y.astype(np.float32)))
        return {"x": dataset.batch(batch_size).prefetch(2).with_options(options)}
