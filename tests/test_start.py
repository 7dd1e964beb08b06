"""The way from images or a script to a definition: `trialyard init` and `trialyard catalog`."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import write_digits

import search
from search import checks, data, image_folder
from studies import definition as definitions
from studies import draft, model_rules
from studies.errors import DefinitionError

SCRIPT = """
import keras

def build(input_shape, units=64, dropout=0.3, lr=1e-3, num_classes=10, act="relu", norm=False, seed=0, pool=(2, 2)):
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(units, activation=act),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(num_classes, activation="softmax", dtype="float32"),
        ]
    )

if __name__ == "__main__":
    build((8, 8, 1)).fit()
"""


def _trains(source: Path) -> tuple[str, ...]:
    """Tries the model of a definition as `trialyard check` does."""
    definition = definitions.load(str(source))
    dataset = data.load(definition.dataset, definition.data, [Path()])
    return checks.check_with_keras(definition, dataset, "float32")


@pytest.mark.parametrize("model", [None, *draft.MODELS])
def test_every_draft_is_a_definition_that_check_accepts(home: Path, model: str | None) -> None:
    file, *_ = search.init("digits", model=model)
    assert file == Path("digits.toml")
    definition = definitions.load(str(file))
    assert (definition.name, definition.trials, definition.budget.epochs) == ("digits", 20, 10)
    assert definition.model == {None: "convnet", "own": "digits_model:build"}.get(model, model)
    rules = model_rules.rules(definition.model)
    assert rules is None or definition.space.keys() <= rules.keys()


def test_a_folder_of_images_gets_a_size_and_test_images(home: Path) -> None:
    write_digits(home / "my photos", 20)
    file, *_ = search.init("my photos", trials=3, epochs=2)
    definition = definitions.load(str(file))
    assert (definition.name, definition.model, definition.trials) == ("my-photos", "resnet", 3)
    assert definition.dataset == f"{home}/my photos/"
    assert (definition.data.size, definition.data.test) == ((64, 64), 0.2)
    write_digits(home / "split" / "train", 20)
    write_digits(home / "split" / "test", 10)
    assert definitions.load(str(search.init("split/")[0])).data.test is None


def test_images_may_be_below_the_user_s_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home / "me"))
    write_digits(home / "me" / "photos", 20)
    for number, images in enumerate(("~/photos", "~/photos/", Path("~/photos"), Path("me/photos"))):
        file, *_ = search.init(images, f"{number}.toml")
        assert definitions.load(str(file)).dataset == f"{home}/me/photos/"
    by_hand = file.read_text(encoding="utf-8").replace('"me/photos/"', '"~/photos/"')
    assert '"~/photos/"' in by_hand
    assert definitions.parse(by_hand, folder=home).dataset == f"{home}/me/photos/"


@pytest.mark.parametrize(("count", "size"), [(4, 1), (120, 16), (800, 128)])
@pytest.mark.parametrize("model", ["resnet", "own"])
def test_the_batches_of_a_draft_fit_a_small_folder(home: Path, count: int, size: int, model: str) -> None:
    write_digits(home / "photos", count)
    definition = definitions.load(str(search.init("photos", model=model)[0]))
    assert definition.fixed["batch_size"] == size
    listed = image_folder.listing(home / "photos", definition.data)
    assert size <= 0.8 * len(listed.train), "the validation images are a tenth"


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
def test_a_folder_of_idx_files_gets_no_keys_of_image_files(home: Path, name: str) -> None:
    (home / "letters").mkdir()
    (home / "letters" / name).touch()
    file, *_ = search.init("letters/")
    definition = definitions.load(str(file))
    assert (definition.data.size, definition.data.test) == (None, None)


def test_any_name_of_a_folder_makes_a_valid_definition(home: Path) -> None:
    (home / "📷").mkdir()
    file, *_ = search.init("📷/", "mine.toml")
    assert definitions.load(str(file)).dataset == f"{home}/📷/"


def test_a_model_that_could_not_be_imported_is_refused(home: Path) -> None:
    (home / "sub").mkdir()
    (home / "train.py").write_text(SCRIPT)
    (home / "sub" / "other.py").write_text(SCRIPT)
    for arguments in (
        {"file": "sub/x.toml", "model": "own"},
        {"file": "sub/x.toml", "from_script": "train.py"},
        {"file": "x.toml", "from_script": "sub/other.py"},
    ):
        with pytest.raises(DefinitionError, match=r"is not in the current folder, and the model in .*the folder sub "):
            search.init("digits", **arguments)  # type: ignore[arg-type]
    assert [path.name for path in home.rglob("*.toml")] == []
    assert search.init("digits", "sub/x.toml") == [Path("sub/x.toml")]


def test_the_model_file_of_a_draft_can_be_trained(home: Path, write_module: Callable[[str, str], None]) -> None:
    file, module = search.init("digits", "mine.toml", model="own")
    write_module(module.stem, module.read_text(encoding="utf-8"))
    assert _trains(file) == ()


def test_a_script_s_function_becomes_a_model_and_its_defaults_a_space(
    home: Path, write_module: Callable[[str, str], None]
) -> None:
    write_module("train", SCRIPT)
    file, module = search.init("digits", "mine.toml", from_script="train.py")
    write_module(module.stem, module.read_text(encoding="utf-8"))
    definition = definitions.load(str(file))
    assert definition.model == "mine_model:build"
    assert set(definition.space) == {"units", "dropout", "lr", "norm"}
    assert definition.fixed == {"act": "relu"}
    low, high = definition.space["units"], definition.space["lr"]
    assert (low.low, low.high, high.low, high.high, high.log) == (32, 128, 1e-4, 1e-2, True)  # type: ignore[union-attr]
    assert _trains(file) == ()
    assert import_module("train").build is not None


def test_a_function_for_trialyard_is_named_directly(home: Path) -> None:
    text = "def build(h, image_shape, classes):\n    return make(h.get('units', 64), h.get('act', 'relu'))\n"
    (home / "net.py").write_text(text)
    (file,) = search.init("digits", from_script="net.py")
    definition = definitions.load(str(file))
    assert definition.model == "net:build"
    assert set(definition.space) == {"units"}


def test_a_script_is_read_and_not_run(home: Path) -> None:
    (home / "train.py").write_text("raise SystemExit('it ran')\ndef build(units=3):\n    pass\n")
    assert len(search.init("digits", from_script="train.py")) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model = 1", r"^train.py has no function `build`, no function at all: put the lines that make the model into"),
        ("def make(): pass", r"^train.py has no function `build`, only make: put"),
        ("def build(units): pass", r"the parameter units of build in train.py has no default.*such as units=32$"),
        ("def build(*, units): pass", r"the parameter units of build in train.py has no default"),
        (
            "def build(h, image_shape, classes): return make(h['units'], h.get('dropout', 0.1))",
            r"^build in train.py reads the hyperparameter units without a default, .*: write h.get\(\"units\", 64\)$",
        ),
        ("def build(h, shape, classes): pass", r"reads no hyperparameter, .*: write h.get\(\"units\", 64\)$"),
        ("def build(act='relu'): pass", r"has no hyperparameter to search: give it parameters with numbers"),
        (
            "def build(u=1): pass\nm = build()\nm.fit(x)",
            r"^train.py trains when it is imported \(line 3\): put that under",
        ),
        ("def build(shape, classes, /, u=1): pass", r"^the parameter shape of build in train.py can be given by pos"),
        ("def build(:", r"^train.py is not valid Python \("),
    ],
)
def test_a_script_that_cannot_be_used_is_refused(home: Path, text: str, problem: str) -> None:
    (home / "train.py").write_text(text)
    with pytest.raises(DefinitionError, match=problem):
        search.init("digits", from_script="train.py")
    assert [path.name for path in home.iterdir()] == ["train.py"], "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"data": "photo"}, r'dataset = "photo" must be one of .* a folder such as "photos/"'),
        ({"data": "photos/"}, r"^there is no folder photos/: correct --data"),
        ({"data": "digits", "model": "resnett"}, r"model = 'resnett' must be one of .*; did you mean 'resnet'\?"),
        ({"data": "digits", "name": "a b"}, r'name = "a b" must be letters, digits'),
        ({"data": "digits", "from_script": "no.py"}, r"^no.py cannot be read \(No such file"),
        ({"data": "digits", "from_script": "my-net.py"}, r"whose name can be imported, such as train.py: rename it"),
        ({"data": "digits", "model": "own", "from_script": "train.py"}, r"a script exclude each other"),
    ],
)
def test_a_wrong_argument_is_refused(home: Path, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(DefinitionError, match=problem):
        search.init(**arguments)
    assert list(home.iterdir()) == []


def test_no_file_is_overwritten(home: Path) -> None:
    (home / "digits_model.py").write_text("mine")
    with pytest.raises(DefinitionError, match=r"^digits_model.py exists already, and is not overwritten: name another"):
        search.init("digits", model="own")
    assert [path.read_text() for path in home.iterdir()] == ["mine"]


# What a user sees who may not read everything: root may, and nobody may import from here.
AS_NOBODY = """
import os
from studies import draft, errors
if os.getuid() == 0:
    os.setuid(65534)
