"""The residual network `resnet`: its layers between the rescaling and the last Dense. Uses only ``keras.*``.

Stages of residual blocks with two 3x3 convolutions each, with the activations before the convolutions (He et al., 2016,
arXiv:1603.05027). Each stage after the first halves the image and doubles the filters. `width` multiplies their number,
as in wide residual networks, and `conv_dropout` is between the two convolutions (Zagoruyko and Komodakis, 2016,
arXiv:1605.07146). With the defaults it is ResNet-20 for CIFAR-10: 3 stages of 3 blocks with 16, 32 and 64 filters.
"""

from collections.abc import Callable, Mapping
from typing import Any

from keras import layers

DEPTH, STAGES, FILTERS = 3, 3, 16


def features(images: Any, h: Mapping[str, Any], batch_norm: Any, dropout: Any) -> Any:
    """(n, height, width, channels) -> (n, filters of the last stage); all are symbolic Keras tensors.

    `batch_norm` and `dropout` are the classes of these layers.
    """

    def normed(x: Any) -> Any:
        if h.get("batch_norm", True):
            x = batch_norm(momentum=h.get("batch_norm_momentum", 0.99))(x)
        return layers.Activation("relu")(x)

    filters = [max(1, round(FILTERS * h.get("width", 1.0) * 2**stage)) for stage in range(h.get("stages", STAGES))]
    x = _conv(filters[0], 3)(images)
    for stage, count in enumerate(filters):
        for block in range(h.get("depth", DEPTH)):
            drop = dropout(h["conv_dropout"]) if "conv_dropout" in h else None
            x = _block(x, count, 2 if stage and not block else 1, normed, drop)
    x = layers.GlobalAveragePooling2D()(normed(x))
    return dropout(h["dropout"])(x) if "dropout" in h else x


def _block(x: Any, filters: int, stride: int, normed: Callable[[Any], Any], drop: Any) -> Any:
    before = normed(x)
    # The shortcut must have the shape of the block's output.
    shortcut = x if stride == 1 and x.shape[-1] == filters else _conv(filters, 1, stride)(before)
    y = normed(_conv(filters, 3, stride)(before))
    return layers.Add()([shortcut, _conv(filters, 3)(drop(y) if drop is not None else y)])


def _conv(filters: int, kernel: int, stride: int = 1) -> layers.Layer:
    return layers.Conv2D(filters, kernel, strides=stride, padding="same", kernel_initializer="he_normal")
