"""Images keep their stored type and are split by class; invalid data is refused in one sentence."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search import checks, data
from search.errors import DataError, MachineError
from storage import settings
from studies.definition import Data, parse

Write = Callable[..., Path]


# Of the first 300 digits, in three types.
FINGERPRINTS = {"bytes": "eaaf7e63e857975a", "whole": "eaaf7e63e857975a", "reals": "b4d725c75b731a3b"}


def test_digits_are_real_images_of_the_size_of_mnist() -> None:
    dataset = data.load("digits", Data(validation=0.2), [])
    assert (len(dataset.y_train), len(dataset.y_validation)) == (1150, 288)
    assert dataset.x_train.shape == (1150, 28, 28, 1)
    assert dataset.x_train.dtype == np.uint8
    assert (dataset.x_train.min(), dataset.x_train.max()) == (0, 255)
    assert dataset.classes == 10
    assert dataset.validated_on == "validation"


def test_the_validation_split_has_every_class_with_its_share(write_npz: Write) -> None:
    labels = np.repeat([0, 1, 2], [200, 80, 20])
    path = write_npz(y_train=labels)
    dataset = data.load(str(path), Data(validation=0.25), [])
    assert np.bincount(dataset.y_validation).tolist() == [50, 20, 5]
    assert np.bincount(dataset.y_train).tolist() == [150, 60, 15]
    assert dataset.summary()["most_frequent"] == 50, "who always answers its class is right so often"


def test_split_and_limit_lose_nothing_and_show_no_image_twice(tmp_path: Path) -> None:
    images = np.arange(600, dtype=np.uint16).view(np.uint8).reshape(600, 2, 1)  # all different
    np.savez(tmp_path / "all.npz", x_train=images, y_train=np.arange(600) % 3)
    dataset = data.load(str(tmp_path / "all.npz"), Data(validation=0.1), [])
    together = np.concatenate([dataset.x_train, dataset.x_validation])
    assert {image.tobytes() for image in together} == {image.tobytes() for image in images}
    limited = data.load(str(tmp_path / "all.npz"), Data(validation=0.1, limit=100), [])
    together = np.concatenate([limited.x_train, limited.x_validation])
    assert len({image.tobytes() for image in together}) == 160
    assert len(limited.y_train) == 100
    assert np.array_equal(limited.x_validation, dataset.x_validation), "it is judged by the same images"
    older = data.load(str(tmp_path / "all.npz"), Data(validation=0.1, limit=100, limit_includes_validation=True), [])
    assert (len(older.y_train), len(older.y_validation)) == (90, 10)
    assert limited.fingerprint == dataset.fingerprint, "it tells which images they were taken from"


def test_the_split_is_a_function_of_its_seed(write_npz: Write) -> None:
    path = str(write_npz())
    one, same, other = (data.load(path, Data(seed=seed), []).x_validation for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_test_images_are_read_by_the_notebook_s_protocol_alone(write_npz: Write) -> None:
    path = str(write_npz())
    notebook = data.load(path, Data(validation="test"), [])
    assert (len(notebook.y_train), len(notebook.y_validation), notebook.validated_on) == (300, 100, "test")
    with np.load(path) as arrays:
        assert np.array_equal(notebook.x_validation[..., 0], arrays["x_test"])
    # A validation split must not even open them: here they are unreadable.
    broken = str(write_npz("broken.npz", x_test=np.array([None]), y_test=np.array([None])))
    unread = data.load(broken, Data(validation=0.1), [])
    assert (unread.validated_on, unread.summary()["test"]) == ("validation", 1)
    with pytest.raises(DataError, match=r"the array x_test in .* cannot be read"):
        data.load(broken, Data(validation="test"), [])


def test_the_number_of_test_images_is_known_without_reading_them(
    write_npz: Write, write_module: Callable[[str, str], None]
) -> None:
    without = str(write_npz("without.npz", x_test=None, y_test=None))
    write_module("mine", TWO_FUNCTIONS)
    for dataset, images in (
        ("digits", 359),
        (str(write_npz()), 100),
        (without, 0),
        ("mine:arrays", 7),
        ("mine:none", 0),
    ):
        assert data.load(dataset, Data(validation=0.2), []).summary()["test"] == images, dataset


TWO_FUNCTIONS = """
import numpy as np
from sklearn.datasets import load_digits

class Unread:
    def __len__(self):
        return 7
    def __array__(self, *arguments, **options):
        raise AssertionError("the test images were read")

def arrays():
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8)[:300] / 16, labels[:300]), (Unread(), Unread())

def none():
    return arrays()[0], (None, None)
