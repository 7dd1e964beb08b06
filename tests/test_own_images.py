"""The page about own images is true: its commands lead from a folder to a confirmed and exported model."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ended
from image_files import write_digits

import search
from search import data, image_folder
from studies import draft
from studies.definition import Data

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "own-images.md").read_text(encoding="utf-8")
CLASSES = ("cats", "dogs")


def _block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]


def test_the_definition_of_the_page_is_the_one_that_init_writes(home: Path) -> None:
    write_digits(home / "photos", 200, CLASSES)
    (file,) = search.init("photos/")
    assert file.read_text(encoding="utf-8") == _block("toml")


def test_the_script_of_the_page_can_be_searched(home: Path) -> None:
    write_digits(home / "photos", 20, CLASSES)
    (home / "train.py").write_text(_block("python"), encoding="utf-8")
    texts = draft.draft("photos/", Path("mine.toml"), from_script=Path("train.py"))
    assert "units = { low = 32, high = 128 }" in texts[Path("mine.toml")]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_six_commands_lead_from_a_folder_to_a_confirmed_model(
    home: Path, start: Callable[..., Any], first_hour: ModuleType
) -> None:
    """Those of this page and of `docs/first-hour.md`, run by the script that makes the latter."""
    commands = [line.partition("#")[0].split() for line in _block("sh").splitlines()]
    assert commands == [["trialyard", *command.split()] for command in first_hour.COMMANDS]
    write_digits(home / "photos", 120, CLASSES)
    (home / "photos" / "cats" / "bad.jpg").write_bytes(b"no image")

    def call(arguments: Sequence[str]) -> str:
        if arguments[0] == "check":  # a file is bad, and `check` says so
            _, err = ended(start(*arguments), code=1)
            assert re.search(r"1 of the 121 image files of .*/photos/ cannot be read \(cats/bad.jpg\)", err)
            (home / "photos" / "cats" / "bad.jpg").unlink()
        more = ["--top", "1", "--seeds", "2"] if arguments[0] == "confirm" else []
        return ended(start(*arguments, *more))[0]

    steps = first_hour.follow(home, call, SMALLER)
    assert [step.command for step in steps] == list(first_hour.COMMANDS)
    checked, searched = steps[1].output, steps[2].output
    assert "classes: cats, dogs" in checked
    assert "in 2 classes" in checked
    assert "best of photos: trial" in searched
    exported = home / "best-photos"
    record = json.loads((exported / "trial.json").read_text(encoding="utf-8"))
    assert record["data"]["class_names"] == ["cats", "dogs"]
    program = re.findall(r"^```python\n(.*?)^```", (exported / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    image = next((home / "photos" / "dogs").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", program.replace("yours.jpg", str(image))],
        cwd=exported,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines()[-1] in ("['cats']", "['dogs']")


# Trials of a few seconds.
SMALLER = (
    ("size = [64, 64]", "size = [8, 8]"),
    ("trials = 20", "trials = 2"),
    ("epochs = 10", "epochs = 1"),
    ("high = 3 }", "high = 2 }"),
    ("width = ", "# width = "),
    ("[fixed]", "[fixed]\nwidth = 0.25"),
    ('kind = "hyperband"', 'kind = "none"'),
)


@pytest.fixture
def first_hour(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program that makes `docs/first-hour.md`."""
    monkeypatch.syspath_prepend(DOCS)
    for name in ("make_first_hour", "make_notebook", "make_pictures"):  # no test after this one shall find them
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("make_first_hour")


def test_the_first_hour_s_page_is_that_of_its_record(first_hour: ModuleType) -> None:
    page = (DOCS / "first-hour.md").read_text(encoding="utf-8")
    assert [step.command for step in first_hour.read_record()] == list(first_hour.COMMANDS)
    assert first_hour.filled(page) == page
    for old, new in first_hour.EDITS:
        assert old in _block("toml"), "`init` writes it"
        assert new in page


def test_the_first_hour_s_images_are_real_digits_of_three_classes(
    first_hour: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = data.load("digits", Data(validation=0.1), [])
    monkeypatch.setattr(first_hour.data, "load", lambda *_: digits)
    monkeypatch.setattr(first_hour, "IMAGES", 20)
    picture = first_hour.write_photos(home / "photos")
    assert picture.read_bytes().startswith(b"\x89PNG")
    listed = image_folder.listing(home / "photos", Data())
    assert (listed.classes, len(listed.train)) == (("eight", "five", "three"), 60)
