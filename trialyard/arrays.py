"""Arrays in hand as a data file, so that the trainer processes can read them. Its name has their digest."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import DataError
from search.images import Array
from storage import settings
from storage.artifacts import written_atomically
from storage.errors import error_text

FORMS = (
    "a pair (x, y) of arrays, two pairs ((x, y), (x_test, y_test)), or what a definition has for dataset, such as "
    "'digits' or 'images.npz'"
)
DIGITS = 12  # hexadecimal ones of the digest


@dataclass(frozen=True, kw_only=True)
class StoredArrays:
    """Arrays of the keys ``x_train``, ``y_train`` and perhaps ``x_test``, ``y_test``, ready to be written."""

    arrays: Mapping[str, Array]

    @cached_property
    def path(self) -> Path:
        """The absolute path of the file, below the folder of downloaded data. Raises SettingsError."""
        digest = hashlib.sha256()
        for key, array in self.arrays.items():
            digest.update(f"{key} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return settings.load().data_folders[-1] / f"arrays-{digest.hexdigest()[:DIGITS]}.npz"

    def write(self) -> list[Path]:
        """Writes the file, unless it exists; returns its path if it is new. Raises OSError."""
        if self.path.exists():
            return []
        with written_atomically(self.path) as temporary, temporary.open("wb") as file:
            # Not compressed, so that all trainer processes of a machine share one copy of large arrays.
            np.savez(file, allow_pickle=False, **self.arrays)
        return [self.path]


def of(data: Any) -> str | StoredArrays:
    """`data` as a definition names it, or the arrays that must be stored. Raises DataError if it has no known form."""
    if isinstance(data, Path):  # it has no slash at its end
        path = os.path.expanduser(data)
        return f"{path}/" if _is_folder(Path(path)) else path
    if isinstance(data, str):
        return data
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise DataError(f"the data must be {FORMS}, and are a {_kind(data)}")
    if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in data):
        (x, y), (x_test, y_test) = data
        raw = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    else:
        raw = dict(zip(("x_train", "y_train"), data, strict=True))
    return StoredArrays(arrays={key: _array(key, value) for key, value in raw.items()})


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # in a folder that may not be entered, say: who reads it says so
        return path.suffix != ".npz"


def _array(key: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except Exception as error:  # such as a tensor on a GPU, or lists of several lengths
        raise DataError(f"{key} is not an array ({error_text(error, 200)}): give a NumPy array") from error
    if array.dtype.hasobject:
        raise DataError(
            f"{key} is an array of Python objects, and must be one of numbers: are its items alike in size?"
        )
    return array


def _kind(data: Any) -> str:
    return f"{type(data).__name__} of {len(data)}" if isinstance(data, (tuple, list)) else type(data).__name__
