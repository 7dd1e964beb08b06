"""Makes the pictures of the README and of these pages, from a real run.

    .venv/bin/python docs/make_pictures.py

It runs `trialyard run digits --devices cpu` in a temporary folder, in a pseudo terminal, and keeps what a person sees
there: once in the middle of the search and once at its end. Then it opens that study in the real dashboard and in the
real report with headless Chromium: the list of studies, the study, its best trial and the report, each with the light
and the dark theme and on a phone. The terminal's files are written to `docs/pictures`, those of pages to `docs/img`. On
two cores it takes about six minutes; `--trials 3 --epochs 2` makes pictures of a smaller search.

It needs the development packages (`make .venv/installed-dev`) and a Chromium: Debian's package `chromium`, or the one
that `playwright install chromium` downloads. The README quotes `docs/pictures/result.txt`: copy it there afterwards.
"""

import argparse
import codecs
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright
from rich.ansi import AnsiDecoder
from rich.console import Console

import studies

ROOT = Path(__file__).parents[1]
COLUMNS = 100  # of the terminal
SECONDS = 1000.0  # Playwright counts in milliseconds
PATIENCE = 120 * SECONDS  # the dashboard's page is 7 MB of JavaScript
# Enough for the first figures of each page. At these scales text is readable and a file has less than 200 kB.
SCREENS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 1700}, "device_scale_factor": 0.75, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 1700}, "device_scale_factor": 0.75, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 400, "height": 1400}, "device_scale_factor": 1.0, "color_scheme": "light"},
}
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Screen:
    r"""The lines of a terminal, with their colours. It knows the few control sequences that rich's live display sends.

    >>> screen = Screen()
    >>> screen.feed("first\nsecond\r\x1b[2K\x1b[1A\x1b[2Knew\n")
    >>> screen.lines
    ['new', '']
    """

    _SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")

    def __init__(self) -> None:
        self.lines = [""]
        self._row = 0
        self._rest = ""  # the start of a sequence whose end has not come yet

    def feed(self, output: str) -> None:
        """Takes more of what a program has printed."""
        output, self._rest = self._rest + output, ""
        at = 0
        while at < len(output):
            sequence = self._SEQUENCE.match(output, at)
            if sequence is not None:
                self._obey(sequence[1], sequence[2], sequence[0])
                at = sequence.end()
                continue
            if output[at] == "\x1b" and len(output) - at < 20:
                self._rest = output[at:]
                return
            if output[at] == "\n":
                self._row += 1
                if self._row == len(self.lines):
                    self.lines.append("")
            elif output[at] != "\r":
                self.lines[self._row] += output[at]
            at += 1

    def _obey(self, number: str, letter: str, sequence: str) -> None:
        if letter == "m":
            self.lines[self._row] += sequence  # a colour
        elif letter == "A":
            self._row = max(0, self._row - int(number or 1))
        elif letter == "K":
            self.lines[self._row] = ""

    def text(self) -> str:
        """The lines without their colours."""
        return self._SEQUENCE.sub("", "\n".join(self.lines)).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and makes all pictures."""
    parser = argparse.ArgumentParser(description="Makes the pictures of the documentation from a real run.")
    parser.add_argument("--trials", type=int, help="of the search; as the definition says by default")
    parser.add_argument("--epochs", type=int, help="of a trial")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="the folder of `pictures` and `img`")
    chosen = parser.parse_args(arguments)
    options = [f"--{name}={value}" for name in ("trials", "epochs") if (value := getattr(chosen, name))]
    terminal, pages = chosen.output / "pictures", chosen.output / "img"
    for output in (terminal, pages):
        output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record_terminal(folder, options, terminal)
        photograph_pages(folder, pages)


def record_terminal(folder: Path, options: Sequence[str], output: Path) -> None:
    """Searches in `folder`; writes `running.svg`, `result.svg`, and `result.txt` with the text of the latter."""
    command = ["run", "digits", "--devices", "cpu"]
    screen, middle = Screen(), [""]
    for chunk in printed([*command, *options], folder):
        screen.feed(chunk)
        if _is_middle(screen.text()):
            middle = list(screen.lines)
    typed = f"$ trialyard {' '.join(command)}"
    # The folder's name is an accident of this run.
    end = [line.replace(str(folder), "...") for line in screen.lines]
    result = next(at for at, line in enumerate(end) if "rank  trial" in line)
    _write_svg(output / "running.svg", typed, middle)
    _write_svg(output / "result.svg", typed, end[result:])
    plain = [Screen._SEQUENCE.sub("", line) for line in end[result:]]
    (output / "result.txt").write_text("\n".join(plain).rstrip() + "\n", encoding="utf-8")


def _is_middle(text: str) -> bool:
    """Whether half of the trials have ended, and every slot has trained an epoch of another one."""
    progress = re.search(r": (\d+) of (\d+) trials", text)
    if progress is None or int(progress[1]) != int(progress[2]) // 2:
        return False
    # Not between two drawings: a trial's end is printed a moment before the table is drawn again.
    ended = re.findall(r"^\S+ trial \d+ (?:complete|pruned|failed)", text, re.MULTILINE)
    slots = re.findall(r"(?:cpu|gpu):[\d.]+", text.splitlines()[0])
    rows = re.findall(r"^(?:cpu|gpu):\S+ +\d+ +\d+/\d+ ", text, re.MULTILINE)
    return len(ended) == int(progress[1]) and len(rows) == len(slots) and "starting" not in text


def printed(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """What the command prints in a terminal, as it comes."""
    ours, theirs = pty.openpty()
    environment = _environment() | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": "40"}
    process = subprocess.Popen(_command(arguments), cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a chunk may end inside a character
    try:
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux says so at the end of a pseudo terminal
                break
            if not chunk:
                break
            yield decoder.decode(chunk)
    finally:
        os.close(ours)
        process.wait()
    if process.returncode != 0:
        raise SystemExit(f"`trialyard {' '.join(arguments)}` ended with {process.returncode}: see what it printed")


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "search.program", *arguments]


def _environment() -> dict[str, str]:
    """This process's environment without settings of Trialyard's, and with this checkout first on Python's path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIALYARD_")}
    return kept | {"PYTHONPATH": str(ROOT)}


