"""A folder with one sub-folder a class is a dataset; what is wrong with it is said in one sentence."""

import gzip
import io
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import write_digits, write_png

from search import data, image_conversion, image_folder
from search.errors import DataError
from studies.definition import Data, differences, parse
from studies.errors import DefinitionError

GREY, COLOURS = np.full((4, 6, 1), 7, np.uint8), np.full((4, 6, 3), (10, 20, 30), np.uint8)
DEFINITION = """
name = "photos"
dataset = "photos/"
model = "convnet"
[budget]
trials = 2
[space]
depth = { choices = [3, 5] }
"""


def _convert(folder: Path, wanted: Data) -> dict[str, Any]:
    """The arrays of a folder, in this process."""
    listed = asdict(image_folder.listing(folder, wanted))
    return image_conversion.convert({**listed, "size": wanted.size, "skip_bad": wanted.skip_bad})


@pytest.fixture
def _convert_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converts in this process, because another one takes seconds to import TensorFlow."""

    def run(order: dict[str, Any]) -> str | None:
        try:
            arrays = image_conversion.convert(order)
        except DataError as error:
            return str(error)
        Path(order["file"]).parent.mkdir(exist_ok=True)
        np.savez(order["file"], allow_pickle=False, **arrays)
        return None

    monkeypatch.setattr(image_folder, "run_conversion", run)


@pytest.mark.usefixtures("_convert_here")
def test_a_folder_is_a_dataset_with_class_names_and_is_converted_once(home: Path) -> None:
    write_digits(home / "photos", 60)
    definition = parse(DEFINITION, folder=home)
    assert definition.dataset == f"{home}/photos/"
    wanted = Data(validation=0.2, test=0.2)
    dataset = data.load(definition.dataset, wanted, [home / "cache"], test=True)
    assert dataset.image_shape == (8, 8, 1)
    assert (len(dataset.y_train), len(dataset.y_validation)) == (38, 10)
    assert dataset.y_test is not None
    assert len(dataset.y_test) == 12
    assert dataset.class_names == ("even", "odd")
    assert dataset.summary()["class_names"] == ["even", "odd"]
    assert dataset.summary()["test"] == 12
    (cache,) = (home / "cache").iterdir()
    made = cache.stat().st_mtime_ns
    assert data.load("photos/", wanted, [home / "cache"]).fingerprint == dataset.fingerprint
    assert cache.stat().st_mtime_ns == made, "it is read, not made again"
    (home / "photos").rename(home / "moved")
    (home / "elsewhere").mkdir()
    (home / "moved").rename(home / "elsewhere" / "photos")
    assert (
        data.load(definition.dataset, wanted, [home / "elsewhere", home / "cache"]).fingerprint == dataset.fingerprint
    )
    changed = home / "elsewhere" / "photos" / "even" / "0000.png"
    write_png(changed, np.zeros((8, 8, 1), np.uint8))
    assert (
        data.load(definition.dataset, wanted, [home / "elsewhere", home / "cache"]).fingerprint != dataset.fingerprint
    )


def test_grey_images_get_three_channels_where_others_have_colours(tmp_path: Path) -> None:
    write_png(tmp_path / "a" / "grey.png", GREY)
    write_png(tmp_path / "b" / "deep" / "colours.PNG", COLOURS)
    write_png(tmp_path / "b" / "transparent.png", np.concatenate([COLOURS, COLOURS[..., :1]], axis=-1))
    arrays = _convert(tmp_path, Data())
    assert arrays["x_train"].shape == (3, 4, 6, 3)
    assert arrays["x_train"].dtype == np.uint8
    assert arrays["x_train"][:, 0, 0].tolist() == [[7, 7, 7], [10, 20, 30], [10, 20, 30]]
    assert arrays["y_train"].tolist() == [0, 1, 1]
    (tmp_path / "b" / "deep" / "colours.PNG").unlink()
    write_png(tmp_path / "b" / "transparent.png", GREY)
    assert _convert(tmp_path, Data())["x_train"].shape == (2, 4, 6, 1)


def test_train_and_test_folders_are_read_as_such(tmp_path: Path) -> None:
    for name, image in (("train/a/1", GREY), ("train/b/1", GREY), ("test/b/1", GREY + 1), ("valid/a/1", GREY)):
        write_png(tmp_path / f"{name}.png", image)
    arrays = _convert(tmp_path, Data())
    assert (arrays["y_train"].tolist(), arrays["y_test"].tolist()) == ([0, 1], [1])
    assert arrays["x_test"].max() == 8
    assert image_folder.listing(tmp_path, Data()).notes == (
        f"{tmp_path}/valid/ is not read, only the sub-folders of train/ and test/ are",
        f"{tmp_path}/test/ has no image of a: a confirmation says nothing about such classes",
    )
    with pytest.raises(DataError, match=r"data.test = 0.5 is for folders without test/"):
        image_folder.listing(tmp_path, Data(test=0.5))
    write_png(tmp_path / "test/c/1.png", GREY)
    with pytest.raises(DataError, match=r"test/ has the class 'c', and .*train/ has only a, b: give both the same"):
        image_folder.listing(tmp_path, Data())


@pytest.mark.usefixtures("_convert_here")
def test_all_seeds_have_the_same_test_images_and_none_is_trained_on(home: Path) -> None:
    write_digits(home / "photos", 100)
    one, other = (
        data.load("photos/", Data(test=0.2, validation=0.2, seed=seed), [home / "cache"], test=True) for seed in (0, 1)
    )
    assert one.x_test is not None
    assert other.x_test is not None
    assert np.array_equal(one.x_test, other.x_test)
    assert one.judged_fingerprint == other.judged_fingerprint
    assert not np.array_equal(one.x_validation, other.x_validation)
    assert len(list((home / "cache").iterdir())) == 1, "the files are decoded once"
    tests = {image.tobytes() for image in one.x_test}
    for dataset in (one, other):
        assert tests.isdisjoint(image.tobytes() for image in (*dataset.x_train, *dataset.x_validation))


def test_the_test_share_is_one_of_each_class_and_leaves_images_to_train_with(tmp_path: Path) -> None:
    write_digits(tmp_path, 100)
    listed = image_folder.listing(tmp_path, Data(test=0.2))
    assert np.bincount([number for _, number in listed.test]).tolist() == [10, 10]
    assert not {name for name, _ in listed.test} & {name for name, _ in listed.train}
    for name in ("1", "2"):
        write_png(tmp_path / "rare" / f"{name}.png", GREY)
    for share in (0.2, 0.8):
        listed = image_folder.listing(tmp_path, Data(test=share))
        assert [[number for _, number in part].count(2) for part in (listed.train, listed.test)] == [1, 1], share
    (tmp_path / "rare" / "1.png").unlink()
    with pytest.raises(DataError, match=r"/rare/ has only 1 image, and data.test = 0.8 keeps some of each class"):
        image_folder.listing(tmp_path, Data(test=0.8))
    assert image_folder.listing(tmp_path, Data()).test == ()


def test_a_link_to_a_folder_above_repeats_no_image(tmp_path: Path) -> None:
    for name in ("photos/a/1.png", "photos/b/1.png", "elsewhere/2.png"):
        write_png(tmp_path / name, GREY)
    (tmp_path / "photos" / "all").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "a" / "all").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "photos" / "a" / "self").symlink_to(".")
    (tmp_path / "photos" / "b" / "more").symlink_to(tmp_path / "elsewhere")
    listed = image_folder.listing(tmp_path / "photos", Data())
    assert listed.train == (("a/1.png", 0), ("b/1.png", 1), ("b/more/2.png", 1))


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_png(tmp_path / "a" / "small.png", GREY)
    write_png(tmp_path / "b" / "large.png", GREY.repeat(2, axis=0))
    with pytest.raises(DataError, match=r"several sizes \(a/small.png: 4x6, b/large.png: 8x6\).*size = \[64, 64\]"):
        _convert(tmp_path, Data())
    assert _convert(tmp_path, Data(size=(5, 3)))["x_train"].shape == (2, 5, 3, 1)


def test_a_large_image_is_smoothed_before_it_is_made_small(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, 3::8] = stripes[:, 4::8] = 255  # the two columns that plain interpolation would take alone
    for name in ("a", "b"):
        write_png(tmp_path / name / "stripes.png", stripes)
    small = _convert(tmp_path, Data(size=(8, 8)))["x_train"]
    assert 32 < small.min() <= small.max() < 128, "a quarter of the image is white"


@pytest.mark.usefixtures("_convert_here")
def test_unreadable_files_are_named_or_left_out_and_counted(home: Path) -> None:
    write_digits(home / "photos", 40)
    whole = (home / "photos" / "odd" / "0001.png").read_bytes()
    (home / "photos" / "odd" / "short.png").write_bytes(whole[:-30])
    (home / "photos" / "even" / "empty.jpg").touch()
    (home / "photos" / "odd" / "text.jpeg").write_text("no image")
    os.symlink("nowhere", home / "photos" / "odd" / "link.png")
    names = "even/empty.jpg, odd/link.png, odd/short.png, odd/text.jpeg"
    with pytest.raises(DataError, match=rf"^4 of the 44 image files of {home}/photos/ .*\({names}\).*--skip-bad"):
        data.load("photos/", Data(), [home])
    dataset = data.load("photos/", Data(skip_bad=True), [home])
    assert len(dataset.y_train) + len(dataset.y_validation) == 40
    assert dataset.notes == (f"4 files are left out, because they cannot be read as images: {names}",)


def test_a_bad_file_whose_name_is_not_utf_8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits(tmp_path, 10)
    (tmp_path / "even" / "bad\udcff.png").touch()
    listed = asdict(image_folder.listing(tmp_path, Data()))
    order = json.dumps({**listed, "folder": str(tmp_path), "size": None, "skip_bad": False, "file": "none"})
    monkeypatch.setattr("sys.stdin", io.StringIO(order))
    with pytest.raises(SystemExit):
        image_conversion.main()
    assert "1 of the 11 image files" in (out := capsys.readouterr().out)
    assert "(even/bad?.png): repair or remove it, or leave it out" in out


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], r"has no images \(\.bmp.*put the images of each class into a sub-folder"),
        (["1.png", "2.png"], r"has no images \(\.bmp.*put the images of each class into a sub-folder"),
        (["cats/1.png"], r"has images of only the class 'cats': add a sub-folder of another class"),
        (["cats/1.png", "dogs/1.txt"], r"has images of only the class 'cats'"),
        (
            ["cats/1.png", "dogs/1.png", "test/cats/1.png", "test/dogs/1.png"],
            r"has test/ with a sub-folder for each class, but no such train/: move the folders of the images to train",
        ),
        (
            ["Training/cats/1.png", "Training/dogs/1.png", "Testing/dogs/1.png"],
            r"the sub-folders Testing, Training, and these .* names \(cats, dogs\): call them train/ and test/",
        ),
        (["train/cat.1.png", "train/dog.1.png", "test/1.png"], r"/train/ has no images .* in sub-folders: put"),
    ],
)
def test_a_folder_without_images_of_two_classes_is_refused(tmp_path: Path, files: list[str], problem: str) -> None:
    for name in files:
        write_png(tmp_path / name, GREY)
    with pytest.raises(DataError, match=problem):
        image_folder.listing(tmp_path, Data())


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["car/1.png", "plane/1.png", "train/1.png"], ("car", "plane", "train")),
        (["car/1.png", "test/1.png", "train/1.png"], ("car", "test", "train")),
        (["cats/2020/1.png", "cats/2021/1.png", "dogs/2020/1.png", "dogs/2021/1.png"], ("cats", "dogs")),
        (["trained/left/1.png", "trained/right/1.png", "wild/left/1.png", "wild/2.png"], ("trained", "wild")),
    ],
)
def test_a_class_may_have_any_name_and_deeper_folders(tmp_path: Path, files: list[str], classes: list[str]) -> None:
    for name in files:
        write_png(tmp_path / name, GREY)
    listed = image_folder.listing(tmp_path, Data())
    assert (listed.classes, len(listed.train), listed.notes) == (classes, len(files), ())


def test_test_images_without_classes_are_noted(tmp_path: Path) -> None:
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/1"):
        write_png(tmp_path / f"{name}.png", GREY)
    listed = image_folder.listing(tmp_path, Data(test=0.5))
    assert (len(listed.train), len(listed.test)) == (2, 2)
    assert listed.notes == (f"{tmp_path}/test/ is not read, only the sub-folders of train/ and test/ are",)


def test_what_is_not_read_is_noted(tmp_path: Path) -> None:
    for name in ("loose.png", "a/1.png", "b/1.png", "b/2.webp", "b/.hidden.png", ".cache/1.png"):
        write_png(tmp_path / name, GREY)
    listed = image_folder.listing(tmp_path, Data())
    assert [name for name, _ in listed.train] == ["a/1.png", "b/1.png"]
    assert [note.partition("/ ")[2] for note in listed.notes] == [
        "has 1 file that is not read, because of the type: .webp",
        "has 1 image outside its sub-folders that is not read, because it has no class",
    ]


@pytest.mark.parametrize("line", ["size = [64, 64]", "skip_bad = true", "test = 0.2"])
def test_keys_of_folders_are_refused_for_other_data(line: str) -> None:
    text = DEFINITION.replace("[budget]", f"[data]\n{line}\n[budget]")
    assert parse(text).dataset == "photos/"
    with pytest.raises(DefinitionError, match=r"is for a folder of images, not for digits: leave it out"):
        parse(text.replace('"photos/"', '"digits"'))


def test_the_place_of_a_folder_may_differ_but_not_its_size() -> None:
    one = parse(DEFINITION)
    assert differences(one, parse(DEFINITION.replace("photos/", "/data/photos/"))) == []
    assert differences(one, parse(DEFINITION.replace("photos/", "pictures/"))) != []
    resized = parse(DEFINITION.replace("[budget]", "[data]\nsize = [8, 8]\n[budget]"))
    assert differences(one, resized) == ["data.size = null in the database and [8, 8] in this definition"]


# --- IDX files --------------------------------------------------------------------------------------------


def _write_idx(path: Path, array: Any) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _write_all(folder: Path, prefix: str, test: str, ending: str) -> tuple[Any, Any]:
    x, y = np.arange(40 * 12, dtype=np.uint16).astype(np.uint8).reshape(40, 3, 4), np.arange(40, dtype=np.uint8) % 4 + 1
    folder.mkdir()
    for part, images, labels in (("train", x, y), (test, x[::4], y[:10])):
        _write_idx(folder / f"{prefix}{part}-images-idx3-ubyte{ending}", images)
        _write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte{ending}", labels)
    return x, y


@pytest.mark.parametrize(
    ("prefix", "test", "ending"), [("", "t10k", ""), ("", "t10k", ".gz"), ("emnist-letters-", "test", ".gz")]
)
def test_idx_files_are_a_dataset(tmp_path: Path, prefix: str, test: str, ending: str) -> None:
    x, _ = _write_all(tmp_path / "letters", prefix, test, ending)
    dataset = data.load(f"{tmp_path}/letters/", Data(validation="test"), [tmp_path])
    assert np.array_equal(dataset.x_train[..., 0], x)
    assert np.array_equal(dataset.x_validation[..., 0], x[::4])
    assert (dataset.classes, dataset.class_names) == (4, ("1", "2", "3", "4")), "EMNIST numbers its letters from 1"
    assert data.load(f"{tmp_path}/letters/", Data(validation=0.1), [tmp_path]).summary()["test"] == 10


def test_bad_idx_files_are_refused(tmp_path: Path) -> None:
    _write_all(tmp_path / "letters", "", "t10k", "")
    images = tmp_path / "letters" / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(
        DataError, match=r"is incomplete, or not an IDX file .* 3 axes \(495 bytes\): download it again"
    ):
        data.load(f"{tmp_path}/letters/", Data(), [tmp_path])
    images.rename(tmp_path / "letters" / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"cannot be read \(Not a gzipped file.*download it again"):
        data.load(f"{tmp_path}/letters/", Data(), [tmp_path])
    (tmp_path / "letters" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"has IDX files, but none for x_train: add train-images-idx3-ubyte"):
        data.load(f"{tmp_path}/letters/", Data(), [tmp_path])
    _write_idx(tmp_path / "letters" / "digits-train-images-idx3-ubyte", np.zeros((1, 1, 1), np.uint8))
    _write_idx(tmp_path / "letters" / "letters-train-images-idx3-ubyte", np.zeros((1, 1, 1), np.uint8))
    with pytest.raises(DataError, match=r"has two files for x_train.*: give each dataset a folder of its own"):
        data.load(f"{tmp_path}/letters/", Data(), [tmp_path])
