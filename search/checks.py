"""Is this definition right, for these data and this model? Asked before anything enters the database."""

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search import data
from search.data import Dataset
from search.devices import Slot, cpu
from search.errors import DataError, ModelError
from search.trainer import Checked, Failed, Job, Trainer, TrainerDied
from storage.settings import Settings
from studies import models, sampling
from studies.definition import Definition
from studies.space import Choice, Int, in_order

BATCH_SIZE = 128  # the default, as in search.model, which this process must not import
POLL_SECONDS = 1.0


def check(definition: Definition, settings: Settings) -> dict[str, Any]:
    """Loads the data and looks whether they fit; returns their summary (see `Dataset.summary`).

    A user's own data or model is imported in a trainer process, since it will import Keras.
    Raises DataError, ModelError or DefinitionError.
    """
    if ":" not in definition.dataset and ":" not in definition.model:
        return check_data(definition, settings)
    sampling.check_installed(definition)
    with tempfile.TemporaryDirectory() as folder:
        return _in_trainer(definition, settings, Path(folder) / "log")


def check_data(definition: Definition, settings: Settings) -> dict[str, Any]:
    """The same for a definition that was checked when its study was created: on this machine, are the data there?"""
    sampling.check_installed(definition)
    if ":" in definition.dataset:
        return check(definition, settings)
    dataset = data.load(definition.dataset, definition.data, settings.data_folders)
    _check_sizes(definition, dataset)
    return dataset.summary()


def software() -> dict[str, str]:
    """The software of this machine that decides a study's numbers, as far as it matters: no patch levels.

    ``{"trialyard": "0.1", "keras": "3.15", "backend": "tensorflow"}``. A minor version may change what a layer does or
    how it begins; backends draw other random numbers.
    """
    return {name: ".".join(version(name).split(".")[:2]) for name in ("trialyard", "keras")} | {"backend": _backend()}


def _backend() -> str:
    """What Keras will choose, by its own rule (`keras/src/backend/config.py`): this process must not import it."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    above = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    folder = Path(os.environ.get("KERAS_HOME", above / ".keras")).expanduser()
    try:
        found = json.loads((folder / "keras.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "tensorflow"
    return str(found.get("backend", "tensorflow"))


def check_with_keras(definition: Definition, dataset: Dataset) -> None:
    """The same where Keras may be imported: a user's own model is built once, with its first hyperparameters, and
    judged by one image.
    """
    _check_sizes(definition, dataset)
    if ":" in definition.model:
        import keras

        from search.model import accuracy_of, build

        net = build(definition.model, first_point(definition), dataset.image_shape, dataset.classes)
        y = keras.utils.to_categorical(dataset.y_validation[:1], dataset.classes)
        accuracy_of(net.evaluate(dataset.x_validation[:1], y, verbose=0, return_dict=True), definition.model)


def first_point(definition: Definition) -> dict[str, Any]:
    """Hyperparameters that the definition allows: the first listed point, or the low ends and first choices."""
    point: dict[str, Any] = {}
    listed = definition.points[0] if definition.points else {}
    for name in in_order(definition.space):
        parameter = definition.space[name]
        if parameter.applies(point):
            low = parameter.choices[0] if isinstance(parameter, Choice) else parameter.low
            point[name] = listed.get(name, low)
    return {**definition.fixed, **point}


def _in_trainer(definition: Definition, settings: Settings, log_file: Path) -> dict[str, Any]:
    slot = Slot(device=cpu())
    with Trainer(slot, log_file) as trainer:
        trainer.submit(
            Job(
                definition=definition,
                hyperparameters={},
                seed=0,
                slot=slot,
                data_folders=settings.data_folders,
                folder=None,
            )
        )
        try:
            while (message := trainer.receive(POLL_SECONDS)) is None:
                pass
        except TrainerDied as error:
            raise ModelError(f"importing {definition.model} or {definition.dataset} failed: {error}") from None
    if isinstance(message, Failed):
        raise (DataError if message.kind == "data" else ModelError)(message.message)
    assert isinstance(message, Checked)
    return message.data


def _check_sizes(definition: Definition, dataset: Dataset) -> None:
    images = len(dataset.y_train)
    largest, key = _largest(definition, "batch_size", BATCH_SIZE)
    if largest > images:
        raise DataError(
            f"{key} = {largest} is larger than the {images} training images of {definition.dataset}: "
            "choose a smaller one, or use more images"
        )
    if definition.model not in models.NAMES:
        return
    height, width, _ = dataset.image_shape
    for depth in _depths(definition):
        smallest = models.smallest_image(definition.model, depth)
        if min(height, width) < smallest:
            which = definition.model + (f" of depth {depth}" if depth else "")
            raise DataError(
                f"{definition.dataset} has images of {height}x{width}, too small for {which}, which needs "
                f"{smallest}x{smallest}: enlarge them, or choose another model"
            )


def _largest(definition: Definition, name: str, default: int) -> tuple[int, str]:
    parameter = definition.space.get(name)
    if isinstance(parameter, Choice):
        return max(int(value) for value in parameter.choices), f"space.{name}.choices"
    if isinstance(parameter, Int):
        return parameter.high, f"space.{name}.high"
    return int(definition.fixed.get(name, default)), f"fixed.{name}" if name in definition.fixed else f"{name}"


def _depths(definition: Definition) -> list[Any]:
    parameter = definition.space.get("depth")
    if parameter is not None:
        return list(parameter.points() or [])
    return [definition.fixed.get("depth")]
