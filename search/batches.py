"""How images come to ``fit`` and ``evaluate``: in batches, in their order, and without waiting at the end."""

from typing import Any

import keras
import numpy as np

from search.data import Array


def batches(x: Array, y: Array, batch_size: int) -> dict[str, Any]:
    """The arguments by which ``fit`` and ``evaluate`` take images `x` with their targets `y`, `batch_size` at a time.

    x: (n, height, width, channels), uint8 or float32; y: (n, classes). On TensorFlow they are a ``tf.data.Dataset``
    that tunes nothing: the one that Keras makes of arrays does, and ending it waits until its tuner, whose naps double
    in length (10 ms, 20 ms, ... 5 s), wakes up again. An epoch of 6 s often took 10.3.
    """
    if keras.backend.backend() != "tensorflow":
        return {"x": x, "y": y, "batch_size": batch_size}
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    with tf.device("CPU:0"):  # a GPU's memory is for the model
        dataset = tf.data.Dataset.from_tensor_slices((x, y.astype(np.float32)))
        return {"x": dataset.batch(batch_size).prefetch(2).with_options(options)}
