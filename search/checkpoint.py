"""The state of a training at the end of an epoch, in one file. Any machine can continue the trial from it.

The file has everything that the next epoch depends on: the variables of the model (with its layers' random generators)
and of the optimizer, Python's and NumPy's random states, the epochs so far, and the weights of the best one. The order
of the images is not in it, because it follows from the seed and the epoch.
"""

import json
import logging
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.random.seed_generator import global_seed_generator  # for layers without their own generator

from search.images import Array
from search.messages import Epoch
from storage.artifacts import stored

log = logging.getLogger(__name__)

ENTRY = "told"  # the name, in the file, of the JSON with everything that is not an array
ALWAYS = {"model", "hyperparameters", "seed", "data", "images", "batch_norm_averages"}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after the last epoch of `history`."""

    history: list[Epoch]
    variables: list[Array]  # the model's, in its own order, and the state of Keras's global generator
    optimizer: list[Array]
    best_weights: list[Array]  # of the best epoch, as from `get_weights`; empty before the first finite score
    random_states: dict[str, Any]


def take(net: keras.Model, history: Sequence[Epoch], best_weights: list[Array]) -> Checkpoint:
    """The current state of `net`, copied to the processor's memory."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    return Checkpoint(
        history=list(history),
        variables=_values(_variables(net)),
        optimizer=_values(net.optimizer.variables),
        best_weights=best_weights,
        random_states={"python": python, "numpy": {**numpy, "state": _plain(numpy["state"])}},
    )


def restore(net: keras.Model, checkpoint: Checkpoint) -> None:
    """Puts `net` (compiled, not trained) and the random generators into the state of `checkpoint`.

    Raises ValueError if the checkpoint is that of another model.
    """
    net.optimizer.build(net.trainable_variables)
    variables = [*_variables(net), *net.optimizer.variables]
    values = [*checkpoint.variables, *checkpoint.optimizer]
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        raise ValueError("its weights have other shapes than the model's")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    version, words, gauss = checkpoint.random_states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = checkpoint.random_states["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})


def write(path: Path, checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Writes `checkpoint` whole or not at all. `identity` is what must be the same for it to be read again."""
    entry = {
        "identity": identity,
        "history": [epoch.to_json() for epoch in checkpoint.history],
        "random_states": checkpoint.random_states,
    }
    arrays = {ENTRY: np.array(json.dumps(entry))}
    for name in ("variables", "optimizer", "best_weights"):
        arrays |= {f"{name}-{index}": _storable(value) for index, value in enumerate(getattr(checkpoint, name))}
    with stored(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def of_training(paths: Sequence[Path], identity: dict[str, Any]) -> Iterator[Checkpoint]:
    """The checkpoints at `paths` that are of this training, the longest first. Files that do not exist are left out."""
    lengths: dict[Path, int] = {}
    for path in paths:
        entry = _entry(path)
        if entry is not None and _is_same(path, entry["identity"], json.loads(json.dumps(identity))):
            lengths[path] = len(entry["history"])
    for path in sorted(lengths, key=lambda path: lengths[path], reverse=True):
        try:
            yield _read(path)
        except _UNREADABLE as error:
            log.warning("%s cannot be read, and is not used: %s", path, error)


def _entry(path: Path) -> dict[str, Any] | None:
    try:
        if not path.exists():  # raises an error where the folder may not be looked into: it is another user's
            return None
        with np.load(path, allow_pickle=False) as archive:
            entry = json.loads(str(archive[ENTRY]))
        return entry if entry["history"] and isinstance(entry["identity"], dict) else None
    except _UNREADABLE as error:
        log.warning("%s cannot be read, and is not used: %s", path, error)
        return None


def _is_same(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> bool:
    # Checkpoints of older versions record less; what they do record must be the same.
    different = [key for key in sorted(recorded.keys() | ALWAYS) if recorded.get(key) != wanted.get(key)]
    if different:
        log.warning("%s is of another training (%s), and is not used", path, ", ".join(different))
    return not different


def _read(path: Path) -> Checkpoint:
    with np.load(path, allow_pickle=False) as archive:
        entry = json.loads(str(archive[ENTRY]))
        lists = {
            name: [archive[key] for key in archive.files if key.rpartition("-")[0] == name]
            for name in ("variables", "optimizer", "best_weights")
        }
    history = [Epoch.from_json(epoch) for epoch in entry["history"]]
    return Checkpoint(history=history, random_states=entry["random_states"], **lists)


def _variables(net: keras.Model) -> list[Any]:
    return [*net.variables, global_seed_generator().state]


def _values(variables: Sequence[Any]) -> list[Array]:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _storable(value: Array) -> Array:
    # NumPy's file format has no bfloat16. Every bfloat16 value is also a float32 value.
    return value.astype(np.float32) if value.dtype.kind == "V" else value


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in state.items()}
