"""Is this definition right, for these data and this model? Asked before anything enters the database."""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

from search import data
from search.data import Dataset
from search.devices import Slot, cpu
from search.errors import DataError, DeviceError, MachineError, ModelError
from search.messages import Checked, Failed, Job
from search.trainer import START_SECONDS, Trainer, TrainerDied
from storage.errors import ObjectStoreError
from storage.settings import Settings
from studies import model_rules, recipe, registry, sampling
from studies.definition import Definition
from studies.recipe import Recipe
from studies.sources import is_function
from studies.space import Choice, low_point

BATCH_SIZE = 128  # the default, as in search.model, which this process must not import
POLL_SECONDS = 1.0
CHECK_SECONDS = 1800.0  # how long loading the data, and building and trying the model, may take
REMEMBERED_SECONDS = 24 * 3600.0


def check(
    definition: Definition,
    settings: Settings,
    measure_on: Slot | None = None,
    stop: threading.Event | None = None,
) -> Checked:
    """Checks that this machine can train `definition`; returns a summary of its data, and notes.

    With `measure_on` it also measures on this slot how large the models are, and how fast they train.

    The data are loaded, and Keras is imported in a trainer process; there a user's own function is called, too. What
    that process does ends when `stop` is set.

    Raises DataError, ModelError, MachineError or DefinitionError.
    """
    sampling.check_installed(definition)
    try:
        registry.fetch_function(definition.model, settings.artifact_store)
    except ObjectStoreError as error:
        raise MachineError(str(error)) from error
    if not is_function(definition.dataset):
        # In this process, so that a mistake is known before Keras is imported, and that a large folder of images, which
        # is converted once, has its time.
        dataset = data.load(definition.dataset, definition.data, settings.data_folders)
    if not is_function(definition.dataset) and ":" not in definition.model:
        if definition.confirm is not None:
            data.require_test(definition.dataset, definition.data, settings.data_folders)
        _check_fit(definition, dataset)
        if measure_on is None and definition.model != "backbone":
            check_keras(backend())
            return Checked(data=dataset.summary(), notes=dataset.notes)
    try:
        return _check_in_trainer(definition, settings, measure_on, stop)
    except DeviceError as error:
        checked = _check_in_trainer(definition, settings, Slot(device=cpu()), stop)
        return replace(checked, notes=(*checked.notes, f"the time is that of the processor, because {error}"))


def software() -> dict[str, str]:
    """The software of this machine that decides a study's numbers, as far as it matters: no patch levels.

    ``{"trialyard": "0.1", "keras": "3.15", "backend": "tensorflow"}``. A minor version may change what a layer does or
    how it begins; backends draw other random numbers.
    """
    return {name: ".".join(version(name).split(".")[:2]) for name in ("trialyard", "keras")} | {"backend": backend()}


