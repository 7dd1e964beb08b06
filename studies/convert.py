"""Writes a saved model in another format, through Keras: ``python -P -m studies.convert model.keras tflite FILE``.

It is a separate program, because Keras takes seconds to import and its memory is freed only when the process ends. The
last line on standard error says what failed.
"""

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

from studies.sources import find_modules

if TYPE_CHECKING:
    import keras

# Keras's names for the formats.
FORMATS = {"tflite": "litert", "onnx": "onnx", "savedmodel": "tf_saved_model"}


NOT_LOADED = 3  # exit code: the module of the user's own layers cannot be imported, and the model needs it
TOLERANCE = 1e-2  # by how much a probability of the written model may differ; bfloat16 has three digits
BFLOAT16_TOLERANCE = 0.1  # between a model that computes in bfloat16 and its copy in float32: each layer rounds


def main(model: str, format: str, target: str, shape: str = "", module: str = "") -> None:
    """Writes the model of the file `model` to `target`, a file or, for a savedmodel, a folder.

    `shape` is that of an image, as JSON such as ``[28, 28, 1]``; if it is empty, the model's own is taken, which a
    subclassed model does not know. `module`, if given, is imported first: it has the user's own layers. What was
    written is run once, ONNX only where ONNX Runtime is installed.

    Raises SystemExit if the model cannot be loaded without its module, or gives other probabilities than before.
    """
    import keras

    problem = _import(module) if module else None
    try:
        net = keras.models.load_model(model, compile=False)
    except Exception:
        if problem is None:
            raise
        sys.stderr.write(f"{module} cannot be imported ({problem}), and the model cannot be loaded without it\n")
        sys.exit(NOT_LOADED)
    if not shape and getattr(net, "input_shape", None) is None:
        sys.exit(f"{type(net).__name__} is a subclass of keras.Model, and the shape of its images is not recorded")
    import numpy as np

    sizes = [1, *json.loads(shape)] if shape else [size or 1 for size in net.input_shape]
    inputs = getattr(net, "inputs", None)  # a subclass may have none
    images = np.random.default_rng(0).integers(0, 256, sizes).astype(inputs[0].dtype if inputs else np.float32)
    wanted = _outputs(net, images)  # some formats need a model that was called
    if format != "savedmodel" and any(layer.compute_dtype != "float32" for layer in net._flatten_layers()):
        net = _in_float32(net)
        copied = _outputs(net, images)
        apart = np.abs(copied - wanted).max()
        if apart > BFLOAT16_TOLERANCE * max(1.0, np.abs(wanted).max()):  # logits are larger than probabilities
            raise SystemExit(f"its copy in float32 gives other outputs, by up to {apart:.3g}")
        wanted = copied
    net.export(target, format=FORMATS[format], verbose=False)
    given = _run(format, target, images)
    if given is not None and not np.allclose(given, wanted, atol=TOLERANCE):
        raise SystemExit(f"its probabilities differ by up to {np.abs(given - wanted).max():.3g} from the model's")


def _outputs(net: "keras.Model", images: Any) -> Any:
    import keras
    import numpy as np

    return keras.ops.convert_to_numpy(net(images)).astype(np.float32)


def _import(module: str) -> str | None:
    """Imports the module of the user's own layers, where the worker finds it; returns why it cannot be imported.

    A model of Keras's own layers does not need the module.
    """
    find_modules()
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - importing runs a user's code
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _run(format: str, target: str, images: Any) -> Any:
    """What the written model gives for `images`; None where nothing is installed that runs it."""
    if format == "onnx":
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(target)
        return session.run(None, {session.get_inputs()[0].name: images})[0]
    import tensorflow as tf

    if format == "savedmodel":
        loaded = tf.saved_model.load(target)  # its variables go with the object
        return loaded.serve(images).numpy()
    lite = tf.lite.Interpreter(target)
    lite.allocate_tensors()
    lite.set_tensor(lite.get_input_details()[0]["index"], images)
    lite.invoke()
    return lite.get_tensor(lite.get_output_details()[0]["index"])


def _in_float32(net: "keras.Model") -> "keras.Model":
    """A copy of the model that computes in float32, the type of its weights.

    For a model that computes in bfloat16, Keras 3.15 writes an ONNX file that ONNX Runtime cannot load, and a tflite
    file with operations that the tflite interpreter does not have.
    """
    from keras.models import clone_model

    def cloned(layer: Any) -> Any:
        config = layer.get_config()
        # A layer of the user's own may not take a dtype.
        return type(layer).from_config(config | {"dtype": "float32"} if "dtype" in config else config)

    copy = clone_model(net, clone_function=cloned, recursive=True)  # a backbone is a model in the model
    copy.set_weights(net.get_weights())
    return copy


if __name__ == "__main__":
    main(*sys.argv[1:])
