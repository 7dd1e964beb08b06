"""Exports the best trial: a folder with its model and everything that says how it was made."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial

from storage import settings
from storage.artifacts import HISTORY, MODEL
from storage.attributes import encoded, numbers
from storage.errors import nearest
from storage.ledger import Study
from storage.settings import environment_without_secrets
from studies import definition as definitions
from studies import model_file, registry, results
from studies.convert import NOT_LOADED
from studies.definition import Definition
from studies.errors import StudyError
from studies.model_rules import STORED_FUNCTION
from studies.predictions import class_names
from studies.registry import StorageLike
from studies.sources import idx_array, is_folder, module_folders

Format = Literal["tflite", "onnx", "savedmodel"]

FILES: dict[Format, str] = {"tflite": "model.tflite", "onnx": "model.onnx", "savedmodel": "saved_model"}
PACKAGES: dict[Format, tuple[str, ...]] = {
    "tflite": ("tensorflow",),
    "onnx": ("onnx", "tf2onnx"),
    "savedmodel": ("tensorflow",),
}
CONVERT_SECONDS = 600
METRICS = ("best_epoch", "epochs", "parameters", "seconds", "images_per_second")

README = """\
# A model of the study {study}

Trial {number}: {judged} accuracy {value:.4f}{mean}. It takes images of (n, height, width, channels) on the scale 0 to
255 (multiply values from 0 to 1 by 255), and gives {gives}. Keras loads it; Trialyard is not needed. In this folder:

```python
import keras
import {library}
{module}model = keras.models.load_model("model.keras", compile=False)
{images}
probabilities = {probabilities}
{answer}
```

