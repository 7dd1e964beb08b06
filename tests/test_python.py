"""``import trialyard as ty``: from a function and arrays in hand to a search."""

import doctest
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import Command, ended
from locked_folder import locked

import search
import studies
import trialyard as ty
from search import data, service, trainer
from search.devices import Slot, cpu
from search.errors import DataError, ModelError
from storage import database
from studies import registry
from studies.definition import Data, Definition
from studies.errors import DefinitionError, StudyError
from trialyard import arrays, functions, hyperparameters
from trialyard.fingerprint import fingerprint
from trialyard.functions import StoredFunction

# --- the package ------------------------------------------------------------------------------------------


def test_the_package_has_all_functions_of_search_and_studies() -> None:
    assert set(ty.__all__) == {"Result", "TrialyardError", "log", "search", *search.__all__, *studies.__all__}
    assert len(ty.__all__) == len(set(ty.__all__)), "two functions have one name"
    for name in ty.__all__:
        assert callable(getattr(ty, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'serch'"):
        _ = ty.serch


@pytest.fixture
def full_folder(home: Path) -> Path:
    """A folder in which a user has modules of the names of our packages."""
    for name in ("search", "studies"):
        (home / f"{name}.py").write_text("MINE = True\n", encoding="utf-8")
    (home / "storage").mkdir()
    (home / "storage" / "__init__.py").write_text("MINE = True\n", encoding="utf-8")
    return home


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_user_s_modules_do_not_replace_our_packages(full_folder: Path) -> None:
    script = full_folder / "script.py"
    text = "import trialyard as ty, search\nprint(ty.names.__module__, ty.run.__module__, hasattr(search, 'MINE'))\n"
    script.write_text(text, encoding="utf-8")
    assert _run(full_folder, "script.py").stdout == "studies.registry search.service False\n"
    done = _run(full_folder, "-m", "trialyard", "status")
    assert done.returncode == 1
    assert "error: there is no database at" in done.stderr


def test_a_module_that_has_the_name_of_our_package_already_is_named(full_folder: Path) -> None:
    done = _run(full_folder, "-c", "import search, trialyard")
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: Trialyard needs its own package 'search', and this program has imported {full_folder}/search.py "
        "under that name: rename it, or import trialyard first"
    )


# --- the space --------------------------------------------------------------------------------------------


def test_each_form_of_a_hyperparameter_is_one_of_a_definition() -> None:
    done = doctest.testmod(hyperparameters)
    assert (done.attempted, done.failed) == (4, 0)
    conditional = {"low": 0.0, "high": np.float32(0.5), "when": {"depth": 3}}
    assert hyperparameters.tables({"rate": conditional})["rate"] == conditional


@pytest.mark.parametrize("form", ["adam", 3, {1, 2}, (1,), (1, 2, 3, 4), None])
def test_another_form_is_one_sentence(form: object) -> None:
    with pytest.raises(DefinitionError, match=r"^space\['depth'\] = .* must be a list of choices, a pair"):
        hyperparameters.tables({"depth": form})


# --- functions --------------------------------------------------------------------------------------------

CELL = """
from functools import cache
import keras
from keras import layers

UNITS = 8
RATES = {"low": 0.1}

class Twice(layers.Layer):
    @property
    def factor(self):
        return 2

    def call(self, x):
        return self.factor * x

def block(h):
    return layers.Dense(UNITS, activation="relu")

def build(hyperparameters, image_shape, classes, *, rate=0.25):
    body = [block(hyperparameters), Twice(), layers.Dropout(RATES["low"]), layers.Dropout(rate)]
    return keras.Sequential([keras.Input(image_shape), layers.Flatten(), *body, layers.Dense(classes, "softmax")])
"""


def _build(text: str = CELL, file: str = "<cell 1>") -> Callable[..., Any]:
    """The function `build` as a notebook defines it."""
    session: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, file, "exec"), session)
    return session["build"]  # type: ignore[no-any-return]


