"""Datasets: loaded, checked, limited and split. Imports no Keras, so that a command can check data quickly.

Images keep the type in which they are stored (uint8); the model's first layer divides them by 255. The test arrays are
not read unless the definition follows the notebook's protocol.
"""

import hashlib
import importlib
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from search import idx, image_folder, streams
from search.errors import DataError, MachineError
from search.images import Array, Images, chosen, length, mapped
from storage.errors import named_error
from studies.definition import Data
from studies.model_rules import STORED_FUNCTION
from studies.sources import find_modules, is_folder, is_function
from studies.wording import one_line

DOWNLOAD_SECONDS = 600
# In the order of the labels, as their authors list them.
CLASS_NAMES = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}
DARK = 0.1  # images whose largest value is a smaller share of white are noted
COLORS = (1, 3, 4)  # channels of an image
REAL = "iuf"  # NumPy's kinds of integers and floats: complex numbers and times are "numbers" to it, too
RENUMBER = "number them with numpy.searchsorted(numpy.unique(y_train), y), for y_train and y_test alike"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images to train with and to judge by.

    x_*: (n, height, width, channels), uint8 from 0 to 255, or float32 on the same scale if the source has floats.
    y_*: (n,), int64, classes numbered from 0.
    """

    x_train: Array | Images  # a large one is not copied out of its source
    y_train: Array
    x_validation: Array
    y_validation: Array
    classes: int
    fingerprint: str  # of the source's training arrays, before the limit and the split
    validated_on: Literal["validation", "test"]
    # Only for a confirmation, and judged by once, after the last epoch; of the same form as the validation images.
    x_test: Array | None = None
    y_test: Array | None = None
    notes: tuple[str, ...] = ()  # how the source was understood where that may be wrong, a sentence each
    class_names: tuple[str, ...] | None = None  # if the source has them
    test_images: int | None = None  # how many it has, also where they are not read; None: not known without reading

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels

    @property
    def judged(self) -> tuple[Literal["validation", "test"], Array, Array]:
        """The images that judge a training, and their labels: a confirmation's test images, else the validation's."""
        if self.x_test is not None and self.y_test is not None:
            return "test", self.x_test, self.y_test
        return self.validated_on, self.x_validation, self.y_validation

    @cached_property
    def judged_fingerprint(self) -> str:
        """Of the images that judge a training."""
        _, x, y = self.judged
        return _fingerprint(x, y)

    def summary(self) -> dict[str, Any]:
        """What a study records about its data: the fingerprint, and counts. `most_frequent` is how many of the images
        that judge the trials of a search are of the class that has the most.
        """
        counts = {
            "fingerprint": self.fingerprint,
            "train": len(self.y_train),
            self.validated_on: len(self.y_validation),
            "image_shape": list(self.image_shape),
            "classes": self.classes,
        }
        if len(self.y_validation):
            counts["most_frequent"] = int(np.bincount(self.y_validation).max())
        if self.test_images is not None:
            counts.setdefault("test", self.test_images)
        return counts if self.class_names is None else {**counts, "class_names": list(self.class_names)}


def load(name: str, data: Data, folders: Sequence[Path], *, test: bool = False) -> Dataset:
    """The dataset `name` (see `studies.definition`), limited and split as `data` says.

    The test arrays are read only for a confirmation (`test`), and where the definition validates on them.
    Files are looked for in `folders`; mnist, fashion_mnist and cifar10 are downloaded to the last folder if no folder
    has them.
    Raises DataError, and MachineError if a function cannot be imported.
    """
    source = _source(name, data, folders)
    arrays = source.arrays
    share = None if data.validation == "test" else data.validation
    keys = ("x_train", "y_train") + (("x_test", "y_test") if share is None or test else ())
    raw = {key: _array(arrays, key, name) for key in keys}
    x, y = _pair(raw["x_train"], raw["y_train"], name, "x_train", "y_train")
    _require_all_classes(y, f"{name}: y_train")
    binary, dtype = _is_binary(x), x.dtype
    x = _scaled(x, f"{name}: x_train", binary)
    notes = (*source.notes, *_notes(x, f"{name}: x_train", dtype, binary))
    fingerprint = _fingerprint(x, y)
    classes = int(y.max()) + 1
    train = np.arange(len(y))
    if data.limit_includes_validation:
        train = _limited(train, y, data, name)
    x_test = y_test = None
    if "x_test" in raw:
        x_test, y_test = _pair(raw["x_test"], raw["y_test"], name, "x_test", "y_test")
        x_test = _scaled(x_test, f"{name}: x_test", binary)
        if x_test.shape[1:] != x.shape[1:] or y_test.max() >= classes:
            raise DataError(
                f"{name}: x_test has images of shape {x_test.shape[1:]} in {int(y_test.max()) + 1} classes "
                f"and x_train of shape {x.shape[1:]} in {classes}: both must have the same shape and classes"
            )
    if share is None:
        assert x_test is not None
        assert y_test is not None
        x_validation, y_validation = x_test, y_test
    else:
        setting = f"data.validation = {share:g}"
        train, validation = _split(train, y, round(len(train) * share), data.seed, setting, name)
        x_validation, y_validation = x[validation], y[validation]
    # After the split: a study with fewer training images is judged by as many as one with all.
    if not data.limit_includes_validation:
        train = _limited(train, y, data, name)
    return Dataset(
        x_train=chosen(x, train),
        y_train=y[train],
        x_validation=x_validation,
        y_validation=y_validation,
        classes=classes,
        fingerprint=fingerprint,
        validated_on="test" if share is None else "validation",
        x_test=x_test if test else None,
        y_test=y_test if test else None,
        notes=notes,
        class_names=_class_names(arrays, classes, name),
        test_images=source.test_images,
    )


def _limited(indices: Array, y: Array, data: Data, name: str) -> Array:
    if data.limit is None or data.limit >= len(indices):
        return indices
    rest = len(indices) - data.limit
    return _split(indices, y, rest, data.seed, f"data.limit = {data.limit}", name)[0]


def require_test(name: str, data: Data, folders: Sequence[Path]) -> None:
    """Raises DataError if the dataset has no test images. None of them is read."""
    arrays = _source(name, data, folders).arrays
    for key in ("x_test", "y_test"):
        _require(arrays, key, name)


# --- where the arrays come from ---------------------------------------------------------------------------

_Arrays = Mapping[str, Callable[[], Array]]  # read only when called, so that test arrays stay unread


@dataclass(frozen=True, kw_only=True)
class _Source:
    arrays: _Arrays
    notes: tuple[str, ...] = ()
    test_images: int | None = None  # None: not known without reading them


def _source(name: str, data: Data, folders: Sequence[Path]) -> _Source:
    if is_function(name):
        return _from_function(name)
    if is_folder(name):
        return _from_folder(name, data, folders)
    if name == "digits":
        return _digits()
    path = _existing(name, folders) if name.endswith(".npz") else _find(f"{name}.npz", folders)
    path = path or _download(name, folders[-1])
    arrays, names = _from_file(path), CLASS_NAMES.get(name)
    return _Source(
        arrays=arrays if names is None else {**arrays, "class_names": lambda: np.array(names)},
        test_images=_test_images(path),
    )


def _test_images(path: Path) -> int | None:
    """How many test images a .npz file has."""
    try:
        lengths = [length(path, key) for key in ("x_test", "y_test")]
    except (OSError, ValueError, zipfile.BadZipFile):  # who reads the array gets the reason
        return None
    return 0 if 0 in lengths else lengths[0]


def _existing(name: str, folders: Sequence[Path]) -> Path:
    """The data file or folder `name`. Raises DataError if there is none."""
    path = Path(name)
    # Its folder may have been moved since the study was created: then it is usually the current one.
    existing_path = _find(name, [Path()]) or _find(path.name, [Path(), *folders])
    what = "folder" if is_folder(name) else "file"
    if existing_path is None or existing_path.is_dir() != is_folder(name):
        raise DataError(
            f"the data {what} {name} does not exist, and neither this folder nor {', '.join(map(str, folders))} has "
            f"a {what} of its name: correct dataset, or add its folder to TRIALYARD_DATA"
        )
    return existing_path


def _from_folder(name: str, data: Data, folders: Sequence[Path]) -> _Source:
    folder = _existing(name, folders).absolute()
    try:
        digits = idx.files(folder)
        if digits:
            for key in ("size", "test"):
                if getattr(data, key) is not None:
                    raise DataError(f"{name} has IDX files, and data.{key} is for image files: leave it out")
            has_test = {"x_test", "y_test"} <= digits.keys()
            test_images = idx.length(digits["y_test"]) if has_test else 0
            return _Source(arrays=idx.arrays(digits), test_images=test_images)
        listed = image_folder.listing(folder, data)
    except OSError as error:
        raise DataError(f"the data folder {name} cannot be read ({error.strerror or error}): check it") from None
    path = image_folder.converted(listed, data, folders[-1])
    arrays = _from_file(path)
    notes = image_folder.notes_of(listed, arrays["skipped"])
    return _Source(arrays=arrays, notes=notes, test_images=_test_images(path))


def _find(file: str, folders: Sequence[Path]) -> Path | None:
    try:
        return next((folder / file for folder in folders if (folder / file).exists()), None)
    except OSError as error:  # a name that is too long, or a folder that one may not read
        raise DataError(
            f"{one_line(file, 60)} cannot be looked for ({error.strerror or error}): correct dataset, or the "
            "folders of TRIALYARD_DATA"
        ) from None


def _digits() -> _Source:
    """Scikit-learn's 1,797 handwritten digits, 8x8 with values from 0 to 16, scaled to 28x28 and 0 to 255.

    The source has no test set: every fifth image (359) is taken for one.
    """
    source = _scikit_learn("sklearn.datasets").load_digits()
    images = _enlarged(source.images.astype(np.float64) * (255.0 / 16.0), 28)
    x, y = np.rint(images).astype(np.uint8)[..., np.newaxis], source.target
    test = np.arange(len(y)) % 5 == 4
    arrays = {
        "x_train": lambda: x[~test],
        "y_train": lambda: y[~test],
        "x_test": lambda: x[test],
        "y_test": lambda: y[test],
    }
    return _Source(arrays=arrays, test_images=int(test.sum()))


def _scikit_learn(module: str) -> Any:
    """This module of scikit-learn, which takes 1.5 s to import: too long for every command. Raises MachineError."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # one that does not fit the installed NumPy raises anything
        raise MachineError(
            f"scikit-learn cannot be imported ({type(error).__name__}: {one_line(error, 200)}): install it again"
        ) from error


