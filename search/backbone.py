"""The model `backbone`: a network of keras.applications before the last Dense. Uses only ``keras.*``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from search.errors import ModelError
from storage.errors import error_text
from studies.definition import Definition
from studies.sources import weights_file


@dataclass(frozen=True, kw_only=True)
class _Network:
    create: Any  # the function of keras.applications
    rescales: bool  # whether it takes images on 0 to 255; else on -1 to 1


def _network(name: str) -> _Network:
    known = keras.applications
    return {
        "mobilenet_v2": _Network(create=known.MobileNetV2, rescales=False),
        "mobilenet_v3_small": _Network(create=known.MobileNetV3Small, rescales=True),
        "mobilenet_v3_large": _Network(create=known.MobileNetV3Large, rescales=True),
        "efficientnet_v2_b0": _Network(create=known.EfficientNetV2B0, rescales=True),
        "efficientnet_v2_s": _Network(create=known.EfficientNetV2S, rescales=True),
        "resnet50_v2": _Network(create=known.ResNet50V2, rescales=False),
    }[name]


def features(images: Any, h: Mapping[str, Any], dropout: Any, *, plain: bool = False) -> Any:
    """(n, height, width, 1 or 3) on 0 to 255 -> (n, features); all are symbolic Keras tensors.

    Grey images are repeated to three channels. A `plain` network gets random weights, because others will follow.

    Raises ModelError if its weights cannot be loaded.
    """
    name = h["backbone"]
    network = _network(name)
    x = images if images.shape[-1] == 3 else layers.Concatenate()([images] * 3)
    if not network.rescales:
        x = layers.Rescaling(1.0 / 127.5, offset=-1.0)(x)
    body = _body(name, tuple(x.shape[1:]), "none" if plain else h.get("weights", "none"))
    body.trainable = not h.get("frozen", False)
    # EfficientNets drop parts of their residuals while they train. Where nothing in them learns, that is only noise;
    # `training=False` does not keep them from it, because Keras's model calls its parts with its own value.
    for layer in body.layers if not body.trainable else ():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
    x = body(x)
    return dropout(h["dropout"])(x) if "dropout" in h else x


def check(definition: Definition, image_shape: tuple[int, int, int]) -> None:
    """Loads, and if needed downloads, all weights that the trials may begin with. Raises ModelError."""
    for name, weights in _pairs(definition):
        keras.backend.clear_session()
        _body(name, (*image_shape[:2], 3), weights)


def _pairs(definition: Definition) -> list[tuple[str, str]]:
    """The backbones with the weights with which trials may begin."""
    if definition.confirm is not None:
        points = [{**definition.fixed, **each.hyperparameters} for each in definition.confirm.candidates]
        return [(str(point["backbone"]), str(point["weights"])) for point in points if "weights" in point]
    weights = definition.space.get("weights")
    only_for = None if weights is None else weights.when.get("backbone")
    return [
        (name, each)
        for name in definition.values_of("backbone") or ()
        for each in definition.values_of("weights") or ()
        if only_for is None or name in only_for
    ]


def _body(name: str, shape: tuple[int, ...], weights: str) -> keras.Model:
    create = _network(name).create
    chosen = {"none": None, "imagenet": "imagenet"}.get(weights, str(weights_file(weights)))
    try:
        return create(include_top=False, weights=chosen, input_shape=shape, pooling="avg")
    except Exception as error:  # Keras raises bare exceptions where a download fails or a file does not fit
        reason = error_text(error)
        if weights == "none":
            raise ModelError(f"the backbone {name} cannot be built for images of {shape} ({reason})") from error
        if weights == "imagenet":
            raise ModelError(
                f"the ImageNet weights of {name} cannot be downloaded ({reason}): copy them from the folder "
                '.keras/models of another machine, give the path of a file as weights, or write weights = "none"'
            ) from error
        raise ModelError(
            f"the weights {weights} cannot be loaded into the backbone {name} ({reason}): give a file that "
            "keras.Model.save_weights wrote for this network without its top"
        ) from error
