"""Makes the outputs and pictures of `docs/first-hour.md`: from a folder of images to a confirmed model.

    .venv/bin/python docs/make_first_hour.py [--fill]

It writes images of three classes of MNIST into a temporary folder and runs the COMMANDS there, in a pseudo terminal.
What a person sees is written to `docs/first-hour.txt`, and the pictures to `docs/img`. Then, or at once with `--fill`,
it writes the outputs into the page, between the comments that name them. A test compares the two, and another one runs
the same commands on a small folder. It took 4 minutes on two idle cores, and 17 on two that other programs used, too.

It needs MNIST, which is downloaded if no folder of TRIALYARD_DATA has it, the development packages, and a Chromium: see
`docs/make_pictures.py`.
"""

import argparse
import base64
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import make_notebook
import make_pictures
import numpy as np
from make_pictures import Screen

import studies
from search import data
from storage import artifacts, settings
from studies.definition import Data
from studies.pictures import png_uri

FOLDER = Path(__file__).parent
RECORD, PAGE = FOLDER / "first-hour.txt", FOLDER / "first-hour.md"
COMMANDS = (
    "init --data photos/",
    "check photos.toml",
    "run photos.toml",
    "best photos",
    "confirm photos",
    "export photos best-photos",
)
# What is changed in photos.toml after `init`: MNIST's images are small, and so are the models that they need.
EDITS = (("size = [64, 64]", "size = [28, 28]"), ("choices = [0.5, 1.0, 2.0]", "choices = [0.25, 0.5]"))
CLASSES = {3: "three", 5: "five", 8: "eight"}  # digits that look alike
IMAGES = 300  # of each class
SHOWN = 14  # of each class, in the picture

Call = Callable[[Sequence[str]], str]  # runs `trialyard` with these arguments; returns what it printed


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, without the name of the program, and what it printed."""

    command: str
    output: str


def follow(folder: Path, call: Call, edits: Sequence[tuple[str, str]] = EDITS) -> list[Step]:
    """Runs the COMMANDS in `folder`, which has the images in photos/; `edits` change photos.toml after `init`."""
    steps = []
    for command in COMMANDS:
        steps.append(Step(command=command, output=call(shlex.split(command))))
        if command is COMMANDS[0]:
            _edit(folder / "photos.toml", edits)
    return steps


def _edit(file: Path, edits: Sequence[tuple[str, str]]) -> None:
    text = file.read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise SystemExit(f"{file} has {old!r} {text.count(old)} times, and must have it once")
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


# --- the record and the page --------------------------------------------------------------------------------


def write_record(steps: Sequence[Step]) -> None:
    """Writes RECORD."""
    blocks = [f"$ trialyard {step.command}\n{step.output}\n" for step in steps]
    RECORD.write_text("\n".join(blocks), encoding="utf-8")


def read_record() -> list[Step]:
    """The steps in RECORD."""
    blocks = RECORD.read_text(encoding="utf-8").split("$ trialyard ")[1:]
    parts = [block.partition("\n") for block in blocks]
    return [Step(command=command, output=output.rstrip()) for command, _, output in parts]


def filled(page: str) -> str:
    """The text of `page` with the outputs of RECORD."""
    for step in read_record():
        start, end = f"<!-- output: {step.command.split()[0]} -->\n", "<!-- end -->"
        if page.count(start) != 1:
            raise SystemExit(f"{PAGE} has {page.count(start)} places for the output of {step.command!r}")
        before, _, rest = page.partition(start)
        block = f"```text\n$ trialyard {step.command}\n{step.output}\n```\n"
        page = before + start + block + end + rest.partition(end)[2]
    return page


# --- the real run -------------------------------------------------------------------------------------------


def write_photos(folder: Path) -> Path:
    """Writes the first IMAGES of each of the CLASSES as PNG files; returns a picture of some of them."""
    mnist = data.load("mnist", Data(validation=0.5), settings.load().data_folders)
    images = np.asarray(mnist.x_train[:])
    rows = []
    for digit, name in CLASSES.items():
        chosen = images[mnist.y_train == digit][:IMAGES]
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(chosen, start=1):
            (folder / name / f"{number:03}.png").write_bytes(_png(image))
        rows.append(np.concatenate(list(chosen[:SHOWN]), axis=1))
    picture = folder.with_name("photos.png")
    picture.write_bytes(_png(np.concatenate(rows)))
    return picture


def _png(image: "np.ndarray") -> bytes:
    return base64.b64decode(png_uri(image).partition(",")[2])


def record(folder: Path) -> list[Step]:
    """Runs the commands in `folder` in a terminal, and makes the pictures."""
    shutil.copyfile(write_photos(folder / "photos"), FOLDER / "img" / "first-hour-photos.png")

    def call(arguments: Sequence[str]) -> str:
        screen = Screen()
        for chunk in make_pictures.printed(arguments, folder):
            screen.feed(chunk)
        lines = screen.text().replace(str(folder), "...").splitlines()
        return "\n".join(line.rstrip() for line in lines).strip("\n")

    steps = follow(folder, call)
    url = f"sqlite:///{folder}/yard/studies.db"
    model = folder / "yard" / "artifacts" / studies.best_trial("photos", url).user_attrs["model"]
    for name in (artifacts.CURVES_PICTURE, artifacts.CONFUSION_PICTURE, artifacts.MISTAKES_PICTURE):
        shutil.copyfile(model.with_name(name), FOLDER / "img" / f"first-hour-{name}")
    figure = studies.figure("photos", "confirmed", storage=url, artifacts=folder / "yard" / "artifacts")
    with make_pictures.open_browser() as browser:
        make_notebook.save(browser.new_page(), figure, FOLDER / "img" / "first-hour-confirmed.svg")
    return steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the commands unless --fill is given, and writes the page's outputs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fill", action="store_true", help="run nothing: only write the page from the record")
    if not parser.parse_args(arguments).fill:
        with tempfile.TemporaryDirectory() as folder:
            write_record(record(Path(folder)))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