def _write_svg(path: Path, typed: str, lines: Sequence[str]) -> None:
    """Writes a picture of a terminal with what was `typed`, and `lines` with their colours."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(typed, style="bold green", highlight=False, markup=False)
        for text in AnsiDecoder().decode("\n".join(lines).rstrip()):
            console.print(text, soft_wrap=True, highlight=False)
        svg = console.export_svg(title="trialyard", unique_id=path.stem)
    # Without the fonts that rich would load from another host: a reader's own are good enough.
    path.write_text(re.sub(r" *@font-face \{.*?\}\n", "", svg, flags=re.DOTALL), encoding="utf-8")


def photograph_pages(folder: Path, output: Path) -> None:
    """Writes `<page>-<screen>.png` of the study `digits` in `folder`/yard for each of the SCREENS."""
    report = subprocess.run(
        _command(["report", "digits"]), cwd=folder, env=_environment(), capture_output=True, text=True
    )
    if report.returncode != 0:
        raise SystemExit(report.stderr)
    best = studies.best_trial("digits", f"sqlite:///{folder}/yard/studies.db").number
    with _dashboard(folder) as address, open_browser() as browser:
        pages = {
            "report": ((folder / "digits-report.html").as_uri(), ".js-plotly-plot"),
            "studies": (f"{address}/dashboard", "text=digits"),
            "study": (f"{address}/dashboard/studies/1", "text=Best so far"),
            "trial": (f"{address}/dashboard/studies/1/trials?numbers={best}", "text=mistakes.svg"),
        }
        for screen, options in SCREENS.items():
            page = browser.new_page(**options)
            for name, (url, shown) in pages.items():
                page.goto(url, timeout=PATIENCE)
                expect(page.locator(shown).first).to_be_attached(timeout=PATIENCE)
                page.wait_for_timeout(4 * SECONDS)  # the figures are drawn one after the other
                page.screenshot(path=output / f"{name}-{screen}.png")
            page.close()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium, while the block runs."""
    with sync_playwright() as playwright:
        # Without a path Playwright starts the Chromium that it has downloaded.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def _dashboard(folder: Path) -> Iterator[str]:
    """The address of the dashboard of the database in `folder`/yard, while the block runs."""
    command = _command(["dashboard", "--port", "0", "--read-only"])
    process = subprocess.Popen(command, cwd=folder, env=_environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+?(?=,| |$)", line)
        if address is None:
            raise SystemExit(f"the dashboard did not start: {line}")
        yield address[0]
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
