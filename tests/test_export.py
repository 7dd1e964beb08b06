"""An export is complete, says how it was made, and is used without Trialyard."""

import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow
from hypothesis import given
from hypothesis import strategies as st
from image_files import write_png
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

import studies
from storage import claims, database, ledger, owners
from studies import convert, exports, registry
from studies import definition as definitions
from studies.definition import Candidate, Confirm, Data, Definition, parse, to_toml
from studies.errors import StudyError

CONFIRM = Confirm(
    study="x", incarnation="a" * 32, candidates=(Candidate(trial=0, epochs=2, hyperparameters={"dropout": 0.1}),)
)
FILES = ["README.md", "definition.toml", "history.json", "model.keras", "trial.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of every kind of layer that ours have, saved."""
    net = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="images"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
            keras.layers.Activation("softmax", dtype="float32"),
        ]
    )
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    net.save(path)
    return path


@pytest.fixture
def finished(home: Path, trivial: Definition, saved: Path) -> RDBStorage:
    """The study `trivial` with trial 0 at 0.7 and trial 1 at 0.9, whose files are there."""
    storage = database.create(f"sqlite:///{home}/yard/studies.db")
    registry.create(trivial, storage, {"fingerprint": "0" * 16, "image_shape": [8, 8, 1]})
    for value in (0.7, 0.9):
        claim = claims.claim(storage, ledger.find(storage, trivial.name), owners.this_slot("cpu:0"), 60.0)
        assert claim is not None
        folder = home / "yard" / "artifacts" / claim.folder
        folder.mkdir(parents=True)
        shutil.copy(saved, folder / "model.keras")
        (folder / "history.json").write_text(f'[{{"epoch": 1, "val_accuracy": {value}}}]', encoding="utf-8")
        recorded: dict[str, Any] = {"epochs": 2, "best_epoch": 1, "seed": 5, "versions": {"keras": keras.__version__}}
        recorded |= {"model": str(claim.folder / "model.keras"), "history": str(claim.folder / "history.json")}
        recorded |= {"data_fingerprint": "f" * 16}
        claims.finish(storage, claim, TrialState.COMPLETE, value, recorded)
    return storage


def test_an_export_has_all_and_its_readme_is_true(finished: RDBStorage, home: Path) -> None:
    folder = studies.export("trivial", home / "new" / "best", storage=finished)
    assert sorted(os.listdir(folder)) == FILES
    assert parse((folder / "definition.toml").read_text(encoding="utf-8")) == registry.definition_of(
        "trivial", finished
    )
    assert json.loads((folder / "history.json").read_text(encoding="utf-8")) == [{"epoch": 1, "val_accuracy": 0.9}]
    record = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    assert (record["study"], record["number"], record["seed"]) == ("trivial", 1, 5)
    assert record["metrics"]["val_accuracy"] == 0.9
    assert record["hyperparameters"] == {"depth": 3}
    assert record["versions"] == {"keras": keras.__version__}
    assert record["data"] == {"dataset": "digits", "fingerprint": "f" * 16}
    assert set(record["software"]) == {"trialyard", "python", "platform"}

    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code.splitlines()) == 6
    # A user who has the folder and Keras, but not Trialyard.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\[\d\]", result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("change", "attributes", "name", "words"),
    [
        ({}, {}, "val_accuracy", ("validation accuracy 0.9000. It takes", "the weights of its best epoch")),
        (
            {"data": Data(validation="test")},
            {},
            "test_accuracy",
            ("test accuracy 0.9000. It takes", "the weights of its best epoch"),
        ),
        (
            {"confirm": CONFIRM},
            {},
            "test_accuracy",
            ("test accuracy 0.9000. It takes", "the weights of its last epoch"),
        ),
        (
            {},
            {"repeats": [0.88, 0.92]},
            "val_accuracy",
            (
                "validation accuracy 0.9000, the mean of 2 trainings; this model is the best one's, with 0.9200. It",
                "the weights of the best epoch of all its trainings",
            ),
        ),
    ],
)
def test_an_accuracy_is_named_after_what_it_is(
    finished: RDBStorage,
    trivial: Definition,
    change: dict[str, Any],
    attributes: dict[str, Any],
    name: str,
    words: tuple[str, str],
) -> None:
    definition, trial = trivial.model_copy(update=change), create_trial(value=0.9, user_attrs=attributes)
    metrics = exports._record(ledger.find(finished, "trivial"), trial, definition)["metrics"]
    assert [key for key in metrics if key.endswith("accuracy")] == [name]
    assert metrics[name] == 0.9
    assert metrics.get("repeats") == attributes.get("repeats")
    readme = exports._readme("trivial", trial, definition, None, [8, 8, 1])
    for word in words:
        assert word in readme