def _enlarged(images: Array, size: int) -> Array:
    """(n, s, s) -> (n, size, size), bilinear, pixel centres aligned as in PIL and OpenCV."""
    side = images.shape[1]
    position = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.minimum(position.astype(int), side - 2)
    share = position - low
    rows = images[:, low, :] * (1 - share)[:, None] + images[:, low + 1, :] * share[:, None]
    result: Array = rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share
    return result


def _from_file(path: Path) -> _Arrays:
    try:
        archive = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read ({error.strerror or error}): check it") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        archive = None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"the data file {path} is not a .npz: write it with numpy.savez(x_train=..., y_train=...)")

    def reader(key: str) -> Callable[[], Array]:
        def read() -> Array:
            try:
                shared = mapped(path, key)
                return np.asarray(archive[key]) if shared is None else shared
            except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"the array {key} in {path} cannot be read ({error}): write plain numbers, without pickling"
                ) from None

        return read

    return {key: reader(key) for key in archive.files}


def _from_function(name: str) -> _Source:
    """The arrays that ``package.module:function`` returns: in the form of `keras.datasets.*.load_data`, or as a
    ``tf.data.Dataset`` of training images, or one of these and one of test images.
    """
    function = import_function(name)
    try:
        returned = function()
        first, *others = returned if isinstance(returned, (tuple, list)) else (returned,)
        if streams.is_stream(first):
            test_images = None if others else 0  # a stream tells its length only when it is read
            return _Source(arrays=_from_streams(name, first, *others), test_images=test_images)
        (x_train, y_train), (x_test, y_test) = returned
    except DataError:
        raise
    except Exception as error:  # a user's own code may raise anything
        raise DataError(
            f"{name} must return ((x_train, y_train), (x_test, y_test)) or a tf.data.Dataset, and ended in "
            f"{named_error(error)}; correct the function"
        ) from error
    arrays = {
        "x_train": lambda: np.asarray(x_train),
        "y_train": lambda: np.asarray(y_train),
        "x_test": lambda: np.asarray(x_test),
        "y_test": lambda: np.asarray(y_test),
    }
    test_images = len(y_test) if hasattr(y_test, "__len__") else 0 if y_test is None else None
    return _Source(arrays=arrays, test_images=test_images)