"""


def test_the_fingerprint_is_that_of_images_and_labels(write_npz: Write) -> None:
    labels = np.zeros(300, dtype=np.int64)
    labels[:100] = 1
    paths = [write_npz("a.npz"), write_npz("b.npz"), write_npz("c.npz", y_train=labels)]
    one, same, other = (data.load(str(path), Data(), []).fingerprint for path in paths)
    assert one == same != other


def test_floats_from_0_to_1_are_scaled_to_255(write_npz: Write) -> None:
    with np.load(write_npz()) as arrays:
        images = arrays["x_train"]
    as_bytes = data.load(str(write_npz()), Data(), [])
    as_reals = data.load(str(write_npz("reals.npz", x_train=images / 255.0)), Data(), [])
    assert as_reals.x_train.dtype == np.float32
    assert np.allclose(as_reals.x_train, as_bytes.x_train, atol=1e-3)


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64])
def test_images_of_0_and_1_are_taken_for_black_and_white(write_npz: Write, kind: Any) -> None:
    with np.load(write_npz()) as arrays:
        black = {key: arrays[key] > 127 for key in ("x_train", "x_test")}
    path = write_npz("black.npz", **{key: images.astype(kind) for key, images in black.items()})
    dataset = data.load(str(path), Data(validation="test"), [])
    assert dataset.x_train.dtype == dataset.x_validation.dtype == np.uint8
    assert np.array_equal(dataset.x_train[..., 0], black["x_train"] * 255)
    assert np.array_equal(dataset.x_validation[..., 0], black["x_test"] * 255)
    assert "has only the values 0 and 1" in dataset.notes[0]


def test_test_images_have_the_scale_of_the_training_images(write_npz: Write) -> None:
    with np.load(write_npz()) as arrays:
        images = arrays["x_train"]
    path = write_npz("mixed.npz", x_train=images > 127)
    with pytest.raises(DataError, match=r"x_test has values from 0 to 255, and x_train only 0 and 1"):
        data.load(str(path), Data(validation="test"), [])
    nearly_black = data.load(str(write_npz("dark.npz", x_test=images[:100] // 255)), Data(validation="test"), [])
    assert nearly_black.x_validation.max() == 1, "by itself it would look like an image of 0 and 1"


@pytest.mark.parametrize(
    ("shape", "noted"), [((3, 8, 8), True), ((1, 8, 8), True), ((8, 8, 3), False), ((8, 8), False), ((1, 64), False)]
)
def test_channels_that_come_first_are_noted(write_npz: Write, shape: tuple[int, ...], noted: bool) -> None:
    images = np.full((300, *shape), 255, dtype=np.uint8)
    notes = data.load(str(write_npz("first.npz", x_train=images)), Data(), []).notes
    assert len(notes) == noted
    assert all("write numpy.moveaxis(x, 1, -1)" in note for note in notes)


@pytest.mark.parametrize(("white", "noted"), [(255, False), (16, True), (1 / 255, True), (1.0, False)])
def test_very_dark_images_are_noted(write_npz: Write, white: float, noted: bool) -> None:
    with np.load(write_npz()) as arrays:
        share = arrays["x_train"] / 255.0
    images = (share * white).astype(np.uint8 if white > 1 else np.float32)
    dataset = data.load(str(write_npz("dark.npz", x_train=images)), Data(), [])
    assert [note for note in dataset.notes if "very dark" in note] == list(dataset.notes)
    assert bool(dataset.notes) == noted


def test_labels_of_true_and_false_are_classes_1_and_0(write_npz: Write) -> None:
    dataset = data.load(str(write_npz(y_train=np.arange(300) % 2 == 0)), Data(), [])
    assert (dataset.classes, dataset.y_train.dtype) == (2, np.int64)


def test_the_fingerprint_of_data_does_not_change_with_the_version(write_npz: Write) -> None:
    with np.load(write_npz()) as arrays:
        images = arrays["x_train"]
    kinds = {"bytes": images, "whole": images.astype(np.int32), "reals": images / 255.0}
    paths = {kind: write_npz(f"{kind}.npz", x_train=x) for kind, x in kinds.items()}
    fingerprints = {kind: data.load(str(path), Data(), []).fingerprint for kind, path in paths.items()}
    assert fingerprints == FINGERPRINTS, "studies would refuse their own images"


def test_a_file_is_searched_in_the_data_folders(home: Path, write_npz: Write) -> None:
    (home / "there").mkdir()
    write_npz().rename(home / "there" / "small.npz")
    assert data.load("small.npz", Data(), [home / "there"]).classes == 10


def test_a_file_whose_folder_was_moved_is_searched_in_the_current_folder(home: Path, write_npz: Write) -> None:
    write_npz()
    assert data.load(str(home / "before" / "small.npz"), Data(), []).classes == 10


def _nan() -> Any:
    images = np.zeros((300, 8, 8))
    images[7, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": None}, r"has no array 'y_train', it has x_train, x_test, y_test"),
        ({"x_train": None}, r"has no array 'x_train'"),
        ({"y_train": np.zeros(299, dtype=np.int64)}, r"x_train has 300 images and y_train 299 labels"),
        ({"x_train": _nan()}, r"x_train has NaN or infinite values: replace them"),
        ({"x_train": np.full((300, 8, 8), 1.5)}, r"floats from 1.5 to 1.5, .* from 0 to 1: .* write x / 255"),
        ({"x_train": np.linspace(-1, 1, 300 * 64).reshape(300, 8, 8)}, r"from -1 to 1, .* write \(x \+ 1\) / 2"),
        ({"x_train": np.linspace(-0.4, 2.8, 300 * 64).reshape(300, 8, 8)}, r"undo their standardization"),
        ({"x_train": np.full((300, 8, 8), 300)}, r"values from 300 to 300, and images must be from 0 to 255"),
        ({"x_train": np.full((300, 8, 8), "a")}, r"is of type <U1, and images must be numbers"),
        ({"x_train": np.zeros((300, 64), dtype=np.uint8)}, r"x_train has the shape \(300, 64\), and images must be"),
        ({"x_train": np.zeros((0, 8, 8), dtype=np.uint8)}, r"x_train has the shape \(0, 8, 8, 1\)"),
        (
            {"y_train": np.eye(10)[np.arange(300) % 10]},
            r"y_train has the shape \(300, 10\), and labels must be \(n,\): .*argmax",
        ),
        ({"y_train": np.full(300, 0.5)}, r"labels that are not whole numbers"),
        ({"y_train": np.full(300, np.nan)}, r"labels that are not whole numbers"),
        ({"y_train": np.full(300, -1)}, r"has the label -1, and classes are numbered from 0"),
        ({"y_train": np.zeros(300, dtype=int)}, r"y_train has only the class 0: give images of two or more classes"),
        ({"y_train": np.arange(300) % 10 + 1}, r"10 different labels from 1 to 10, but no image of class 0, .*unique"),
        ({"y_train": np.array([0, 1, 5] * 100)}, r"3 different labels from 0 to 5, but no image of class 2, .*unique"),
        (
            {"y_train": np.arange(300) % 2 + 20_250_000},
            r"2 different labels from 20250000 to 20250001, but no image of",
        ),
        ({"y_train": np.full(300, "cat")}, r"labels that are not whole numbers"),
        ({"y_train": np.ones(300, dtype=complex)}, r"labels that are not whole numbers"),
        ({"y_train": np.ones(300, dtype="m8[s]")}, r"labels that are not whole numbers"),
        ({"y_train": np.full(300, 2**63, dtype=np.uint64)}, r"has the label 9223372036854775808, and classes are"),
        ({"x_train": np.ones((300, 8, 8), dtype="m8[s]")}, r"is of type timedelta64\[s\], and images must be numbers"),
        ({"y_train": np.arange(300)}, r"data.validation = 0.1 cannot split 300 images of 300 classes"),
        ({"x_train": np.array([{}] * 300)}, r"the array x_train in .* cannot be read .* without pickling"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(write_npz: Write, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        data.load(str(write_npz("bad.npz", **arrays)), Data(), [])
    assert "\n" not in str(caught.value)


def test_test_images_of_another_kind_are_refused(write_npz: Write) -> None:
    path = write_npz("bad.npz", x_test=np.zeros((100, 9, 9), dtype=np.uint8))
    with pytest.raises(DataError, match="both must have the same shape and classes"):
        data.load(str(path), Data(validation="test"), [])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"])
def test_a_file_that_is_not_an_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad.npz is not a .npz: write it with numpy.savez"):
        data.load(str(tmp_path / "bad.npz"), Data(), [])


def test_an_npz_cut_off_in_the_middle_is_refused(write_npz: Write) -> None:
    path = write_npz()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"is not a .npz"):
        data.load(str(path), Data(), [])


def test_a_single_array_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match=r"is not a .npz"):
        data.load(str(tmp_path / "one.npz"), Data(), [])


def test_a_missing_file_names_the_folders_and_the_variable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"none.npz does not exist, and neither .* nor {tmp_path} has .*TRIALYARD_DATA"):
        data.load("none.npz", Data(), [tmp_path])


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^file-file.* cannot be looked for \(File name too long\): correct dataset"):
        data.load("file-" * 100 + ".npz", Data(), [tmp_path])


def test_a_slow_download_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 0.01)
    with pytest.raises(
        DataError, match=r"cannot be downloaded \(it was not done after 0 s\): put the file into a folder"
    ):
        data.load("mnist", Data(), [tmp_path])


@pytest.mark.parametrize("module", ["sklearn.datasets", "sklearn.model_selection"])
def test_a_broken_scikit_learn_is_the_machine_s_fault(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MachineError, match=rf"scikit-learn cannot be imported \(ModuleNotFoundError: .*{module}.* again"
    ):
        data.load("digits", Data(), [])


def test_a_limit_too_small_for_the_classes_is_refused(write_npz: Write) -> None:
    with pytest.raises(DataError, match=r"data.limit = 5 cannot split 270 images of 10 classes"):
        data.load(str(write_npz()), Data(limit=5), [])


@pytest.mark.long
def test_without_a_network_mnist_names_the_variable_and_digits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A real download through a proxy that does not exist: nothing listens on port 9.
    for scheme in ("http", "https", "HTTP", "HTTPS"):
        monkeypatch.setenv(f"{scheme}_proxy" if scheme.islower() else f"{scheme}_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("KERAS_HOME", str(home / "keras"))
    with pytest.raises(DataError, match=r"TRIALYARD_DATA and cannot be downloaded .*study `digits`") as caught:
        data.load("fashion_mnist", Data(), [home / "data"])
    assert "\n" not in str(caught.value)
    assert not (home / "data" / "fashion_mnist.npz").exists()


def _definition(text: str) -> Any:
    return parse('name = "n"\nmodel = "convnet"\nbudget.trials = 1\nspace.dropout = {low = 0.0, high = 0.5}\n' + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('dataset = "digits"\nfixed = {depth = 3, batch_size = 2000}', r"fixed.batch_size = 2000 is larger than the"),
        ('dataset = "small.npz"\nfixed = {depth = 7}', r"images of 8x8, too small for convnet of depth 7, .* 16x16"),
        (
            'dataset = "small.npz"\nfixed = {depth = 3}\ndata.limit = 100',
            r"batch_size = 128 is larger than the 100 training images of small.npz",
        ),
    ],
)
def test_data_are_checked_against_batch_and_model(home: Path, write_npz: Write, text: str, message: str) -> None:
    write_npz()
    with pytest.raises(DataError, match=message):
        checks.check(_definition(text), settings.load())


def test_the_largest_searched_batch_must_fit(home: Path) -> None:
    text = (
        'name = "n"\nmodel = "convnet"\ndataset = "digits"\nbudget.trials = 1\nfixed = {depth = 3}\n'
        "space.batch_size = { low = 16, high = 4096, log = true }"
    )
    with pytest.raises(DataError, match=r"space.batch_size.high = 4096 is larger"):
        checks.check(parse(text), settings.load())


# --- a user's own -----------------------------------------------------------------------------------------

OWN = """
import numpy as np