def backend() -> str:
    """The backend that Keras will choose, by its own rule (`keras/src/backend/config.py`): it is not imported here."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    above = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    folder = Path(os.environ.get("KERAS_HOME", above / ".keras")).expanduser()
    try:
        found = json.loads((folder / "keras.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "tensorflow"
    return str(found.get("backend", "tensorflow")) if isinstance(found, dict) else "tensorflow"


def check_with_keras(definition: Definition, dataset: Dataset, policy: str) -> tuple[str, ...]:
    """Checks a definition in a process that may import Keras; tries a user's own model, and a backbone's weights.

    Returns notes, a sentence each.
    """
    _check_fit(definition, dataset)
    if definition.model == "backbone":
        from search import backbone

        backbone.check(definition, dataset.image_shape)
    if ":" not in definition.model:
        return ()
    from search import own_model

    return own_model.check(definition, first_recipe(definition).hyperparameters, dataset, policy)


def first_recipe(definition: Definition) -> Recipe:
    """A training that the definition allows: of its first listed point, or of the low ends and first choices."""
    listed = definition.points[0] if definition.points else {}
    return recipe.of_trial(definition, 0, low_point(definition.space, listed))


@cache  # it takes seconds, and a worker checks every study that it takes
def check_keras(backend: str) -> None:
    """Raises MachineError unless a trainer process can import Keras with `backend`.

    That it could is remembered for a day, for this very installation, in the user's cache folder: it takes seconds.
    """
    mark = _mark(backend)
    with contextlib.suppress(OSError):
        if mark is not None and time.time() - mark.stat().st_mtime < REMEMBERED_SECONDS:
            return
    with _trainer() as trainer:
        try:
            failed = trainer.start()
        except TrainerDied as died:
            raise _import_error(died, trainer) from None
    if failed is not None:
        raise MachineError(failed.message)
    if mark is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written: it is checked again next time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def forget_keras() -> None:
    """Has `check_keras` look again: a worker could not import what it needs."""
    check_keras.cache_clear()
    mark = _mark(backend())
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)


def _mark(backend: str) -> Path | None:
    """The file that says that Keras could be imported; None where it is not installed. Another installation, another
    processor or other search paths have another one.
    """
    origins = []
    for name in ("keras", backend, "numpy"):
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            return None
        origins.append((spec.origin, os.stat(spec.origin).st_mtime_ns))
    paths = [os.environ.get(name) for name in ("LD_LIBRARY_PATH", "PYTHONPATH")]
    identity = repr((sys.executable, sys.version, backend, platform.node(), cpu().name, origins, paths))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "trialyard" / f"keras-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


@contextmanager
def _trainer(slot: Slot | None = None) -> Iterator[Trainer]:
    """A trainer, on the processor without a `slot`; its log file lasts as long as the ``with`` block."""
    slot = slot or Slot(device=cpu())
    with tempfile.TemporaryDirectory() as folder, Trainer(slot, Path(folder) / "log") as trainer:
        yield trainer


def _import_error(died: TrainerDied, trainer: Trainer) -> MachineError:
    return MachineError(
        f"Keras cannot be imported on this machine with the backend {backend()} ({died.how}{_last_line(trainer)}): "
        "repair the installation, or set KERAS_BACKEND to another backend that is installed"
    )


def _last_line(trainer: Trainer) -> str:
    """For the end of a sentence: the last line that the process printed, since its log file will be removed."""
    try:
        lines = trainer.log_file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:  # no process was started, or this one may open no more files
        return ""
    return next((f"; it printed: {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")


def _check_in_trainer(
    definition: Definition, settings: Settings, measure_on: Slot | None, stop: threading.Event | None
) -> Checked:
    with _trainer(measure_on) as trainer:
        try:
            trainer.submit(
                Job(
                    definition=definition,
                    recipe=first_recipe(definition),
                    slot=trainer.slot,
                    data_folders=settings.data_folders,
                    folder=None,
                    measure=measure_on is not None,
                )
            )
            began = time.monotonic()
            while (message := trainer.receive(POLL_SECONDS)) is None:
                if stop is not None and stop.is_set():
                    raise MachineError(f"the check of {definition.name} was stopped")
                seconds = time.monotonic() - began
                if seconds > START_SECONDS and not trainer.ready:
                    raise trainer.hung_at_start()
                if seconds > CHECK_SECONDS:
                    own = " or ".join(name for name in (definition.model, definition.dataset) if is_function(name))
                    raise MachineError(
                        f"{own or definition.model} took longer than {CHECK_SECONDS / 60:.0f} minutes on this machine, "
                        "without a training: does it wait for something?"
                    )
        except TrainerDied as died:
            if not died.ready:
                raise _import_error(died, trainer) from None
            own = " or ".join(name for name in (definition.model, definition.dataset) if is_function(name))
            if not own:
                raise ModelError(
                    f"a training of {definition.model} ended its process ({died.how}{_last_line(trainer)}): does the "
                    "largest model with the largest batch fit into the memory?"
                ) from None
            raise ModelError(
                f"{own} ended the process that called it ({died.how}{_last_line(trainer)}): correct it there"
            ) from None
    if isinstance(message, Failed):
        kinds = {"import": MachineError, "device": DeviceError, "load": DataError, "data": DataError}
        raise kinds.get(message.kind, ModelError)(message.message)
    assert isinstance(message, Checked)
    return message


def _check_fit(definition: Definition, dataset: Dataset) -> None:
    """Raises DataError or ModelError if the model cannot be trained on these images, as far as rules tell."""
    _check_momentum(definition)
    images = len(dataset.y_train)
    largest, key = _largest(definition, "batch_size", BATCH_SIZE)
    if largest > images:
        raise DataError(
            f"{key} = {largest} is larger than the {images} training images of {definition.dataset}: "
            "choose a smaller one, or use more images"
        )
    if definition.model not in model_rules.NAMES:
        return
    height, width, channels = dataset.image_shape
    if definition.model == "backbone" and channels not in (1, 3):
        raise DataError(
            f"{definition.dataset} has images of {channels} channels, and a backbone takes 1 or 3: choose those"
        )
    for depth in definition.values_of("depth") or (None,):
        smallest = model_rules.smallest_image(definition.model, depth)
        if min(height, width) < smallest:
            which = definition.model + (f" of depth {depth}" if depth else "")
            raise DataError(
                f"{definition.dataset} has images of {height}x{width}, too small for {which}, which needs "
                f"{smallest}x{smallest}: enlarge them, or choose another model"
            )


def _check_momentum(definition: Definition) -> None:
    for momentum in definition.values_of("batch_norm_momentum") or ():
        if ":" not in definition.model and momentum >= model_rules.TOO_MUCH_MOMENTUM:
            raise ModelError(
                f"batch_norm_momentum = {momentum:g} makes averages that need "
                f"{model_rules.batches_of(momentum):,} batches to follow: choose at most 0.999"
            )


def _largest(definition: Definition, name: str, default: int) -> tuple[int, str]:
    largest = max(int(value) for value in definition.values_of(name) or (default,))
    parameter = definition.space.get(name)
    if parameter is not None:
        return largest, f"space.{name}.{'choices' if isinstance(parameter, Choice) else 'high'}"
    return largest, f"fixed.{name}" if name in definition.fixed else name
