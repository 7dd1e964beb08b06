"""A person sees the dashboard: Debian's Chromium, headless, on the real command and a finished study."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ARTIFACT
from playwright.sync_api import BrowserContext, Error, Page, expect, sync_playwright

PASSWORD = "trustno1"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SECONDS = 1000.0  # Playwright counts in milliseconds
PATIENCE = 60 * SECONDS  # the page is 7 MB of JavaScript, and CI's machine may be busy

Open = Callable[..., Page]


@pytest.fixture
def address(home: Path, finished_study: str) -> Iterator[str]:
    """Where the command serves, with a password."""
    process = subprocess.Popen(
        [sys.executable, "-m", "search.cli", "dashboard", "--port", "0"],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TRIALYARD_DASHBOARD_PASSWORD": PASSWORD},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        yield found[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Iterator[Open]:
    """Opens a page in a new browser, with a password or none; fails where the page asked another host for anything."""
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
        foreign = {url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))}
        assert not foreign


def _shot(page: Page, name: str) -> None:
    """Keeps a picture where SCREENSHOTS names a folder, for a person to look at."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_the_list_the_study_and_a_trial(address: str, browse: Open) -> None:
    page = browse(address, PASSWORD)
    expect(page.get_by_text("trivial").first).to_be_visible(timeout=PATIENCE)
    _shot(page, "studies")
    page.get_by_text("trivial").first.click()
    page.wait_for_url("**/studies/1**")

    # Our own figure, drawn: Plotly has made its title and its line of it.
    expect(page.get_by_text("Accuracy by epoch").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#curves path.js-line, .js-plotly-plot path.js-line").first).to_be_attached(timeout=PATIENCE)
    expect(page.get_by_text("Failed to fetch")).to_have_count(0)
    _shot(page, "study")

    page.goto(f"{address}/dashboard/studies/1/note")
    expect(page.get_by_text("What is searched")).to_be_visible(timeout=PATIENCE)
    _shot(page, "note")

    page.goto(f"{address}/dashboard/studies/1/trials?numbers=0")
    expect(page.get_by_text("after 2 epochs").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("model.keras").first).to_be_visible()
    _shot(page, "trial")
    with page.expect_download() as download:
        page.locator(f'a[href*="{ARTIFACT}"]').first.click()
    assert download.value.path().read_bytes() == b"the model"


def test_a_note_is_changed_in_the_browser(address: str, browse: Open) -> None:
    """The guard against other sites lets the dashboard's own page through."""
    page = browse(f"{address}/dashboard", PASSWORD)
    status = page.evaluate(
        """async () => (await fetch("/api/studies/1/note", {
            method: "PUT", headers: {"Content-Type": "application/json"}, body: '{"version": 2, "body": "changed"}'
        })).status"""
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
    # The page's own script is kept back as well.
    assert page.evaluate("async () => (await fetch('/static/bundle.js')).status") == 401


def test_no_password_shows_nothing(address: str, browse: Open) -> None:
    page = browse("about:blank")
    # A headless browser has no dialog to ask in, and says so.
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
        page.goto(f"{address}/dashboard")