- `model.keras`: the model, with the weights of {epoch}
- `history.json`: losses and accuracies of every epoch
- `definition.toml`: the definition; `trialyard run definition.toml` searches it again
- `trial.json`: hyperparameters, metrics, seed, software, and the fingerprint of the data
{more}"""

OF_LOGITS = "keras.ops.convert_to_numpy(keras.ops.{}(model.predict(images)))"

OWN_MODEL = """
The module of `{model}`, which may have layers of your own, must be importable: copy it to this folder.
"""

STORED_MODEL = """
The function that built the model was stored from a notebook or a script. If the model has layers of your own, define
and register their classes under the same names before you load it.
"""


def export(
    name: str,
    folder: str | os.PathLike[str],
    format: Format | None = None,
    storage: StorageLike = None,
    *,
    trial: int | None = None,
) -> Path:
    """Writes the best trial of study `name` that has a model to `folder`, which must not exist yet; returns its path.

    With `trial` it is the trial with this number.

    The folder has `model.keras`, `history.json`, `definition.toml`, `trial.json`, and a README.md that loads and uses
    the model. With `format` (tflite, onnx or savedmodel) it also has the model in that format. The folder appears
    complete or not at all.

    >>> folder = studies.export("digits", "best-digits")
    >>> sorted(os.listdir(folder))
    ['README.md', 'definition.toml', 'history.json', 'model.keras', 'trial.json']

    Raises StudyError as `best_model` does, and if the folder exists already or cannot be written, or Keras cannot write
    the format.
    """
    if format is not None:
        format_of(format)
    target, opened = Path(folder).absolute(), registry.storage_of(storage)
    if os.path.lexists(target):
        raise StudyError(f"{target} exists already: name a folder that does not exist yet")
    study = registry.find(name, opened)
    chosen = results.with_model(study, opened, trial)
    model, history = (results.file_of(study, chosen, artifact, opened) for artifact in ("model", "history"))
    definition, shape = definitions.from_json(study.definition), study.data.get("image_shape")
    shape = shape if isinstance(shape, list) else None  # older versions did not record it
    draft = target.with_name(f".{uuid.uuid4().hex}-{target.name}")
    try:
        draft.mkdir(parents=True)
        shutil.copyfile(model, draft / MODEL)
        shutil.copyfile(history, draft / HISTORY)
        (draft / "definition.toml").write_text(definitions.to_toml(definition), encoding="utf-8")
        record = encoded(_record(study, chosen, definition), indent=2)
        (draft / "trial.json").write_text(record + "\n", encoding="utf-8")
        of_logits = _of_logits(draft / MODEL)
        readme = _readme(name, chosen, definition, format, shape, class_names(study.data), of_logits=of_logits)
        (draft / "README.md").write_text(readme, encoding="utf-8")
        if format is not None:
            _convert(draft / MODEL, format, draft / FILES[format], definition, shape)
        draft.rename(target)
    except OSError as error:
        raise StudyError(
            f"{target} cannot be written ({error.strerror or error}): name a new folder where you may write"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def format_of(name: str) -> Format:
    """The format with this name. Raises StudyError if there is none."""
    for known in FILES:
        if name == known:
            return known
    raise StudyError(f"format = {name!r} must be one of {', '.join(FILES)}{nearest(name, FILES)}")


def _record(study: Study, trial: FrozenTrial, definition: Definition) -> dict[str, Any]:
    attributes = trial.user_attrs
    moments = {"began": trial.datetime_start, "ended": trial.datetime_complete}
    return {
        "study": study.name,
        "number": trial.number,
        "protocol": attributes.get("protocol"),
        "hyperparameters": {**definition.fixed, **trial.params},
        "searched": list(trial.params),
        "metrics": {"test_accuracy" if definition.judged_on == "test" else "val_accuracy": trial.values[0]}
        | {key: attributes.get(key) for key in METRICS}
        | {key: attributes[key] for key in ("repeats",) if key in attributes},
        "seed": attributes.get("seed"),
        "data": {"dataset": definition.dataset, "fingerprint": attributes.get("data_fingerprint")}
        | {key: study.data[key] for key in ("class_names",) if key in study.data},
        "precision": attributes.get("precision"),
        "precision_reason": attributes.get("precision_reason"),
        "device": attributes.get("device"),
        "versions": attributes.get("versions"),  # of the software that trained it
        "software": {  # of the software that exported it
            "trialyard": version("trialyard"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        # Optuna gives naive local time; readers in other time zones need the offset.
        **{key: moment and moment.astimezone().isoformat(timespec="seconds") for key, moment in moments.items()},
    }


def _readme(
    name: str,
    trial: FrozenTrial,
    definition: Definition,
    format: Format | None,
    shape: list[int] | None,
    names: Sequence[str] = (),
    *,
    of_logits: str | None = None,
) -> str:
    more = "" if format is None else f"- `{FILES[format]}`: the same model for {format}\n"
    from_files = shape is not None and _has_image_files(definition.dataset)
    # A subclassed model does not know the shape of its images.
    zeros = "(1, *model.input_shape[1:])" if shape is None else str((1, *shape))
    import_line, about_own_model = _about_own_model(definition.model)
    repeats = numbers(trial.user_attrs.get("repeats"))
    mean, epoch = "", "its last epoch" if definition.confirm is not None else "its best epoch"
    if len(repeats) > 1:
        mean = f", the mean of {len(repeats)} trainings; this model is the best one's, with {max(repeats):.4f}"
        epoch = "the best epoch of all its trainings"
    return README.format(
        study=name,
        number=trial.number,
        judged=definition.judged_on,
        value=trial.values[0],
        mean=mean,
        epoch=epoch,
        gives=f"logits, of which `{of_logits}` makes class probabilities" if of_logits else "class probabilities",
        probabilities=OF_LOGITS.format(of_logits) if of_logits else "model.predict(images)",
        module=import_line,
        library="tensorflow as tf" if from_files else "numpy as np",
        images=_images(definition, shape) if from_files else f"images = np.zeros({zeros})  # yours",
        answer=_answer(names),
        more=more + about_own_model,
    )


def _has_image_files(dataset: str) -> bool:
    """Whether it is a folder of image files, and not of IDX files, if this machine has it."""
    if not is_folder(dataset):
        return False
    name = Path(dataset).name
    for folder in (Path(dataset), Path(name), *(folder / name for folder in settings.load().data_folders)):
        with contextlib.suppress(OSError):
            return not any(idx_array(path.name) for path in folder.iterdir())
    return True


def _images(definition: Definition, shape: list[int] | None) -> str:
    """A program that reads an image file as `search.image_conversion` does."""
    assert shape is not None
    height, width, channels = shape
    wanted = "" if channels == 1 else f"channels={channels}, "
    read = f'image = tf.io.decode_image(tf.io.read_file("yours.jpg"), {wanted}expand_animations=False)\n'
    if channels == 1:  # which the decoder refuses for BMP and GIF
        read += "image = tf.image.rgb_to_grayscale(image[..., :3]) if image.shape[-1] > 2 else image[..., :1]\n"
    if definition.data.size is None:
        return f"{read}images = image[None]"
    return f"{read}images = tf.round(tf.image.resize(image[None], ({height}, {width}), antialias=True))"


def _of_logits(model: Path) -> str | None:
    try:
        return model_file.of_logits(model)
    except (ValueError, KeyError, AttributeError, zipfile.BadZipFile):  # a damaged file is exported as it is
        return None


def _answer(names: Sequence[str]) -> str:
    """The end of the README's program, which prints the most probable class of each image."""
    if not names:
        return "print(probabilities.argmax(axis=1))"
    return f"classes = {list(names)!r}\nprint([classes[index] for index in probabilities.argmax(axis=1)])"


def _about_own_model(model: str) -> tuple[str, str]:
    """What the README says of a user's own function: a line of code that imports its module, and a paragraph."""
    if ":" not in model:
        return "", ""
    if model.startswith(STORED_FUNCTION):
        return "", STORED_MODEL
    return f"import {model.partition(':')[0]}\n", OWN_MODEL.format(model=model)


def _convert(model: Path, format: Format, target: Path, definition: Definition, shape: list[int] | None) -> None:
    module = definition.model.partition(":")[0] if ":" in definition.model else ""
    arguments = [str(model), format, str(target), "" if shape is None else json.dumps(shape), module]
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "studies.convert", *arguments],
            env=environment_without_secrets() | module_folders(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CONVERT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StudyError(f"Keras did not make {target.name} within {CONVERT_SECONDS} s: try another --format") from None
    if result.returncode == 0 and target.exists():
        return
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    if result.returncode == NOT_LOADED:
        raise StudyError(f"{reason[:600]}: correct the module, or copy it to where it was when the study began")
    on_jax = format == "onnx" and os.environ.get("KERAS_BACKEND") == "jax"
    packages = "jax2onnx" if on_jax else " ".join(PACKAGES[format])
    if "ModuleNotFoundError" in result.stderr or "ImportError" in result.stderr:
        raise StudyError(
            f"the format {format} needs a package that is not installed ({reason[:200]}): `pip install {packages}`, or "
            "leave --format out"
        )
    raise StudyError(f"Keras cannot write this model as {format} ({reason[:300]}): leave --format out, or try another")
