"""Writes a saved model in another format, through Keras: ``python -P -m studies.convert model.keras tflite FILE``.

It is a separate program, because Keras takes seconds to import and its memory is freed only when the process ends. The
last line on standard error says what failed.
"""

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

# Keras's names for the formats.
FORMATS = {"tflite": "litert", "onnx": "onnx", "savedmodel": "tf_saved_model"}


def main(model: str, format: str, target: str, module: str = "") -> None:
    """Writes the model of the file `model` to `target`, a file or, for a savedmodel, a folder.

    `module`, if given, is imported first: it has the user's own layers.
    """
    import keras

    if module:
        sys.path.append(os.getcwd())  # last, as in `search.data.import_function`
        with contextlib.suppress(ImportError):  # a model of Keras's own layers does not need the module
            importlib.import_module(module)
    net = keras.models.load_model(model, compile=False)
    if getattr(net, "input_shape", None) is None:
        kind = type(net).__name__
        sys.exit(f"{kind} is a subclass of keras.Model, and only Sequential and functional models can be converted")
    if format != "savedmodel" and any(layer.compute_dtype != "float32" for layer in net.layers):
        net = _in_float32(net)
    net(keras.ops.zeros([size or 1 for size in net.input_shape]))  # some formats need a model that was called
    net.export(target, format=FORMATS[format], verbose=False)


def _in_float32(net: "keras.Model") -> "keras.Model":
    """The same model, computing in float32, the type of its weights.

    For a model that computes in bfloat16, Keras 3.15 writes an ONNX file that ONNX Runtime cannot load, and a tflite
    file with operations that the tflite interpreter does not have.
    """
    from keras.models import clone_model

    def cloned(layer: Any) -> Any:
        return type(layer).from_config(layer.get_config() | {"dtype": "float32"})

    copy = clone_model(net, clone_function=cloned)
    copy.set_weights(net.get_weights())
    return copy


if __name__ == "__main__":
    main(*sys.argv[1:])