def test_a_function_has_the_same_fingerprint_wherever_it_is_defined_again() -> None:
    again = CELL.replace("UNITS = 8", "UNUSED = 7  # a comment\n\n\nUNITS = 8")
    assert fingerprint(_build()) == fingerprint(_build(again, "<cell 2>"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("rate=0.25", "rate=0.5"),
        ('"softmax"', '"sigmoid"'),
        ("UNITS = 8", "UNITS = 9"),
        ("UNITS = 8", "UNITS = 8.0"),
        ('"low": 0.1', '"low": 0.2'),
        ('activation="relu"', 'activation="elu"'),
        ("return 2", "return 3"),
        ("* x", "+ x"),
    ],
)
def test_whatever_a_function_uses_is_in_its_fingerprint(before: str, after: str) -> None:
    assert before in CELL
    assert fingerprint(_build()) != fingerprint(_build(CELL.replace(before, after)))


def test_functions_that_call_each_other_have_a_fingerprint() -> None:
    text = "def build(h, s, c): return other(h, s, c)\ndef other(h, s, c): return build(h, s, {})"
    assert fingerprint(_build(text.format("c"))) != fingerprint(_build(text.format("c + 1")))


def test_a_dataclass_with_a_class_of_the_session_has_the_same_fingerprint_again() -> None:
    text = """
from dataclasses import dataclass, field
@dataclass
class Block:
    units: int = 3
@dataclass
class Settings:
    block: Block = field(default_factory=Block)
def build(h, s, c): return Settings().block.units
"""
    assert fingerprint(_build(text)) == fingerprint(_build(text))
    assert fingerprint(_build(text)) != fingerprint(_build(text.replace("= 3", "= 4")))


def test_an_object_that_refers_to_itself_and_an_empty_cell_have_a_fingerprint() -> None:
    text = """
class Settings: pass
settings = Settings()
settings.owner, settings.units = settings, 3
def outer():
    def build(h, s, c): return settings.units, late
    return build
    late = 1
build = outer()
"""
    assert fingerprint(_build(text)) == fingerprint(_build(text))
    assert fingerprint(_build(text)) != fingerprint(_build(text.replace("= settings, 3", "= settings, 4")))


def test_an_object_of_keras_has_the_fingerprint_of_its_configuration_and_weights() -> None:
    text = """
import keras
from keras import layers
begin = keras.initializers.HeNormal()
augment = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)])
head = layers.Dense(2, kernel_initializer="zeros")
head.build((None, 3))
def build(h, s, c): return augment, head, begin
"""
    first = fingerprint(_build(text))
    keras.Sequential([keras.layers.Dense(1)])  # the names of later layers count it
    assert fingerprint(_build(text)) == first
    assert fingerprint(_build(text.replace("0.1", "0.2"))) != first
    assert fingerprint(_build(text.replace('"zeros"', '"ones"'))) != first
    assert fingerprint(_build(text.replace('"zeros"', '"zeros", dtype="float64"'))) != first


@pytest.mark.parametrize(
    ("before", "after"), [("2 * x", "3 * x"), ("x + 1", "x + 2"), ("x - 5", "x - 6"), ("Dense(4)", "Dense(5)")]
)
def test_what_an_object_of_keras_uses_of_its_session_is_in_its_fingerprint(before: str, after: str) -> None:
    text = """
import keras
from keras import layers
class Twice(layers.Layer):
    def call(self, x):
        return 2 * x
def more(x):
    return x + 1
def less(x):
    return x - 5
image = keras.Input((8,))
head = keras.Model(image, layers.Activation(less)(Twice()(layers.Dense(4)(image))))
head.layers[1].set_weights([each - each for each in head.layers[1].get_weights()])
last = keras.Sequential([layers.Dense(3, activation=more)])
def build(h, s, c): return head, last
"""
    first = fingerprint(_build(text))
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])  # the names of later layers count it
    assert fingerprint(_build(text, "<cell 9>")) == first
    assert fingerprint(_build(text.replace(before, after))) != first


