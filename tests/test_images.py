"""Large data is neither copied nor read whole by each process."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search import data, images
from search.images import Images, chosen, mapped
from studies.definition import Data


@pytest.fixture(autouse=True)
def _all_arrays_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE", 1)


def test_a_view_gives_copies_of_its_images() -> None:
    array = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    view = chosen(array, np.array([7, 2, 5]))
    assert isinstance(view, Images)
    assert (len(view), view.shape, view.dtype) == (3, (3, 2, 2, 1), np.uint8)
    assert np.array_equal(view[:2], array[[7, 2]])
    assert np.array_equal(view[np.array([2, 0])], array[[5, 7]])
    view[:1][:] = 0
    assert array[7].any()


@pytest.mark.parametrize("limit", [None, 100])
def test_a_view_has_the_images_that_a_copy_had(
    write_npz: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    wanted = Data(validation=0.2, limit=limit)
    view = data.load(str(write_npz()), wanted, [])
    monkeypatch.setattr(images, "LARGE", 1 << 40)
    copy = data.load(str(write_npz()), wanted, [])
    assert isinstance(view.x_train, Images)
    assert isinstance(copy.x_train, np.ndarray)
    assert np.array_equal(view.x_train[:], copy.x_train)
    assert np.array_equal(view.x_validation, copy.x_validation)
    assert np.array_equal(view.y_train, copy.y_train)
    assert view.fingerprint == copy.fingerprint


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(6, 2, 2),
        np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 2, 2, 1),
        np.arange(6),
    ],
    ids=["uint8", "float32", "labels"],
)
def test_an_array_of_an_uncompressed_file_is_mapped(tmp_path: Path, array: Any) -> None:
    np.savez(tmp_path / "plain.npz", other=np.zeros(1000), x_train=array)
    found = mapped(tmp_path / "plain.npz", "x_train")
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_what_cannot_be_mapped_is_read(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(6, 4)
    np.savez_compressed(tmp_path / "compressed.npz", x_train=array)
    np.savez(tmp_path / "columns.npz", x_train=np.asfortranarray(array))
    for name in ("compressed", "columns"):
        assert mapped(tmp_path / f"{name}.npz", "x_train") is None
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("x_train", b"no array")
    assert mapped(tmp_path / "odd.npz", "x_train") is None