for data in ("closed", "closed/in", "hidden"):
    try:
        draft.draft(data)
    except errors.DefinitionError as error:
        print(error)
"""


def test_a_folder_that_may_not_be_read_is_one_sentence() -> None:
    with tempfile.TemporaryDirectory() as name:  # not of pytest, whose folders nobody else may enter
        folder = Path(name)
        folder.chmod(0o755)
        for closed, mode in (("closed", 0), ("hidden", 0o111)):
            (folder / closed / "in").mkdir(parents=True)
            (folder / closed).chmod(mode)
        command = [sys.executable, "-c", AS_NOBODY]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        for closed in ("closed", "hidden"):
            (folder / closed).chmod(0o755)
    problem = "cannot be read (Permission denied): check it"
    lines = [f"the folder {data} {problem}" for data in ("closed/", "closed/in", "hidden/")]
    assert (done.stdout.splitlines(), done.stderr) == (lines, "")


def test_a_file_that_cannot_be_written_leaves_no_other_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DefinitionError, match=r"^a name with .*bad.udcff.* is not text in UTF-8: choose another one$"):
        search.init("digits", "bad\udcff.toml")
    opened = Path.open

    def fails(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.suffix == ".py":
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(DefinitionError, match=r"^mine_model.py cannot be written \(No space left on device\): name"):
        search.init("digits", "mine.toml", model="own")
    assert [path.name for path in home.iterdir() if path.is_file()] == []


def test_a_range_has_its_default_in_it() -> None:
    random = np.random.default_rng(0)
    values = [0, 1, -3, 10**6, True, 0.0, 0.5, 0.999, 1.0, 1e-9, -0.5, *random.lognormal(0, 5, 20).tolist()]
    for value in values:
        line = draft._range("x", value)
        text = f'name = "x"\ndataset = "digits"\nmodel = "m:f"\n[budget]\ntrials = 1\n[space]\n{line}\n'
        parameter = definitions.parse(text).space["x"]
        if isinstance(value, bool):
            assert value in parameter.choices  # type: ignore[union-attr]
        else:
            assert parameter.low <= value <= parameter.high, value  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("dropout", 0, 0.0, 0.6),
        ("dropout", 0.7, 0.0, 0.8),
        ("lr_drop", 10.0, 1.0, 100.0),
        ("drop_blocks", 3, 1, 6),
        ("l2", 0, 0.0, 0.01),
        ("weight_decay", 0, 0.0, 0.01),
        ("label_smoothing", 0, 0.0, 0.6),
        ("momentum", 0.99, 0.9, 0.999),
        ("momentum", 0.9, 0.0, 0.99),
        ("decay_steps", 0, 0, 2),
        ("ema", 0.99999999, 0.9999999, 0.99999999),
        ("patience_epochs", 80_000, 40_000, 100_000),
        ("warmup_epochs", 50_000.0, 5_000.0, 100_000.0),
    ],
)
def test_a_range_is_of_the_kind_that_its_name_tells(name: str, value: float, low: float, high: float) -> None:
    text = (
        f'name = "x"\ndataset = "digits"\nmodel = "m:f"\n[budget]\ntrials = 1\n[space]\n{draft._range(name, value)}\n'
    )
    parameter = definitions.parse(text).space[name]
    assert type(parameter.low) is type(low)  # type: ignore[union-attr]
    assert (parameter.low, parameter.high) == pytest.approx((low, high))  # type: ignore[union-attr]


def test_a_ready_definition_can_be_printed_and_used(home: Path) -> None:
    for name in search.catalog():
        (home / "mine.toml").write_text(search.catalog_text(name), encoding="utf-8")
        assert definitions.load("mine.toml") == definitions.load(name)
    with pytest.raises(DefinitionError, match=r'^"digit" is not in the catalog \(.*; did you mean \'digits\'\?'):
        search.catalog_text("digit")


def test_the_commands_write_and_print(trialyard: Callable[..., Any]) -> None:
    code, out, _ = trialyard("init", "--data", "digits", "--trials", "3", "--model", "own")
    assert (code, out) == (
        0,
        "digits.toml and digits_model.py are written: `trialyard check digits.toml` tries it\n",
    )
    assert definitions.load("digits.toml").trials == 3
    code, out, _ = trialyard("init", "my digits.toml", "--data", "digits")
    assert (code, out) == (0, "my digits.toml is written: `trialyard check 'my digits.toml'` tries it\n")
    first_line = Path("my digits.toml").read_text(encoding="utf-8").splitlines()[0]
    assert "`trialyard check 'my digits.toml'`" in first_line
    assert "`trialyard run 'my digits.toml'`" in first_line
    code, _, problem = trialyard("init")
    assert code == 1
    assert problem == "error: the images are missing: name them with --data, such as --data photos/ or --data digits\n"
    assert 'dataset = "digits"' in trialyard("catalog", "digits")[1]


def test_in_a_terminal_init_asks(home: Path) -> None:
    program = "import pty, sys; pty.spawn([sys.executable, '-m', 'search.program', 'init'])"
    done = subprocess.run(
        [sys.executable, "-c", program], input="\nresnet\n", capture_output=True, text=True, timeout=120, check=True
    )
    assert "Your images" in done.stdout
    assert definitions.load("digits.toml").model == "resnet"
