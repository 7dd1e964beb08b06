"""A user's own function may return tf.data.Datasets; they are read once into arrays."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import write_digits

from search import data
from search.errors import DataError
from studies.definition import Data

MODULE = """
import numpy as np
import tensorflow as tf

x = np.arange(40 * 12, dtype=np.uint16).astype(np.uint8).reshape(40, 3, 4, 1)
y = np.arange(40) % 2

def single():
    return tf.data.Dataset.from_tensor_slices((x, y))

def batched():
    return single().batch(7), single().take(8)

def shuffled():
    return single().shuffle(40)

def listed():
    return list(batched())

def infinite():
    return single().repeat()

def images():
    return tf.data.Dataset.from_tensor_slices(x)

def empty():
    return single().take(0)

def folder():
    import keras

    return keras.utils.image_dataset_from_directory("photos", **FOLDER)

def halves():
    import keras

    return keras.utils.image_dataset_from_directory("photos", validation_split=0.2, subset="both", seed=0, **FOLDER)

FOLDER = {"color_mode": "grayscale", "image_size": (8, 8), "verbose": False}
first = np.arange(40).reshape(40, 1, 1, 1)
black = np.where(first < 7, 0, x).astype(np.uint8)
dark = x // 16

def named(images):
    stream = tf.data.Dataset.from_tensor_slices((images, y)).batch(7)
    stream.class_names = ["even", "odd"]  # as those of keras.utils.image_dataset_from_directory have
    return stream

def of_bytes():
    return named(x * 1.0)

def of_shares():
    return named(x / 255)

def of_bicubic():
    return named(np.where(x == 0, -3.0, np.where(x == 255, 258.0, x)))

def of_black():
    return named(black * 1.0)

def of_dark():
    return named(dark * 1.0)

def centred():
    return named(x / 127.5 - 1)

def standardized():
    return named((x - x.mean()) / x.std())

def of_16_bits():
    return named(x * 257.0)

def of_two_scales():
    return named(np.where(first < 20, x / 255, x))
"""


@pytest.fixture
def _module(write_module: Callable[[str, str], None]) -> None:
    write_module("flows", MODULE)


@pytest.mark.usefixtures("_module")
def test_a_stream_gives_the_same_data_batched_or_shuffled() -> None:
    single, batched, shuffled, again = (
        data.load(f"flows:{name}", Data(), []) for name in ("single", "batched", "shuffled", "shuffled")
    )
    assert single.fingerprint == batched.fingerprint == shuffled.fingerprint == again.fingerprint
    images = np.concatenate([single.x_train[:], single.x_validation])
    assert len({image.tobytes() for image in images}) == 40
    assert np.array_equal(single.y_train, shuffled.y_train)
    for name in ("batched", "listed"):
        with_test = data.load(f"flows:{name}", Data(), [], test=True)
        assert with_test.x_test is not None
        assert len(with_test.x_test) == 8
    with pytest.raises(DataError, match=r"has no array 'x_test'"):
        data.load("flows:single", Data(), [], test=True)


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("infinite", r"^flows:infinite: the training data is an infinite tf.data.Dataset: leave .repeat\(\) out"),
        ("images", r"must be a tf.data.Dataset of pairs \(image, label\): map it to pairs"),
        ("empty", r"is an empty tf.data.Dataset: give images"),
        ("centred", r"has floats from -1 to 1, .* if -1 is black and 1 is white, write \(x \+ 1\) / 2"),
        ("standardized", r"undo their standardization"),
        ("of_16_bits", r"has floats from 0 to 65535, and they must be from 0 to 1"),
        ("of_two_scales", r"has images on several scales: give all of them from 0 to 255, or all from 0 to 1"),
    ],
)
def test_a_stream_that_cannot_be_used_is_refused(name: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        data.load(f"flows:{name}", Data(), [])


@pytest.mark.usefixtures("_module")
def test_a_stream_that_does_not_fit_into_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Memory", (), {"available": 800})
    monkeypatch.setattr("psutil.virtual_memory", free)
    with pytest.raises(DataError, match=r"has more than 0.0 GB of images, half of the free memory"):
        data.load("flows:single", Data(), [])


@pytest.mark.usefixtures("_module")
def test_keras_s_own_folders_keep_their_class_names(home: Path) -> None:
    write_digits(home / "photos", 30)
    dataset = data.load("flows:folder", Data(), [])
    assert dataset.class_names == ("even", "odd")
    assert (dataset.image_shape, dataset.x_train.dtype, int(dataset.x_train[:].max())) == ((8, 8, 1), np.uint8, 255)
    halves = data.load("flows:halves", Data(), [], test=True)
    assert halves.class_names == ("even", "odd")
    assert halves.x_test is not None
    assert (len(halves.x_train) + len(halves.x_validation), len(halves.x_test)) == (24, 6)


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("name", "kind", "images"),
    [
        ("of_bytes", np.uint8, "x"),
        ("of_shares", np.float32, "x"),
        ("of_bicubic", np.uint8, "x"),
        ("of_black", np.uint8, "black"),
        ("of_dark", np.uint8, "dark"),
    ],
)
def test_images_with_class_names_are_whole_numbers_where_they_are_on_the_scale_0_to_255(
    name: str, kind: Any, images: str
) -> None:
    dataset = data.load(f"flows:{name}", Data(), [])
    assert dataset.x_train.dtype == dataset.x_validation.dtype == kind
    found = np.rint(np.concatenate([dataset.x_train[:], dataset.x_validation])).astype(np.uint8)
    wanted = getattr(importlib.import_module("flows"), images)
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in wanted)


def test_cifar10_is_read_in_the_form_of_keras_and_has_class_names(tmp_path: Path) -> None:
    x, y = np.zeros((100, 32, 32, 3), np.uint8), (np.arange(100) % 10).astype(np.uint8)[:, np.newaxis]
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    dataset = data.load("cifar10", Data(), [tmp_path])
    assert (dataset.image_shape, dataset.classes) == ((32, 32, 3), 10)
    assert dataset.class_names is not None
    assert dataset.class_names[3] == "cat"


def test_an_npz_file_may_have_class_names(write_npz: Callable[..., Path]) -> None:
    names = np.array([f"class {number}" for number in range(10)])
    assert data.load(str(write_npz(class_names=names)), Data(), []).class_names == tuple(names.tolist())
    with pytest.raises(DataError, match=r"class_names has the shape \(3,\), and there are 10 classes: give one name"):
        data.load(str(write_npz("few.npz", class_names=names[:3])), Data(), [])
