"""What a definition may name as its images: a ready dataset, a file, a folder, or a function; and files of weights."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DATASETS = ("mnist", "fashion_mnist", "cifar10", "digits")
FUNCTION = "package.module:function"
MODULE_FOLDERS = "TRIALYARD_MODULE_FOLDERS"  # a variable, set for our own processes only: where else modules are
IDX_FILES = {  # the parts of the name of the IDX file of each array
    "x_train": ("train-images", "idx3"),
    "y_train": ("train-labels", "idx1"),
    "x_test": ("t10k-images", "idx3"),
    "y_test": ("t10k-labels", "idx1"),
}


def is_function(name: str) -> bool:
    """Whether `name` has the form ``package.module:function``."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def module_folders() -> dict[str, str]:
    """The variable that tells a process of ours in which folders this one finds modules.

    A script in another folder imports its own.
    """
    return {MODULE_FOLDERS: os.pathsep.join(os.path.abspath(folder) for folder in sys.path)}


def find_modules() -> None:
    """Lets this process find the modules of users: in the current folder, and where its parent finds them.

    These folders come last: Keras imports parts of itself and of Python late, and must not get a random.py or keras.py
    of them instead.
    """
    folders = [os.getcwd(), *filter(None, os.environ.get(MODULE_FOLDERS, "").split(os.pathsep))]
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


def is_folder(dataset: str) -> bool:
    """Whether `dataset` is the path of a folder, which ends in a slash."""
    return dataset.endswith("/")


def is_dataset(dataset: str) -> bool:
    """Whether `dataset` has one of the forms that a definition may have. A file or folder need not exist."""
    return dataset in DATASETS or dataset.endswith(".npz") or is_folder(dataset) or is_function(dataset)


def has_test_images(dataset: str, data: Mapping[str, Any]) -> bool:
    """Whether a study over `dataset` is known to have test images, by what it recorded of its `data`.

    Older versions did not record their number, but each ready dataset has some.
    """
    images = data.get("test")
    return images > 0 if isinstance(images, int) else dataset in DATASETS


def idx_array(file: str) -> str | None:
    """The array (x_train, ...) that an IDX file of this name has; None if it is not the name of one.

    Published names differ at their start and in one character: ``emnist-letters-test-images-idx3-ubyte.gz``,
    ``train-images.idx3-ubyte``.
    """
    if file.startswith("."):
        return None
    name = file.replace("test-", "t10k-").replace(".idx", "-idx")
    return next((array for array, (part, axes) in IDX_FILES.items() if f"{part}-{axes}" in name), None)


def resolved(dataset: str, folder: Path) -> str:
    """The absolute path of a file or folder that exists relative to `folder`; else `dataset` as it is.

    A ``~`` at its start is the home folder, as in a shell.
    """
    if "\0" in dataset:
        return dataset
    path = (folder / os.path.expanduser(dataset)).absolute()
    # Not by Path, which raises where a folder may not be entered, or a name is too long: who reads the data says so.
    if dataset.endswith((".npz", ".h5")) and os.path.isfile(path):
        return str(path)
    if is_folder(dataset) and os.path.isdir(path):
        return f"{path}/"
    return dataset


def without_folder(dataset: str) -> str:
    """`dataset`, of a file or folder only its last part: the same images may be in another place elsewhere."""
    if is_function(dataset) or dataset in DATASETS:
        return dataset
    return Path(dataset).name + ("/" if is_folder(dataset) else "")


def with_weights(raw: Any, replacement: Callable[[str], str], is_weights: bool = False) -> Any:
    """A copy of a definition's tables with another text for each file of the hyperparameter `weights`.

    It may be in `fixed`, the choices of `space`, `points` and the conditions of others. `raw` may have any form.
    Raises RecursionError if it is nested too deeply.
    """
    if isinstance(raw, dict):
        return {key: with_weights(each, replacement, is_weights or key == "weights") for key, each in raw.items()}
    if isinstance(raw, list):
        return [with_weights(each, replacement, is_weights) for each in raw]
    return replacement(raw) if is_weights and isinstance(raw, str) and raw.endswith(".h5") else raw


def weights_file(weights: str) -> Path:
    """The path of a file of weights; if it does not exist, that of its name in the current folder."""
    path = Path(weights)
    return path if os.path.isfile(path) else Path(path.name)
