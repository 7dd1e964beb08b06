"""Keras's BatchNormalization and Dropout with faster kernels for training on the TensorFlow backend.

They have the same constructor, weights, inference and mathematics. Other backends run Keras's own code. They are used
only for training: a model is saved with Keras's layers and the same weights (`search.model.build(plain=True)`).
"""

from typing import Any

import keras
from keras import layers


class BatchNormalization(layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalisation whose training step is TensorFlow's fused kernel.

    Keras casts to float32 and makes several passes over the batch. The fused kernel makes one pass, and needs no cast
    of bfloat16. On (128, 18, 18, 64) in bfloat16, forward and backward on two cores: 3.5 ms against 13.4 ms.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """(n, h, w, c) -> the same shape, normalised over all axes but c."""
        fits = len(inputs.shape) == 4 and self.axis in (-1, 3) and self.scale and self.center and not self.renorm
        if not (training and self.trainable and fits and mask is None and _tensorflow()):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.convert_to_tensor(self.gamma),
            offset=tf.convert_to_tensor(self.beta),
            mean=tf.zeros([0]),  # unused in training
            variance=tf.zeros([0]),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel gives the unbiased variance: n / (n - 1) times the biased one that Keras averages.
        n = tf.cast(tf.size(inputs) // inputs.shape[-1], "float32")
        variance = variance * (n - 1.0) / n
        m = self.momentum
        self.moving_mean.assign(self.moving_mean * m + mean * (1.0 - m))
        self.moving_variance.assign(self.moving_variance * m + variance * (1.0 - m))
        return outputs


class Dropout(layers.Dropout):  # type: ignore[misc]
    """Dropout whose mask comes from 16-bit integers: half the random bits, and no conversion to floats.

    The rate is rounded to a multiple of 1/65536. The kept values are scaled by the rounded rate, so the mean is exact.
    8 bits would be faster, but turn a rate of 0.01 into 0.0117. On (128, 22, 22, 32) in bfloat16, forward and backward
    on two cores: 5.0 ms against 8.9 ms.
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Any shape -> the same shape, with a share of `rate` of the values set to 0."""
        if not (training and self.rate > 0 and self.noise_shape is None and _tensorflow()):
            return super().call(inputs, training=training)
        import tensorflow as tf

        dropped = round(self.rate * 65536)  # of 65536 equally likely numbers
        shape = tf.shape(inputs)
        size = tf.reduce_prod(shape)
        words = tf.random.stateless_uniform(
            [(size + 1) // 2],
            seed=tf.cast(self.seed_generator.next(), "int32"),
            minval=None,
            maxval=None,
            dtype="uint32",
        )
        numbers = tf.reshape(tf.bitcast(words, "uint16"), [-1])[:size]
        keep = tf.reshape(numbers >= tf.cast(min(dropped, 65535), "uint16"), shape)
        scale = 65536.0 / (65536.0 - min(dropped, 65535))
        return tf.where(keep, inputs * tf.cast(scale, inputs.dtype), tf.zeros([], inputs.dtype))


def _tensorflow() -> bool:
    return bool(keras.backend.backend() == "tensorflow")
