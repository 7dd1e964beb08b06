"""`search`: from a function and arrays in hand to a searched study."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from search import service
from storage.errors import DiskError, StorageError, TrialyardError
from studies import definition as definitions
from studies import registry, results
from studies.errors import DefinitionError, StudyError
from trialyard import arrays, functions, hyperparameters
from trialyard.arrays import StoredArrays
from trialyard.functions import StoredFunction
from trialyard.search_result import Result

if TYPE_CHECKING:
    from search.progress import Listener

log = logging.getLogger(__name__)

TRIALS, EPOCHS = 20, 20


def search(
    model: str | Callable[..., Any],
    data: Any,
    /,
    *,
    space: Mapping[str, Any],
    name: str | None = None,
    trials: int | None = None,
    epochs: int = EPOCHS,
    storage: str | None = None,
    devices: str = "auto",
    per_device: int | None = None,
    workers: int | None = None,
    listeners: "Sequence[Listener] | None" = None,
    **keys: Any,
) -> Result:
    """Searches the hyperparameters of `model` on `data` on this machine, and returns the result.

    `model` is a function ``build(hyperparameters, image_shape, classes)`` that returns a Keras model, as in a
    definition, or the name of a built-in model. `data` is ``(x, y)`` or ``((x, y), (x_test, y_test))``: images of
    (n, height, width[, channels]) on the scale 0 to 255 as whole numbers or 0 to 1 as floats, and class numbers of (n).
    It may also be what a definition calls `dataset`. The test images are read by `confirm` only.

    `space` has for each hyperparameter a list of choices, a range ``(low, high)`` or ``(low, high, step)``,
    `log` of two numbers, or a dict as in a definition. Without `trials` there are TRIALS; with the samplers "grid" and
    "points" one for each of their points. `keys` are the other keys of a definition:
    ``fixed={"batch_size": 64}``, ``sampler="random"``, ``pruner={"kind": "hyperband", "min_epochs": 3}``,
    ``data={"validation": 0.2}``, ``budget={"hours": 2}``. The rest is as for `run`. The `name` of the study is that
    of the function, unless it is given.

    A function that no module has, as one in a notebook, is stored below the artifacts folder, and arrays are stored
    below the folder of downloads. The same call again continues where it stopped.

    >>> result = ty.search("mnist_cnn", "digits", space={"dropout": (0.0, 0.5)}, trials=1, epochs=1, name="again")
    >>> result.best_trial.number
    0

    Raises Interrupted after Ctrl-C; ModelError or DataError if the function or the arrays cannot be stored or used;
    DefinitionError if a value is not allowed; StudyError if a study of this name searches something else; and what
    `run` raises.
    """
    budget = keys.pop("budget", None) or {}
    if not isinstance(budget, Mapping):
        raise DefinitionError(
            f'budget must be a dict, such as {{"hours": 2}}, and is {budget!r}: trials and epochs are arguments of '
            "their own"
        )
    function, images = _function(model), arrays.of(data)
    definition = _definition(
        {
            "name": name or _name(model),
            "model": function if isinstance(function, str) else function.name,
            "dataset": images if isinstance(images, str) else str(images.path),
            "budget": _trials(trials, keys.get("sampler")) | {"epochs": epochs, **budget},
            "space": hyperparameters.tables(space),
            **{key: _table(key, value) for key, value in keys.items()},
        }
    )
    _require_same_objects(definition, storage)
    with _written([each for each in (function, images) if not isinstance(each, str)], definition.name, storage):
        service.run(
            definition,
            storage=storage,
            devices=devices,
            per_device=per_device,
            workers=workers,
            listeners=listeners,
        )
    status = results.status(definition.name, storage)
    if status.state != "open" and status.finished < status.budget:
        log.warning(
            "study %s is %s with %d of %d trials: ty.resume(%r), and the same call continues it",
            *(status.study, status.state, status.finished, status.budget, status.study),
        )
    return Result(name=definition.name, storage=storage)


def _trials(trials: int | None, sampler: Any) -> dict[str, Any]:
    kind = sampler.get("kind") if isinstance(sampler, Mapping) else sampler
    if trials is None and kind in ("grid", "points"):
        return {}  # all points
    return {"trials": TRIALS if trials is None else trials}


def _definition(table: dict[str, Any]) -> definitions.Definition:
    try:
        text = tomli_w.dumps({key: value for key, value in table.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise DefinitionError(
            f"the search has a value that a definition cannot have ({error}): use numbers, strings, lists and dicts"
        ) from None
    return definitions.parse(text, source="the search", folder=Path())


def _function(model: str | Callable[..., Any]) -> str | StoredFunction:
    return model if isinstance(model, str) else functions.of(model)


def _name(model: str | Callable[..., Any]) -> str:
    name = model.rpartition(":")[2] if isinstance(model, str) else getattr(model, "__name__", "")
    return name if name.isidentifier() and not name.startswith("_") else "search"


def _table(key: str, value: Any) -> Any:
    if key in ("sampler", "pruner") and isinstance(value, str):
        return {"kind": value}
    return hyperparameters.plain(value)


def _require_same_objects(definition: definitions.Definition, storage: str | None) -> None:
    """Raises StudyError if the study exists with another function or other arrays than these.

    A definition names both by their digests, which would tell a person little.
    """
    try:
        stored = registry.definition_of(definition.name, registry.storage_of(storage))
    except (StudyError, StorageError):
        return  # there is none yet; what else is wrong, the search itself will say
    if stored.model != definition.model and functions.__name__ in stored.model + definition.model:
        raise StudyError(
            f"study {definition.name!r} began with another function ({stored.model}) than this one "
            f"({definition.model}), so trials would not be comparable: use the same function, or give the search "
            "another name"
        )
    if Path(stored.dataset).name != Path(definition.dataset).name:
        raise StudyError(
            f"study {definition.name!r} began with other data ({stored.dataset}) than these ({definition.dataset}), so "
            "trials would not be comparable: use the same data, or give the search another name"
        )


@contextlib.contextmanager
def _written(stored: Sequence[StoredFunction | StoredArrays], name: str, storage: str | None) -> Iterator[None]:
    """Writes the files of the function and the arrays; removes the new ones if no study `name` comes of them."""
    new: list[Path] = []
    try:
        for each in stored:
            new += each.write()
    except OSError as error:
        raise DiskError(f"{error.filename} cannot be written ({error.strerror}): is the disk full?") from error
    try:
        yield
    except TrialyardError:
        if not _exists(name, storage):
            for path in new:
                path.unlink(missing_ok=True)
        raise


def _exists(name: str, storage: str | None) -> bool:
    try:
        return name in registry.names(registry.storage_of(storage))
    except StorageError:
        return False
