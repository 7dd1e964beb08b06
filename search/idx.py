"""IDX files, the format in which MNIST, EMNIST and others like them are published, plain or compressed with gzip.

Four bytes say the type (8: uint8) and the number of axes, each axis has a length of four bytes, and the values follow:
http://yann.lecun.com/exdb/mnist/. Published names differ only at their start: ``train-images-idx3-ubyte.gz``,
``emnist-letters-train-images-idx3-ubyte.gz``.
"""

import gzip
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np

from search.errors import DataError
from search.images import Array
from studies.sources import IDX_FILES, idx_array

UNSIGNED_BYTES = 8


def files(folder: Path) -> dict[str, Path]:
    """The IDX files of `folder` by their arrays (x_train, ...); empty if it has none.

    Raises DataError if there are several for one array, or if an array of the training images is missing.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        key = idx_array(path.name)
        if key is None:
            continue
        if key in found and found[key].name.removesuffix(".gz") != path.name.removesuffix(".gz"):
            raise DataError(
                f"{folder}/ has two files for {key}, {found[key].name} and {path.name}: give each dataset a folder "
                "of its own"
            )
        found.setdefault(key, path)
    missing = [key for key in ("x_train", "y_train") if key not in found]
    if found and missing:
        part, axes = IDX_FILES[missing[0]]
        raise DataError(f"{folder}/ has IDX files, but none for {missing[0]}: add {part}-{axes}-ubyte or its .gz")
    return found


def arrays(found: Mapping[str, Path]) -> dict[str, Callable[[], Array]]:
    """Functions that read the arrays of the files `found`, and the class names: the labels as they are in the files.

    The classes are numbered from 0, because EMNIST numbers its letters from 1.
    """
    labels = cache(lambda: np.unique(_reader(found["y_train"], "y_train")()))

    def numbered(key: str) -> Array:
        y = _reader(found[key], key)()
        unknown = np.setdiff1d(y, labels())
        if len(unknown):
            raise DataError(f"{found[key]} has the label {unknown[0]}, which no training image has: correct the file")
        return np.searchsorted(labels(), y)

    read = {key: _reader(path, key) for key, path in found.items() if key.startswith("x")}
    read |= {key: partial(numbered, key) for key in found if key.startswith("y")}
    return {**read, "class_names": lambda: labels().astype(str)}


def length(path: Path) -> int | None:
    """How many entries the file's array has, by its first bytes; None if they cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return int.from_bytes(file.read(8)[4:], "big")
    except (OSError, EOFError, zlib.error):
        return None


def _reader(path: Path, key: str) -> Callable[[], Array]:
    """A function that reads the array of the file. It raises DataError if the file is incomplete or not IDX."""

    def read() -> Array:
        try:
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read ({error}): download it again") from None
        axes = 3 if key.startswith("x") else 1
        start = 4 + 4 * axes
        shape = np.frombuffer(content[4:start], ">u4") if len(content) >= start else np.zeros(0)
        if content[:4] != bytes([0, 0, UNSIGNED_BYTES, axes]) or len(content) != start + np.prod(shape, dtype=np.int64):
            raise DataError(
                f"{path} is incomplete, or not an IDX file of uint8 with {axes} axes ({len(content):,} bytes): "
                "download it again"
            )
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape.astype(int))

    return read
