"""A person sees the dashboard and a report: Debian's Chromium, headless, on the real command and a study that our own
worker trained.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Error, Page, expect, sync_playwright

import studies

pytestmark = pytest.mark.long

ROOT = str(Path(__file__).parents[1])
PASSWORD = "trustno1"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SECONDS = 1000.0  # Playwright counts in milliseconds
PATIENCE = 60 * SECONDS  # the page is 7 MB of JavaScript, and CI's machine may be busy

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chromium: str, command: Callable[..., str]) -> Path:
    """A folder with the yard of a study `digits`, searched by the command: three trials of two epochs."""
    folder = tmp_path_factory.mktemp("searched")
    command("run", "digits", "--trials", "3", "--epochs", "2", "--limit", "200", folder=folder)
    return folder


@pytest.fixture
def searched(trained: Path, home: Path) -> Path:
    """The home's folder, with that study in its yard."""
    shutil.copytree(trained / "yard", home / "yard")
    return home


@pytest.fixture
def address(searched: Path) -> Iterator[str]:
    """The address of the dashboard that the command serves, with a password."""
    process = subprocess.Popen(
        [sys.executable, "-m", "search.cli", "dashboard", "--port", "0"],
        cwd=searched,
        env=os.environ | {"PYTHONPATH": ROOT, "TRIALYARD_DASHBOARD_PASSWORD": PASSWORD},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        match = re.search(r"http://\S+", line)
        assert match is not None, line
        yield match[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Iterator[Open]:
    """Opens a page in a new browser, with or without a password; fails if the page sends a request to another host."""
    with sync_playwright() as playwright:
        contexts: list[BrowserContext] = []
        asked: set[str] = set()

        def open_page(url: str, password: str | None = None) -> Page:
            context = playwright.chromium.launch_persistent_context(
                tmp_path / f"profile-{len(contexts)}",
                executable_path=chromium,
                args=ARGUMENTS,
                http_credentials=None if password is None else {"username": "me", "password": password},
                viewport={"width": 1280, "height": 1600},
            )
            context.set_default_timeout(PATIENCE)
            contexts.append(context)
            page = context.pages[0]
            page.on("request", lambda request: asked.add(request.url))
            page.goto(url)
            return page

        yield open_page
        for context in contexts:
            context.close()
        foreign = {
            url for url in asked if not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:", "about:"))
        }
        assert not foreign


def _shot(page: Page, name: str, whole: bool = False) -> None:
    """Writes a picture to the folder that SCREENSHOTS names, if it is set."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)


FIGURES = (
    "Loss and accuracy by epoch, best trials first",
    "Accuracy against dropout",
    "Accuracy against cost",
    "Best so far",
)
# In the report alone.
MORE_FIGURES = (
    "Confusion matrix of trial",
    "Accuracy by class of trial",
    "The most certain mistakes of trial",
    "Accuracy against each hyperparameter",
    "All hyperparameters together",
    "Images of the data",
)
# For each graph of the page: the traces, and of each how many points it has.
POINTS = """() => [...document.querySelectorAll(".js-plotly-plot")].map(
    graph => graph.data.map(trace => Math.min((trace.x || []).length, (trace.y || []).length))
)"""


def test_the_list_the_study_and_a_trial_with_its_files(searched: Path, address: str, browse: Open) -> None:
    page = browse(address, PASSWORD)
    expect(page.get_by_text("digits").first).to_be_visible(timeout=PATIENCE)
    _shot(page, "studies")
    page.get_by_text("digits").first.click()
    page.wait_for_url("**/studies/1**")

    # Our own figures, drawn: Plotly has made their titles, and lines and dots of their numbers.
    for title in FIGURES:
        shown = page.locator(".js-plotly-plot", has=page.get_by_text(title))
        expect(shown).to_have_count(1, timeout=PATIENCE)
        expect(shown.locator("path.js-line, path.point").first).to_be_attached(timeout=PATIENCE)
    expect(page.get_by_text("Failed to fetch")).to_have_count(0)
    page.set_viewport_size({"width": 1280, "height": 2600})
    _shot(page, "study")

    page.goto(f"{address}/dashboard/studies/1/note")
    expect(page.get_by_text("3 of 3 trials")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Searched and fixed", exact=True)).to_be_visible()
    _shot(page, "note")

    best = studies.best_trial("digits", f"sqlite:///{searched}/yard/studies.db")
    page.goto(f"{address}/dashboard/studies/1/trials?numbers={best.number}")
    expect(page.get_by_text(f"validation accuracy {best.value:.4f}").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text(re.compile(r"Conv2D +\d+x\d+x\d+ +[\d,]+")).first).to_be_visible()
    _shot(page, "trial")
    for name in ("model.keras", "history.json"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
        with page.expect_download() as download:
            page.locator(f'a[download="{name}"]').first.click()
        assert download.value.suggested_filename == name
        written = searched / "yard" / "artifacts" / Path(best.user_attrs["model"]).with_name(name)
        assert download.value.path().read_bytes() == written.read_bytes()


def test_the_report_opens_from_a_disk_and_asks_no_host(searched: Path, home: Path, browse: Open) -> None:
    file = home / "digits-report.html"
    file.write_text(
        studies.report("digits", f"sqlite:///{searched}/yard/studies.db", artifacts=searched / "yard" / "artifacts"),
        encoding="utf-8",
    )
    asked: list[str] = []
    page = browse("about:blank")
    page.on("request", lambda request: asked.append(request.url))
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    graphs = page.locator(".js-plotly-plot")
    titles = (*FIGURES, *MORE_FIGURES)
    expect(graphs).to_have_count(len(titles), timeout=PATIENCE)
    for title in titles:
        expect(page.locator(".js-plotly-plot", has=page.get_by_text(title))).to_have_count(1)
    points = page.evaluate(POINTS)
    assert len(points) == len(titles)
    assert all(graph and min(graph) > 0 for graph in points), points
    for index in range(len(titles)):
        graphs.nth(index).scroll_into_view_if_needed()
    _shot(page, "report", whole=True)
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()]
    assert wrong == []


def test_a_note_is_changed_in_the_browser(address: str, browse: Open) -> None:
    """The guard against other sites lets the dashboard's own page through."""
    page = browse(f"{address}/dashboard", PASSWORD)
    status = page.evaluate(
        """async () => {
            const note = (await (await fetch("/api/studies/1")).json()).note;
            const body = JSON.stringify({version: note.version + 1, body: "changed"});
            const headers = {"Content-Type": "application/json"};
            return (await fetch("/api/studies/1/note", {method: "PUT", headers, body})).status;
        }"""
    )
    assert status == 204
    page.goto(f"{address}/dashboard/studies/1/note")
    expect(page.get_by_text("changed")).to_be_visible(timeout=PATIENCE)


def test_a_form_on_another_site_changes_nothing(address: str, browse: Open) -> None:
    page = browse(f"{address}/api/meta", PASSWORD)
    # A page of another origin, in the browser that has logged in.
    page.goto("data:text/html,<form method=post action='" + address + "/api/studies'><button>go</button></form>")
    with page.expect_response("**/api/studies") as answer:
        page.get_by_role("button").click()
    assert answer.value.status == 403


def test_a_wrong_password_shows_nothing(address: str, browse: Open) -> None:
    page = browse("about:blank", "wrong")
    answer = page.goto(f"{address}/dashboard")
    assert answer is not None
    assert answer.status == 401
    expect(page.get_by_text("the password is needed")).to_be_visible()
    _shot(page, "wrong")
    # The page's script is not served either.
    assert page.evaluate("async () => (await fetch('/static/bundle.js')).status") == 401


def test_no_password_shows_nothing(address: str, browse: Open) -> None:
    page = browse("about:blank")
    # A headless browser has no password dialog, and reports an error.
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
        page.goto(f"{address}/dashboard")


def test_the_documentation_s_pictures_are_made_from_a_real_study(searched: Path, chromium: str, tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    code = "import make_pictures, pathlib, sys; make_pictures.photograph_pages(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(searched), str(output)]
    output.mkdir()
    path = os.pathsep.join([ROOT, f"{ROOT}/docs"])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=200)
    pages, screens = ("report", "studies", "study", "trial"), ("dark", "light", "phone")
    expected = [f"{page}-{screen}.png" for page in pages for screen in screens]
    assert sorted(path.name for path in output.iterdir()) == expected