def test_an_object_with_slots_has_a_fingerprint_of_their_values() -> None:
    text = """
from dataclasses import dataclass
@dataclass(slots=True)
class Settings:
    units: int
settings = Settings(3)
def build(h, s, c): return settings.units
"""
    assert fingerprint(_build(text)) == fingerprint(_build(text))
    assert fingerprint(_build(text)) != fingerprint(_build(text.replace("Settings(3)", "Settings(4)")))


def test_the_file_of_a_module_of_one_s_own_is_in_the_fingerprint(
    home: Path, write_module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module("own_blocks", "def conv(x): return x")
    monkeypatch.syspath_prepend(str(home))
    text = "from own_blocks import conv\nimport own_blocks\ndef build(h, s, c): return conv(c), own_blocks"
    first = fingerprint(_build(text))
    assert fingerprint(_build(text)) == first
    (home / "own_blocks.py").write_text("def conv(x): return 2 * x", encoding="utf-8")
    assert fingerprint(_build(text)) != first


def test_a_registered_class_that_a_text_names_is_in_the_fingerprint() -> None:
    text = "def build(h, s, c): return 'mine>swish' if h else 'other'"
    before, after = (_build(f"def build(x): return x * {factor}") for factor in (1, 2))
    assert fingerprint(_build(text), {"mine>swish": before}) != fingerprint(_build(text), {"mine>swish": after})
    assert fingerprint(_build(text), {"mine>relu": before}) == fingerprint(_build(text), {"mine>relu": after})


def test_a_stored_function_is_imported_like_any_other(home: Path) -> None:
    stored = functions.of(_build())
    assert isinstance(stored, StoredFunction)
    assert len(stored.write()) == 2
    assert stored.write() == [], "it is there already"
    build = data.import_function(stored.name)
    layers = build({}, (8, 8, 1), 10).layers
    assert [type(layer).__name__ for layer in layers] == ["Flatten", "Dense", "Twice", "Dropout", "Dropout", "Dense"]
    assert layers[1].units == 8


def test_a_function_of_a_module_is_named_by_it(home: Path, write_module: Callable[[str, str], None]) -> None:
    write_module("own_models", CELL + "\nclass Group:\n    def build(h, s, c): pass\n")
    sys.path.append(str(home))
    module = importlib.import_module("own_models")
    assert functions.of(module.build) == "own_models:build"
    assert isinstance(functions.of(module.Group.build), StoredFunction), "a definition cannot name it"
    assert isinstance(functions.of(lambda h, s, c: module.build(h, s, c)), StoredFunction)


def test_trainers_find_the_modules_beside_a_script_of_another_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "scripts").mkdir()
    (home / "scripts" / "own_models.py").write_text("def build(h, s, c): pass\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(home / "scripts"), *sys.path])  # as Python does for scripts/sweep.py
    program = "from search.data import import_function; print(import_function('own_models:build').__name__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=home,
        env=trainer.environment(Slot(device=cpu()), home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("build\n", "")


def test_registered_classes_are_registered_again_in_a_new_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CELL.replace("class Twice", '@keras.saving.register_keras_serializable("mine")\nclass Twice')
    stored = functions.of(_build(text))
    assert isinstance(stored, StoredFunction)
    stored.write()
    original = keras.saving.get_custom_objects()["mine>Twice"]
    functions.load(str(functions.folder() / f"{stored.module}.py"))
    assert keras.saving.get_custom_objects()["mine>Twice"] is original, "this session knows its own class"
    del keras.saving.get_custom_objects()["mine>Twice"]
    functions.load(str(functions.folder() / f"{stored.module}.py"))
    assert keras.saving.get_custom_objects().pop("mine>Twice").__name__ == "Twice"
    monkeypatch.setattr(functions, "PYTHON", "3.99")
    with pytest.raises(ImportError, match=r"stored by Python 3\.\d+, and this is 3\.99: use the same version"):
        functions.load(str(functions.folder() / f"{stored.module}.py"))


def test_a_function_that_is_not_on_this_machine_says_what_to_copy(home: Path) -> None:
    from search.errors import MachineError

    with pytest.raises(MachineError, match="it is a stored function, so copy the folder `functions` of the artifacts"):
        data.import_function("trialyard.functions.build_0:build_0")


def test_a_function_that_cannot_be_stored_is_one_sentence(home: Path) -> None:
    with (
        (home / "log").open("w") as file,
        pytest.raises(ModelError, match="uses an object that exists in this session"),
    ):
        functions.of(lambda h, s, c: file.write("x"))
    images = np.zeros(functions.LARGEST + 1, np.uint8)
    with pytest.raises(ModelError, match="uses 50 MB of objects of this session"):
        functions.of(lambda h, s, c: images)
    with pytest.raises(ModelError, match=r"must take three arguments.*write def build\(hyperparameters, image_shape"):
        functions.of(_build("def build(h): pass"))
    with pytest.raises(ModelError, match="must be a function, the name of a built-in model"):
        functions.of(keras.Sequential([keras.Input((2,))]).layers)  # type: ignore[arg-type]


# --- arrays -----------------------------------------------------------------------------------------------


def _digits(count: int = 300) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.rint(images[:count] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), labels[:count]


def test_arrays_in_hand_are_stored_once_and_load_as_a_data_file(home: Path) -> None:
    x, y = _digits()
    stored = arrays.of(((x, y), (x[:50], y[:50])))
    assert isinstance(stored, arrays.StoredArrays)
    assert stored.write() == [stored.path]
    assert stored.path.parent == home / "yard" / "data"
    assert arrays.of([(x, list(y)), (x[:50], y[:50])]).write() == []  # type: ignore[union-attr]
    assert arrays.of((x, y)).path != stored.path  # type: ignore[union-attr]
    loaded = data.load(str(stored.path), Data(), [], test=True)
    assert loaded.x_test is not None
    assert (len(loaded.x_train), len(loaded.x_test)) == (270, 50)
    assert arrays.of("digits") == "digits"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (3, "the data must be a pair .* and are a int"),
        ((1, 2, 3), "the data must be a pair .* and are a tuple of 3"),
        (([[[1], [2, 3]]] * 3, [0, 1, 2]), "x_train is not an array"),
        ((np.array([None, 1]), [0, 1]), "x_train is an array of Python objects"),
    ],
)
def test_what_is_no_data_is_one_sentence(given: object, sentence: str, home: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        arrays.of(given)


# --- the search -------------------------------------------------------------------------------------------

Calls = list[tuple[Definition, dict[str, Any]]]


@pytest.fixture
def calls(home: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The definitions that `search` runs; nothing is trained, but the study is created."""
    made: Calls = []

    def run(definition: Definition, **options: Any) -> None:
        made.append((definition, options))
        registry.create(definition, database.create(f"sqlite:///{home}/yard/studies.db"), {"fingerprint": "0" * 16})

    monkeypatch.setattr(service, "run", run)
    return made


def test_a_search_is_the_definition_that_its_arguments_say(calls: Calls, home: Path) -> None:
    space = {"rate": (0.0, 0.5, 0.1), "units": [4, 8], "learning_rate": ty.log(1e-3, np.float64(1e-2))}
    more = {"fixed": {"batch_size": np.int64(32)}, "sampler": "random", "budget": {"hours": 1}, "pruner": None}
    result = ty.search(_build(), _digits(), space=space, trials=7, epochs=3, workers=1, **more)
    ((definition, options),) = calls
    assert (result.name, definition.name, definition.trials, definition.budget.epochs) == ("build", "build", 7, 3)
    assert (definition.budget.hours, definition.sampler.kind, definition.pruner.kind) == (1, "random", "none")
    assert definition.fixed == {"batch_size": 32}
    assert definition.space["learning_rate"].distribution().log  # type: ignore[attr-defined]
    assert definition.model.startswith("trialyard.functions.build_")
    assert Path(definition.dataset).is_file()
    assert options["workers"] == 1
    assert ty.search("mnist_cnn", "digits", space={"width": [0.5, 1.0]}, trials=2).name == "mnist_cnn"


def test_a_grid_is_searched_whole_unless_its_trials_are_given(calls: Calls) -> None:
    space = {"units": list(range(30))}
    for number, (sampler, given, wanted) in enumerate(
        [("grid", {}, 30), ({"kind": "grid"}, {}, 30), ("grid", {"trials": 7}, 7), ("random", {}, 20)]
    ):
        ty.search(_build(), _digits(), space=space, sampler=sampler, name=f"study-{number}", **given)
        assert calls[-1][0].trials == wanted


def test_a_search_that_is_stopped_says_so(calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"space": {"units": [4, 8]}, "trials": 2}
    ty.search(_build(), _digits(), **given)
    assert caplog.text == ""
    ty.stop("build")
    ty.search(_build(), _digits(), **given)
    assert (
        "study build is stopped with 0 of 2 trials: ty.resume('build'), and the same call continues it" in caplog.text
    )


def test_another_function_or_other_arrays_are_refused_under_the_same_name(calls: Calls) -> None:
    given: dict[str, Any] = {"space": {"units": [4, 8]}, "trials": 2}
    ty.search(_build(), _digits(), **given)
    ty.search(_build(file="<cell 7>"), _digits(), **given)
    with pytest.raises(StudyError, match=r"study 'build' began with another function .* give the search another name"):
        ty.search(_build(CELL.replace("UNITS = 8", "UNITS = 9")), _digits(), **given)
    with pytest.raises(StudyError, match=r"study 'build' began with other data .* give the search another name"):
        ty.search(_build(), _digits(200), **given)
    assert len(calls) == 2


def test_bad_input_is_one_sentence_and_leaves_no_file(calls: Calls, home: Path) -> None:
    given: dict[str, Any] = {"space": {"units": [4, 8]}}
    with pytest.raises(DefinitionError, match=r"^the search: unknown key 'sampels'"):
        ty.search(_build(), _digits(), sampels=3, **given)
    with pytest.raises(DefinitionError, match=r"^the search: budget.trials = 0 must be"):
        ty.search(_build(), _digits(), trials=0, **given)
    with pytest.raises(DefinitionError, match=r"has a value that a definition cannot have \(.*\): use numbers"):
        ty.search(_build(), _digits(), fixed={"rate": object()}, **given)
    assert calls == []
    assert list(home.rglob("*.*")) == []


def test_files_stay_only_if_a_study_needs_them(home: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    succeeds = service.run

    def fails(definition: Definition, **options: Any) -> None:
        assert Path(definition.dataset).is_file()
        raise ModelError("it cannot be built")

    given: dict[str, Any] = {"space": {"units": [4, 8]}, "trials": 2}
    monkeypatch.setattr(service, "run", fails)
    with pytest.raises(ModelError):
        ty.search(_build(), _digits(), **given)
    assert [path for path in home.rglob("*") if path.is_file()] == []
    monkeypatch.setattr(service, "run", succeeds)
    ty.search(_build(), _digits(), **given)
    monkeypatch.setattr(service, "run", fails)
    with pytest.raises(ModelError):
        ty.search(_build(), _digits(), **given)
    assert len(list(functions.folder().iterdir())) == 2


def test_a_path_is_what_a_definition_calls_a_dataset(calls: Calls, home: Path, write_npz: Callable[..., Path]) -> None:
    (home / "photos").mkdir()
    write_npz()
    for number, (given, dataset) in enumerate((("photos", f"{home}/photos/"), ("small.npz", f"{home}/small.npz"))):
        ty.search("mnist_cnn", Path(given), space={"width": [0.5, 1.0]}, trials=2, name=f"search-{number}")
        assert calls[-1][0].dataset == dataset


@pytest.mark.parametrize("images", ["closed/photos/", Path("closed/photos")])
def test_a_folder_that_may_not_be_entered_is_one_sentence(home: Path, images: str | Path) -> None:
    (home / "closed" / "photos").mkdir(parents=True)
    with (
        locked(home / "closed"),
        pytest.raises(DataError, match=r"^closed/photos/ cannot be looked for \(Permission denied\): correct dataset"),
    ):
        ty.search("mnist_cnn", images, space={"width": [0.5, 1.0]})
    assert not (home / "yard" / "studies.db").exists()


# --- the result -------------------------------------------------------------------------------------------


def test_a_result_is_drawn_with_its_leaderboard_and_its_cautions(finished_study: str) -> None:
    result = ty.Result(name=finished_study)
    assert str(result).startswith("trivial: 5 of 5 trials, the best is trial 1 with the validation accuracy 0.9")
    page = result._repr_html_()
    assert page.count("<table>") == 1
    assert "What cannot be concluded" in page
    assert "the loss became nan" in page
    rows = result.leaderboard(top=2)
    assert [row.number for row in rows] == [1, 4]
    assert rows._repr_html_().count("<tr>") == 3
    assert ty.leaderboard(finished_study) == studies.leaderboard(finished_study)


def test_a_result_shows_no_password() -> None:
    assert repr(ty.Result(name="mine", storage="postgresql://me:secret@host/db")) == "Result(name='mine')"


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda name: ty.trials(name, state="complet"), r"^state = 'complet' must be one of .*did you mean 'complete'"),  # type: ignore[arg-type]
        (lambda name: ty.trials(name, limit="2"), r"^limit = '2' must be a whole number"),  # type: ignore[arg-type]
        (lambda name: ty.report(name, format="md"), r"^format = 'md' must be one of html, markdown"),  # type: ignore[arg-type]
        (lambda name: ty.figure(name, "confusion", trial="2"), r"^trial = '2' must be a whole number"),  # type: ignore[arg-type]
        (lambda name: ty.trial(name, "2"), r"^trial = '2' must be a whole number"),  # type: ignore[arg-type]
        (lambda name: ty.best_trial(3), r"^the name of a study is a string, not 3"),  # type: ignore[arg-type]
        (lambda name: ty.search("mnist_cnn", "digits", space={}, budget=3), r"^budget must be a dict, .* and is 3"),
    ],
)
def test_what_a_type_checker_would_refuse_is_one_sentence(
    finished_study: str, call: Callable[[str], Any], problem: str
) -> None:
    with pytest.raises(ty.TrialyardError, match=problem):
        call(finished_study)


def test_a_name_in_a_leaderboard_is_not_taken_for_html() -> None:
    from studies.rows import html

    assert "<script>" not in html("<script>alert(1)</script>")


SEARCH = (
    CELL.replace("class Twice", "@keras.saving.register_keras_serializable()\nclass Twice")
    .replace("layers.Dense(UNITS", 'layers.Dense(hyperparameters["units"]')
    .replace("def block(h)", "def block(hyperparameters)")
    + """
import json, sys
import numpy as np
import trialyard as ty

with np.load("small.npz") as file:
    x, y = file["x_train"], file["y_train"]
given = {"space": {"units": [4, 8]}, "fixed": {"batch_size": 20}, "trials": int(sys.argv[1]), "epochs": 1, "workers": 1}
result = ty.search(build, (x, y), **given)
print(json.dumps([result.name, len(result.leaderboard()), *result.best_model().evaluate(x, y, verbose=0)]))
"""
)


@pytest.mark.long
def test_a_function_of_the_main_program_is_searched_and_the_same_call_goes_on(
    home: Path, write_npz: Callable[..., Path], start: Command
) -> None:
    write_npz()
    for trials in (1, 2):
        out, err = ended(start("-c", SEARCH.replace("int(sys.argv[1])", str(trials))))
        name, count, loss, accuracy = json.loads(out)
        assert (name, count) == ("build", trials)
        assert 0 <= accuracy <= 1, loss
        assert "attempt 2" not in err
    assert studies.status("build").complete == 2
    assert len(os.listdir(home / "yard" / "artifacts" / "functions")) in (2, 3), "with Python's __pycache__"
