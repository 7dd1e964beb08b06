"""The page about own images is true: its commands lead from a folder to a confirmed and exported model."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_files import write_digits

import search
from studies import draft
from studies.definition import load

PAGE = (Path(__file__).parents[1] / "docs" / "own-images.md").read_text(encoding="utf-8")
CLASSES = ("cats", "dogs")


def _block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]


def test_the_definition_of_the_page_is_the_one_that_init_writes(home: Path) -> None:
    write_digits(home / "photos", 20, CLASSES)
    (file,) = search.init("photos/")
    assert file.read_text(encoding="utf-8") == _block("toml")


def test_the_script_of_the_page_can_be_searched(home: Path) -> None:
    write_digits(home / "photos", 20, CLASSES)
    (home / "train.py").write_text(_block("python"), encoding="utf-8")
    texts = draft.draft("photos/", Path("mine.toml"), from_script=Path("train.py"))
    assert "units = { low = 32, high = 128 }" in texts[Path("mine.toml")]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_six_commands_lead_from_a_folder_to_a_confirmed_model(home: Path, start: Callable[..., Any]) -> None:
    write_digits(home / "photos", 120, CLASSES)
    (home / "photos" / "cats" / "bad.jpg").write_bytes(b"no image")
    printed = {}
    for line in _block("sh").splitlines():
        words = shlex.split(line, comments=True)[1:]
        more = {"confirm": ["--top", "1", "--seeds", "2"]}.get(words[0], [])
        process = start(*words, *more)
        out, err = process.communicate(timeout=300)
        if words[0] == "check":  # a file is bad, and `check` says so
            assert process.returncode == 1
            assert re.search(r"1 of the 121 image files of .*/photos/ cannot be read \(cats/bad.jpg\)", err)
            (home / "photos" / "cats" / "bad.jpg").unlink()
            process = start(*words)
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed[words[0]] = out
        if words[0] == "init":
            _make_small(home / "photos.toml")
    assert "classes: cats, dogs" in printed["check"]
    assert "in 2 classes" in printed["check"]
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


def _make_small(file: Path) -> None:
    """Trials of a few seconds."""
    text = file.read_text(encoding="utf-8")
    for old, new in (
        ("size = [64, 64]", "size = [8, 8]"),
        ("trials = 20", "trials = 2"),
        ("epochs = 10", "epochs = 1"),
        ("high = 3 }", "high = 2 }"),
        ("width = ", "# width = "),
        ("[fixed]", "[fixed]\nwidth = 0.25\nbatch_size = 16"),
        ('kind = "hyperband"', 'kind = "none"'),
    ):
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    assert load(str(file)).trials == 2
