"""What a file of Keras with a trained model says besides its weights. Imports Keras only where it compiles."""

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import keras


def compiled(model: "keras.Model", path: Path) -> "keras.Model":
    """The model of the file `path`, compiled for images and class numbers, as data sets have them."""
    import keras

    loss_of_numbers = keras.losses.SparseCategoricalCrossentropy(from_logits=gives_logits(path))
    model.compile("adam", loss_of_numbers, metrics=["accuracy"])
    return model


def gives_logits(path: Path) -> bool:
    """Whether the model of the file `path` gives logits in place of probabilities. Raises as `of_logits`."""
    return of_logits(path) is not None


def of_logits(path: Path) -> Literal["softmax", "sigmoid"] | None:
    """What makes probabilities of the logits of the model of the file `path`; None if it gives probabilities.

    The loss of its training says it. Raises OSError, ValueError, KeyError or BadZipFile if it is not a file of Keras.
    """
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    compile_config = config.get("compile_config") if isinstance(config, dict) else None
    loss = compile_config.get("loss") if isinstance(compile_config, dict) else None
    with_logits = [each for each in _losses(loss) if _is_of_logits(each)]
    if not with_logits:
        return None
    return "sigmoid" if str(with_logits[0].get("class_name")).startswith("Binary") else "softmax"


def _losses(loss: Any) -> list[Any]:
    """Of each output one: that of the only output may be in a list, or in a dict by the name of the output."""
    if isinstance(loss, dict) and "class_name" not in loss:
        return list(loss.values())
    return loss if isinstance(loss, list) else [loss]


def _is_of_logits(loss: Any) -> bool:
    options = loss.get("config") if isinstance(loss, dict) else None
    return isinstance(options, dict) and options.get("from_logits") is True