def test_the_readme_of_a_model_that_gives_logits_says_so_and_prints_classes(
    finished: RDBStorage, home: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = keras.Sequential([keras.Input((8, 8, 1)), *keras.models.load_model(saved).layers[:-1]])
    net.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    net.save(next((home / "yard" / "artifacts").glob("trivial-*/1/1/model.keras")))
    folder = studies.export("trivial", home / "best", storage=finished)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "and gives logits, of which `softmax` makes class probabilities." in readme
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    variables: dict[str, Any] = {}
    exec(code, variables)
    assert variables["probabilities"].sum(axis=1) == pytest.approx([1.0])
    assert re.fullmatch(r"\[\d\]", capsys.readouterr().out.splitlines()[-1])


def test_a_damaged_model_is_exported_as_it_is(finished: RDBStorage, home: Path) -> None:
    next((home / "yard" / "artifacts").glob("trivial-*/1/1/model.keras")).write_bytes(b"no model")
    folder = studies.export("trivial", home / "best", storage=finished)
    assert (folder / "model.keras").read_bytes() == b"no model"


def test_any_trial_that_has_its_model_can_be_taken(finished: RDBStorage, home: Path) -> None:
    folder = studies.export("trivial", home / "other", storage=finished, trial=0)
    assert json.loads((folder / "trial.json").read_text(encoding="utf-8"))["number"] == 0
    assert "Trial 0: validation accuracy 0.7000." in (folder / "README.md").read_text(encoding="utf-8")
    assert studies.best_model("trivial", finished, trial=0).output_shape == (None, 10)
    next((home / "yard" / "artifacts").glob("*/0/1/model.keras")).unlink()
    wanted = "trial 0 of study 'trivial' has no model on this machine, and trial 1 has one: complete trials keep one"
    for take in (
        studies.best_model,
        lambda *given, **more: studies.export(given[0], "third", storage=given[1], **more),
    ):
        with pytest.raises(StudyError, match=wanted):
            take("trivial", finished, trial=0)
        with pytest.raises(StudyError, match=r"has no trial 2: its 2 trials are numbered from 0"):
            take("trivial", finished, trial=2)
    assert not (home / "third").exists()


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):  # type: ignore[misc]
    """A model without a symbolic input."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.flat, self.out = keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")

    def call(self, x: Any) -> Any:
        return self.out(self.flat(x))

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


def test_a_subclass_of_keras_model_is_not_converted_without_its_shape(tmp_path: Path) -> None:
    net = Subclassed()
    net(keras.ops.zeros((1, 8, 8, 1)))
    net.save(tmp_path / "model.keras")
    with pytest.raises(SystemExit, match=r"Subclassed is a subclass of keras\.Model, and the shape of its images"):
        convert.main(str(tmp_path / "model.keras"), "tflite", str(tmp_path / "out"))


def test_it_refuses_to_overwrite(finished: RDBStorage, home: Path) -> None:
    (home / "there").mkdir()
    (home / "link").symlink_to("nowhere")
    for name in ("there", "link", "yard/studies.db"):
        with pytest.raises(StudyError, match="exists already: name a folder that does not exist yet"):
            studies.export("trivial", home / name, storage=finished)
    assert list((home / "there").iterdir()) == []


def test_it_is_written_whole_or_not_at_all(finished: RDBStorage, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any, **options: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exports, "_readme", die)
        with pytest.raises(KeyboardInterrupt):
            studies.export("trivial", home / "best", storage=finished)
    assert sorted(os.listdir(home)) == ["yard"]
    (home / "file").write_text("", encoding="utf-8")
    with pytest.raises(StudyError, match=r"file/best cannot be written \(Not a directory\)"):
        studies.export("trivial", home / "file" / "best", storage=finished)


def test_a_history_that_is_elsewhere_is_named(finished: RDBStorage, home: Path) -> None:
    next((home / "yard" / "artifacts").glob("trivial-*/1/1/history.json")).unlink()
    with pytest.raises(StudyError, match=r"the history of trial 1 of study 'trivial' is not on this machine"):
        studies.export("trivial", home / "best", storage=finished)


@pytest.mark.long
def test_formats_give_the_same_predictions(finished: RDBStorage, home: Path, saved: Path) -> None:
    import tensorflow as tf

    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1)).astype(np.float32)
    wanted = keras.models.load_model(saved).predict(images, verbose=0)
    for name in ("search", "studies", "storage"):  # a user's own, in the folder where they work
        (home / f"{name}.py").write_text("raise RuntimeError('not this one')\n", encoding="utf-8")

    folder = studies.export("trivial", home / "lite", "tflite", finished)
    assert sorted(os.listdir(folder)) == sorted([*FILES, "model.tflite"])
    lite = tf.lite.Interpreter(str(folder / "model.tflite"))
    lite.allocate_tensors()
    lite.set_tensor(lite.get_input_details()[0]["index"], images)
    lite.invoke()
    np.testing.assert_allclose(lite.get_tensor(lite.get_output_details()[0]["index"]), wanted, atol=1e-5)

    folder = studies.export("trivial", home / "saved", "savedmodel", finished)
    served = tf.saved_model.load(str(folder / "saved_model"))
    np.testing.assert_allclose(served.serve(images), wanted, atol=1e-5)
    assert "`saved_model`" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("is_inner", [False, True], ids=["plain", "in another model, as a backbone is"])
def test_a_model_in_bfloat16_is_converted_in_float32(
    finished: RDBStorage, home: Path, saved: Path, is_inner: bool
) -> None:
    """Its interpreters have no bfloat16, in which `precision = "auto"` trains where the machine has it."""
    import tensorflow as tf

    def in_bfloat16(layer: Any) -> Any:
        return type(layer).from_config(layer.get_config() | {"dtype": "mixed_bfloat16"})

    net = keras.models.load_model(saved)
    half = keras.models.clone_model(net, clone_function=in_bfloat16)
    half.set_weights(net.get_weights())
    assert half.layers[1].compute_dtype == "bfloat16"
    if is_inner:
        half = keras.Sequential([keras.Input((8, 8, 1)), half])
    half.save(next((home / "yard" / "artifacts").glob("trivial-*/1/1/model.keras")))
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1)).astype(np.float32)
    folder = studies.export("trivial", home / "lite", "tflite", finished)
    lite = tf.lite.Interpreter(str(folder / "model.tflite"))
    lite.allocate_tensors()
    lite.set_tensor(lite.get_input_details()[0]["index"], images)
    lite.invoke()
    predictions = lite.get_tensor(lite.get_output_details()[0]["index"])
    np.testing.assert_allclose(predictions, net.predict(images, verbose=0), atol=1e-5)


SUBCLASSED = """
import keras
from keras import layers, ops