def _from_streams(name: str, train: Any, test: Any = None) -> _Arrays:
    # Each is read once, when it is asked for.
    of_train = cache(lambda: streams.arrays(train, f"{name}: the training data"))
    read = {"x_train": lambda: of_train()[0], "y_train": lambda: of_train()[1]}
    if test is not None:
        of_test = cache(lambda: streams.arrays(test, f"{name}: the test data"))
        read |= {"x_test": lambda: of_test()[0], "y_test": lambda: of_test()[1]}
    names = getattr(train, "class_names", None)
    return read if names is None else {**read, "class_names": lambda: np.array(names)}


def import_function(name: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names. Raises MachineError if it cannot be imported."""
    module_name, _, function_name = name.partition(":")
    find_modules()
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing runs a user's code
        raise MachineError(
            f"{name} cannot be imported ({named_error(error)}): {_where_to_look(module_name)}"
        ) from error
    if not callable(function):
        raise MachineError(f"{name} is of type {type(function).__name__}, not a function: give the name of a function")
    return function  # type: ignore[no-any-return]


def _where_to_look(module: str) -> str:
    if module.startswith(STORED_FUNCTION):
        return "it is a stored function, so copy the folder `functions` of the artifacts folder from where it was made"
    return "is the module in this folder, on PYTHONPATH or installed, and the function in it?"


def _download(name: str, folder: Path) -> Path:
    """Lets Keras download `name`, in another process, and stores it as ``<folder>/<name>.npz``."""
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "search.download", name, str(folder / f"{name}.npz")],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1] if result.returncode != 0 else None
    except subprocess.TimeoutExpired:
        reason = f"it was not done after {DOWNLOAD_SECONDS:.0f} s"
    if reason is not None:
        raise DataError(
            f"{name}.npz is not in a folder of TRIALYARD_DATA and cannot be downloaded ({reason[:200]}): put the file "
            "into a folder and set TRIALYARD_DATA to it, or try the study `digits`, which needs no network"
        )
    return folder / f"{name}.npz"


# --- the checks -------------------------------------------------------------------------------------------


def _array(arrays: _Arrays, key: str, name: str) -> Array:
    _require(arrays, key, name)
    return arrays[key]()


def _require(arrays: _Arrays, key: str, name: str) -> None:
    if key not in arrays and is_folder(name):
        raise DataError(
            f"{name} has no test images: put them into test/ beside train/, or keep a share of the images for them, "
            "such as test = 0.2 under [data]"
        )
    if key not in arrays:
        raise DataError(
            f"{name} has no array {key!r}, it has {', '.join(arrays) or 'none'}: add x_train and y_train, and x_test "
            "and y_test to be confirmed on"
        )


def _pair(x: Array, y: Array, name: str, x_name: str, y_name: str) -> tuple[Array, Array]:
    """Images as (n, h, w, c), with the values of the source; labels as (n,) int64."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]  # keras.datasets.cifar10 has this shape
    if x.ndim == 3:
        x = x[..., np.newaxis]
    if x.ndim != 4 or min(x.shape) == 0:
        raise DataError(
            f"{name}: {x_name} has the shape {x.shape}, and images must be (n, height, width) or "
            "(n, height, width, channels): reshape it"
        )
    if y.ndim != 1:
        one_hot = f", such as {y_name}.argmax(axis=1)" if y.ndim == 2 else ""
        raise DataError(
            f"{name}: {y_name} has the shape {y.shape}, and labels must be (n,): give class numbers{one_hot}"
        )
    if len(x) != len(y):
        raise DataError(
            f"{name}: {x_name} has {len(x)} images and {y_name} {len(y)} labels: there must be one label per image"
        )
    return x, _labels(y, f"{name}: {y_name}")


def _class_names(arrays: _Arrays, classes: int, name: str) -> tuple[str, ...] | None:
    if "class_names" not in arrays:
        return None
    names = arrays["class_names"]()
    if names.ndim != 1 or len(names) != classes:
        raise DataError(
            f"{name}: class_names has the shape {names.shape}, and there are {classes} classes: give one name per class"
        )
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    cleaned = tuple(map(_printable, map(str, names)))
    repeated = [each for each, count in Counter(cleaned).items() if count > 1]
    if repeated:
        raise DataError(f"{name}: class_names has {repeated[0]!r} more than once: give each class a name of its own")
    return cleaned


def _printable(text: str) -> str:
    """`text` without control characters; bytes of a folder's name that are not UTF-8 become question marks."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(character for character in encodable if unicodedata.category(character) != "Cc")


def _is_binary(x: Array) -> bool:
    """Whether the training images have only the values 0 and 1, as whole numbers: they mean black and white."""
    if x.dtype == np.bool_:
        return True
    return bool(x.dtype.kind in "iu" and x.max() == 1 and x.min() >= 0)


def _notes(scaled: Array, what: str, dtype: np.dtype[Any], binary: bool) -> tuple[str, ...]:
    notes = []
    share = float(scaled.max()) / 255.0
    if binary:
        notes.append(f"{what} has only the values 0 and 1 (type {dtype}), which are taken for 0 and 255")
    elif 0.0 < share < DARK:
        notes.append(f"{what} is very dark: its largest value is {100 * share:.2g} % of white. Is its scale right?")
    _, height, width, channels = scaled.shape
    if height in COLORS and channels not in COLORS:
        notes.append(
            f"{what} has images of {height}x{width} with {channels} channels: if the file has the channels first, "
            "write numpy.moveaxis(x, 1, -1)"
        )
    return tuple(notes)


def _scaled(x: Array, what: str, binary: bool) -> Array:
    """Images on the scale 0 to 255. `binary` says that the training images have only the values 0 and 1."""
    if x.dtype == np.bool_ or (binary and x.dtype.kind in "iu"):
        if x.max() > 1 or x.min() < 0:
            raise DataError(
                f"{what} has values from {x.min()} to {x.max()}, and x_train only 0 and 1: give both the same scale"
            )
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind not in REAL:
        raise DataError(f"{what} is of type {x.dtype}, and images must be numbers: convert it to uint8")
    if not np.isfinite(x).all():
        raise DataError(f"{what} has NaN or infinite values: replace them")
    low, high = x.min(), x.max()
    if np.issubdtype(x.dtype, np.integer):
        if low < 0 or high > 255:
            raise DataError(f"{what} has values from {low} to {high}, and images must be from 0 to 255: rescale it")
        return x.astype(np.uint8)
    if low < 0.0 or high > 1.0:
        raise DataError(
            f"{what} has floats from {low:g} to {high:g}, and they must be from 0 to 1: {_float_advice(low, high)}"
        )
    return x.astype(np.float32) * np.float32(255.0)


def _float_advice(low: float, high: float) -> str:
    if -1.0 <= low < 0.0 and high <= 1.0:
        return "if -1 is black and 1 is white, write (x + 1) / 2"
    if low >= 0.0 and high <= 255.0:
        return "if 255 is white, write x / 255"
    return "undo their standardization, or write (x - x.min()) / (x.max() - x.min()) for all of them"


def _labels(y: Array, what: str) -> Array:
    if y.dtype == np.bool_:
        return y.astype(np.int64)
    if y.dtype.kind not in REAL or not np.isfinite(y).all() or (y != np.floor(y)).any():
        raise DataError(f"{what} has labels that are not whole numbers: give class numbers from 0")
    low, high = y.min(), y.max()
    if low < 0 or high > np.iinfo(np.int32).max:
        raise DataError(f"{what} has the label {low if low < 0 else high}, and classes are numbered from 0: {RENUMBER}")
    return y.astype(np.int64)


def _require_all_classes(y: Array, what: str) -> None:
    """Raises DataError unless `y` has two or more classes, numbered from 0 without a gap."""
    present = np.unique(y)
    if len(present) < 2:
        raise DataError(f"{what} has only the class {present[0]}: give images of two or more classes")
    if present[-1] + 1 == len(present):
        return
    missing = next(label for label, found in enumerate(present) if label != found)
    raise DataError(
        f"{what} has {len(present)} different labels from {present[0]} to {present[-1]}, but no image of class "
        f"{missing}, and classes are numbered from 0 without a gap: {RENUMBER}"
    )


def _split(indices: Array, y: Array, size: int, seed: int, setting: str, name: str) -> tuple[Array, Array]:
    """Splits off `size` of the `indices`, stratified by their classes in `y`. Returns the rest and these, in order."""
    model_selection = _scikit_learn("sklearn.model_selection")
    try:
        parts = model_selection.train_test_split(indices, test_size=size, stratify=y[indices], random_state=seed)
    except ValueError as error:
        classes = len(np.unique(y[indices]))
        raise DataError(
            f"{name}: {setting} cannot split {len(indices)} images of {classes} classes so that each class is in "
            f"both parts ({error}): use more images, or another share"
        ) from None
    kept, held_out = (np.sort(part) for part in parts)
    return kept, held_out


def _fingerprint(x: Array, y: Array) -> str:
    digest = hashlib.sha256()
    for array in (x, y):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