def digits():
    images = np.zeros((40, 20, 20), dtype=np.uint8)
    labels = np.arange(40) % 2
    images[labels == 1, 5:15, 5:15] = 255
    return (images, labels), (images[:10], labels[:10])

def broken():
    raise RuntimeError("the disk\\nis gone")

def half():
    return digits()[0]

number = 3
"""


@pytest.fixture
def _own(write_module: Callable[[str, str], None]) -> None:
    write_module("own_data", OWN)


@pytest.mark.usefixtures("_own")
def test_own_data_have_the_form_of_keras_datasets() -> None:
    dataset = data.load("own_data:digits", Data(validation=0.25), [])
    assert (len(dataset.y_train), len(dataset.y_validation), dataset.image_shape) == (30, 10, (20, 20, 1))


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        (
            "nowhere.at_all:load",
            r"nowhere.at_all:load cannot be imported \(ModuleNotFoundError: No module",
            MachineError,
        ),
        ("own_data:none", r"own_data:none cannot be imported \(AttributeError: ", MachineError),
        ("own_data:number", r"own_data:number is of type int, not a function", MachineError),
        ("own_data:broken", r"ended in RuntimeError: the disk is gone; correct the function", DataError),
        ("own_data:half", r"must return \(\(x_train, y_train\), \(x_test, y_test\)\)", DataError),
    ],
)
@pytest.mark.usefixtures("_own")
def test_own_data_that_fail_are_named(name: str, message: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=message) as caught:
        data.load(name, Data(), [])
    assert "\n" not in str(caught.value)


def test_class_names_are_clean_texts_and_differ(tmp_path: Path) -> None:
    arrays = {"x_train": np.zeros((40, 4, 4), np.uint8), "y_train": np.arange(40) % 2}

    def names(given: Any) -> tuple[str, ...] | None:
        np.savez(tmp_path / "named.npz", **arrays, class_names=given)
        return data.load(str(tmp_path / "named.npz"), Data(validation=0.2), []).class_names

    assert names(np.array([b"cat", "K\u00e4fer".encode()])) == ("cat", "K\u00e4fer")
    assert names(np.array(["caf\udce9", "a\x1b[31m\nb"])) == ("caf?", "a[31mb")
    with pytest.raises(DataError, match=r"class_names has 'cat' more than once: give each class a name of its own"):
        names(np.array(["cat", "cat"]))