@keras.saving.register_keras_serializable()
class Sub(keras.Model):
    def __init__(self, **rest):
        super().__init__(**rest)
        self.flat, self.dense = layers.Flatten(), layers.Dense(10, activation="softmax")

    def call(self, images):
        return self.dense(self.flat(ops.cast(images, "float32") / 255.0))
"""


@pytest.mark.long
def test_a_subclassed_model_is_converted_and_the_readme_loads_it(
    home: Path, write_module: Callable[[str, str], None], trivial: Definition
) -> None:
    write_module("mine", SUBCLASSED)
    (home / "modules").mkdir()
    (home / "mine.py").rename(home / "modules" / "mine.py")
    sys.path.append(str(home / "modules"))  # as of a script in another folder
    net = importlib.import_module("mine").Sub()
    net(np.zeros((1, 8, 8, 1)))
    net.save(home / "model.keras")
    own = trivial.model_copy(update={"model": "mine:build"})
    exports._convert(home / "model.keras", "tflite", home / "model.tflite", own, [8, 8, 1])
    assert (home / "model.tflite").is_file()
    readme = exports._readme("own", create_trial(value=0.5), own, None, [8, 8, 1])
    (home / "modules" / "mine.py").rename(home / "mine.py")  # as the README says
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\d\]", result.stdout.splitlines()[-1])


def _bmp(image: np.ndarray[Any, Any]) -> bytes:
    """`image`, (height, width) or (height, width, 3), as a BMP file; its width is divisible by 4."""
    palette = bytes(np.repeat(np.arange(256, dtype=np.uint8), 4)) if image.ndim == 2 else b""
    pixels, start = image[::-1, :, ::-1] if image.ndim == 3 else image[::-1], 54 + len(palette)
    height, width, bits = *image.shape[:2], 8 if image.ndim == 2 else 24
    head = struct.pack("<IIiiHHIIiiII", start, 40, width, height, 1, bits, 0, pixels.size, 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<II", start + pixels.size, 0) + head + palette + pixels.tobytes()


@pytest.mark.parametrize("data", [Data(), Data(size=(8, 8))])
def test_the_readme_of_grey_images_reads_any_file(trivial: Definition, home: Path, data: Data) -> None:
    folder = trivial.model_copy(update={"dataset": "photos/", "data": data})
    readme = exports._readme("photos", create_trial(value=0.5), folder, None, [8, 8, 1])
    (code,) = re.findall(r"^(image = .*)^probabilities", readme, re.DOTALL | re.MULTILINE)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (home / "grey.bmp").write_bytes(_bmp(grey))
    (home / "colours.bmp").write_bytes(_bmp(np.stack([grey] * 3, axis=-1)))
    write_png(home / "grey.png", grey[..., None])
    write_png(home / "alpha.png", np.stack([grey] * 4, axis=-1))
    for file in ("grey.bmp", "colours.bmp", "grey.png", "alpha.png"):
        variables: dict[str, Any] = {"tf": tensorflow}
        exec(code.replace("yours.jpg", str(home / file)), variables)
        assert variables["images"].shape == (1, 8, 8, 1)
        assert np.abs(np.array(variables["images"])[0, ..., 0].astype(int) - grey).max() <= 1, file


def test_the_readme_of_idx_files_takes_arrays(trivial: Definition, home: Path) -> None:
    letters = trivial.model_copy(update={"dataset": "letters/"})
    (home / "yard" / "data" / "letters").mkdir(parents=True)
    (home / "yard" / "data" / "letters" / "train-images-idx3-ubyte.gz").touch()
    readme = exports._readme("letters", create_trial(value=0.5), letters, None, [28, 28, 1])
    assert "images = np.zeros((1, 28, 28, 1))  # yours" in readme


def test_the_readme_of_a_notebook_s_model_imports_no_trialyard(trivial: Definition) -> None:
    stored = trivial.model_copy(update={"model": "trialyard.functions.build_0:build_0"})
    readme = exports._readme("own", create_trial(value=0.5), stored, None, [8, 8, 1])
    assert "import trialyard" not in readme
    assert "define and register their classes under the same names" in " ".join(readme.split())


def test_a_written_model_that_gives_other_probabilities_is_refused(
    saved: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_run", lambda format, target, images: np.zeros((1, 10)))
    monkeypatch.setattr(keras.Model, "export", lambda *arguments, **options: None)
    with pytest.raises(SystemExit, match="its probabilities differ by up to"):
        convert.main(str(saved), "tflite", str(home / "model.tflite"))


def test_a_module_of_own_layers_that_cannot_be_imported_is_the_reason(
    home: Path,
    write_module: Callable[[str, str], None],
    trivial: Definition,
    saved: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_module("mine", "raise RuntimeError('no licence')")  # a pickled function may raise anything, too
    monkeypatch.setattr(keras.Model, "export", lambda *arguments, **options: None)
    monkeypatch.setattr(convert, "_run", lambda format, target, images: None)
    convert.main(str(saved), "tflite", "model.tflite", "", "mine")  # it has Keras's own layers alone
    (home / "broken.keras").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        convert.main("broken.keras", "tflite", "model.tflite", "", "mine")
    reason = "mine cannot be imported (RuntimeError: no licence), and the model cannot be loaded without it"
    assert (ended.value.code, capsys.readouterr().err.strip()) == (convert.NOT_LOADED, reason)
    done = subprocess.CompletedProcess([], convert.NOT_LOADED, "", f"warning\n{reason}\n")
    monkeypatch.setattr(exports.subprocess, "run", lambda *arguments, **options: done)
    own = trivial.model_copy(update={"model": "mine:build"})
    with pytest.raises(StudyError, match=r"^mine cannot be imported .* without it: correct the module, or copy it"):
        exports._convert(saved, "tflite", home / "model.tflite", own, [8, 8, 1])


@pytest.mark.long
def test_a_format_whose_package_is_missing_says_which(
    finished: RDBStorage, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Like a package that is not installed: a module of that name, first on the path, that cannot be imported.
    (home / "onnx.py").write_text("raise ModuleNotFoundError(\"No module named 'onnx'\")", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home), os.environ.get("PYTHONPATH", str(Path.cwd()))]))
    with pytest.raises(StudyError, match=r"format onnx needs a package .*'onnx'\): `pip install onnx tf2onnx`"):
        studies.export("trivial", home / "best", "onnx", finished)
    assert not (home / "best").exists()
    # Keras on JAX writes it with another package, which is not installed here.
    (home / "jax2onnx.py").write_text("raise ModuleNotFoundError(\"No module named 'jax2onnx'\")", encoding="utf-8")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(StudyError, match=r"format onnx needs a package .*: `pip install jax2onnx`"):
        studies.export("trivial", home / "best", "onnx", finished)
    with pytest.raises(StudyError, match=r"format = 'tflit' must be one of .*did you mean 'tflite'"):
        exports.format_of("tflit")


# --- definition.toml --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", definitions.catalog())
def test_a_ready_definition_reads_back_the_same(name: str) -> None:
    ready = definitions.catalog()[name]
    again = parse(to_toml(ready))
    assert again == ready
    assert json.dumps(again.to_json()) == json.dumps(ready.to_json())  # as text: to Python, true is 1


_SCALARS = (
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)


@given(
    description=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    choices=st.lists(_SCALARS, min_size=1, max_size=5, unique_by=lambda value: value),
    fixed=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True), _SCALARS, max_size=4),
    ends=st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)).filter(lambda ends: ends[0] < ends[1]),
    whole=st.tuples(st.integers(-1000, 0), st.integers(1, 1000)),
)
def test_any_definition_reads_back_the_same(
    description: str, choices: list[Any], fixed: dict[str, Any], ends: tuple[float, float], whole: tuple[int, int]
) -> None:
    made = definitions.from_json(
        {
            "name": "n",
            "description": description,
            "dataset": "digits",
            "model": "mine:build",
            "budget": {"trials": 3},
            "space": {
                "choice": {"choices": choices},
                "real": {"type": "float", "low": ends[0], "high": ends[1], "when": {"choice": choices[:1]}},
                "whole": {"type": "int", "low": whole[0], "high": whole[1]},
            },
            "fixed": {f"fixed_{key}"[:64]: value for key, value in fixed.items()},
            "points": [{"choice": value} for value in choices[1:]],
        }
    )
    again = parse(to_toml(made))
    assert json.dumps(again.to_json()) == json.dumps(made.to_json())
