"""The dashboard: no access without the password, no change where only reading is allowed, and correct answers."""

import base64
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from conftest import ARTIFACT, MODEL_PATH, NOTE, TRIVIAL, Command, ended
from optuna.distributions import FloatDistribution
from optuna.exceptions import OptunaError
from optuna.trial import TrialState
from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError

from search import dashboard, guard
from search.errors import DashboardError
from storage import artifacts, claims, database, ledger, retention, settings
from storage.errors import SettingsError, StorageError, StudyGone
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import notes, registry
from studies.attribute_texts import for_people
from studies.definition import Definition, parse, to_toml

PASSWORD = "trustno1-Grüße"
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")

# What each changing route of the package needs to really change something.
BODY = {
    "study_name": "another",
    "directions": ["maximize"],
    "version": 2,
    "body": "changed",
    "state": "Fail",
    "user_attrs": {"changed": 1},
    "file": "data:text/plain;base64,YQ==",
    "filename": "a.txt",
    "mode": "ChooseWorst",
    "candidates": [0, 1],
    "clicked": 1,
    "output_type": "note",
}


class Answer:
    """One answer of a WSGI application: `status`, `headers` by lower-case name, `body`."""

    def __init__(
        self, app: Any, method: str, path: str, body: Any = None, address: str = "127.0.0.1", /, **headers: str
    ) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_HOST": "127.0.0.1:8080",
            "REMOTE_ADDR": address,
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(data)),
            "wsgi.input": io.BytesIO(data),
            "wsgi.errors": io.StringIO(),
        }
        setup_testing_defaults(environ)
        environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}

        def start(status: str, received: list[tuple[str, str]], *error: Any) -> None:
            self.status = int(status.split()[0])
            self.headers = {name.lower(): value for name, value in received}

        parts = app(environ, start)
        self.body = b"".join(parts)
        if hasattr(parts, "close"):
            parts.close()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture
def place(home: Path, finished_study: str) -> Iterator[PatientStorage]:
    opened = database.connect(f"sqlite:///{home}/yard/studies.db")
    yield opened
    opened.engine.dispose()


@pytest.fixture
def serve(home: Path, place: PatientStorage) -> Callable[..., Any]:
    """The guarded application on the finished study."""

    def make(**options: Any) -> Any:
        return dashboard.application(place, home / "yard" / "artifacts", **options)

    return make


def _basic(password: str, user: str = "me") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _routes(home: Path, place: PatientStorage) -> list[tuple[str, str]]:
    """(method, path) for every route of the application, with ids that exist."""
    values = {
        "study_id": "1",
        "trial_id": "1",
        "artifact_id": ARTIFACT,
        "history_id": "x",
        "plot_type": "slice",
        "filename": "bundle.js",
        "": "",
    }
    return [
        (route.method, re.sub(r"<(\w*)(?::[^<>]*(?:\([^)]*\)\?)?)?>", lambda match: values[match[1]], route.rule))
        for route in dashboard.pages(place, home / "yard" / "artifacts").routes
    ]


def test_the_routes_are_taken_from_the_application_whole(home: Path, place: PatientStorage) -> None:
    routes = _routes(home, place)
    assert len(routes) > 25
    assert {method for method, _ in routes} == {"GET", "POST", "PUT", "DELETE"}
    assert not [path for _, path in routes if "<" in path or ">" in path]
    assert ("GET", "/dashboard") in routes
    assert ("DELETE", f"/api/artifacts/1/1/{ARTIFACT}") in routes


# --- the password -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_with_a_password_nothing_answers_the_anonymous(
    home: Path, place: PatientStorage, serve: Callable[..., Any], read_only: bool
) -> None:
    app = serve(password=SecretStr(PASSWORD), read_only=read_only)
    paths = {path for _, path in _routes(home, place)} | {"/does/not/exist"}
    answers = {(method, path): Answer(app, method, path, BODY) for path in paths for method in (*METHODS, "HEAD")}
    assert {answer.status for answer in answers.values()} == {401}
    assert {answer.headers["www-authenticate"].split()[0] for answer in answers.values()} == {"Basic"}
    assert not [answer for answer in answers.values() if len(answer.body) > 100]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (_basic(PASSWORD), 200),
        (_basic(PASSWORD, ""), 200),
        (_basic(PASSWORD, "anybody").replace("Basic", "basic"), 200),
        (_basic(PASSWORD + "x"), 401),
        (_basic(PASSWORD[:-1]), 401),
        (_basic(""), 401),
        (_basic(PASSWORD).replace("Basic", "Bearer"), 401),
        ("Basic", 401),
        ("Basic !", 401),
        ("Basic é", 401),
        (PASSWORD, 401),
        ("Basic " + base64.b64encode(PASSWORD.encode()).decode(), 401),  # no user, no colon
    ],
)
def test_only_the_right_password_opens(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture, header: str, status: int
) -> None:
    answer = Answer(serve(password=SecretStr(PASSWORD)), "GET", "/api/studies", authorization=header)
    assert answer.status == status
    assert ("a wrong password came from 127.0.0.1" in caplog.text) == (status == 401)
    assert PASSWORD not in caplog.text
    assert base64.b64encode(PASSWORD.encode()).decode()[:8] not in caplog.text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the dashboard's clock, which is stopped, by so many seconds."""
    now = [1000.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_guessing_passwords_is_slow_and_the_right_one_waits_only_for_a_while(
    serve: Callable[..., Any], clock: Callable[[float], None]
) -> None:
    app = serve(password=SecretStr(PASSWORD), host="0.0.0.0")

    def status(password: str | None, address: str = "192.0.2.7", **headers: str) -> int:
        given = {} if password is None else {"authorization": _basic(password)}
        return Answer(app, "GET", "/api/studies", None, address, **given, **headers).status

    cookie = Answer(app, "GET", "/api/studies", None, "192.0.2.7", authorization=_basic(PASSWORD)).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    known = cookie.partition(";")[0]
    for _ in range(20):
        assert status(PASSWORD) == 200  # the right one never counts
        assert status(None) == 401  # nor does what a browser sends before it asks
    assert [status("wrong") for _ in range(12)] == [401] * 10 + [429] * 2
    refused = Answer(app, "GET", "/api/studies", None, "192.0.2.7", authorization=_basic(PASSWORD))
    assert (refused.status, refused.headers["retry-after"]) == (429, "6")
    assert "wait 6 s" in refused.json["reason"]
    # Other addresses, and browsers that had access before, do not have to wait.
    assert status(PASSWORD, "192.0.2.8") == 200
    assert status(PASSWORD, cookie=f"other=1; {known}") == 200
    assert status("wrong", cookie=known) == 401  # the cookie gives no access
    assert status(None, cookie=known) == 401
    assert status(PASSWORD, cookie=known[:-1]) == 429
    clock(12.1)
    assert status(PASSWORD) == 200
    assert [status("wrong") for _ in range(2)] == [401, 429]  # one per six seconds, not ten again
    clock(60.1)
    assert [status("wrong") for _ in range(11)] == [401] * 10 + [429]


def test_addresses_of_one_network_guess_as_one_and_their_memory_is_bounded(
    serve: Callable[..., Any], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "ADDRESSES", 3)
    app = serve(password=SecretStr(PASSWORD), host="::")

    def status(address: str) -> int:
        return Answer(app, "GET", "/", None, address, authorization=_basic("wrong")).status

    assert [status(f"2001:db8::{number:x}") for number in range(11)] == [401] * 10 + [429]
    assert status("2001:db8:0:1::1") == 401
    for number in range(3):
        assert status(f"192.0.2.{number}") == 401
    assert status("2001:db8::1") == 401  # forgotten


def test_another_address_needs_a_password(serve: Callable[..., Any]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org", "127.0.0.1.example.org", ""):
        with pytest.raises(DashboardError, match=f"--host {host} lets other machines in.*TRIALYARD_DASHBOARD_PASSWORD"):
            serve(host=host)
        assert Answer(serve(host=host, password=SecretStr("x")), "GET", "/api/studies").status == 401
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert Answer(serve(host=host), "GET", "/api/studies").status == 200


def test_the_password_comes_from_the_environment_or_a_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.load().password is None
    monkeypatch.setenv("TRIALYARD_DASHBOARD_PASSWORD_FILE", str(home / "secret"))
    with pytest.raises(SettingsError, match=r"secret' cannot be read .*: write the dashboard's password into it"):
        _ = settings.load().password
    (home / "secret").write_text("\n")
    with pytest.raises(SettingsError, match=r"secret' is empty: write the dashboard's password into it"):
        _ = settings.load().password
    (home / "secret").write_text("from the file\n")
    password = settings.load().password
    assert password is not None
    assert password.get_secret_value() == "from the file"
    monkeypatch.setenv("TRIALYARD_DASHBOARD_PASSWORD", PASSWORD)
    loaded = settings.load()
    assert loaded.password is not None
    assert loaded.password.get_secret_value() == PASSWORD
    assert PASSWORD not in repr(loaded)


# --- other sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec_fetch_site": "same-origin"}, 204),
        ({"origin": "http://127.0.0.1:8080"}, 204),
        ({"referer": "http://127.0.0.1:8080/dashboard"}, 204),
        ({"sec_fetch_site": "same-origin", "origin": "https://example.org"}, 204),  # through a proxy that ends TLS
        ({}, 204),  # a program
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:8080"}, 403),
        ({"origin": "http://example.org"}, 403),
        ({"origin": "http://127.0.0.1:9090"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[", "referer": "http://127.0.0.1:8080/"}, 403),
        ({"referer": "http://example.org/127.0.0.1:8080"}, 403),
    ],
)
def test_only_the_dashboard_s_own_page_changes_something(
    serve: Callable[..., Any], headers: dict[str, str], status: int
) -> None:
    app = serve(password=SecretStr(PASSWORD))
    known = {"authorization": _basic(PASSWORD)}
    note = Answer(app, "GET", "/api/studies/1", **known).json["note"]
    assert note["body"] == NOTE
    body = {"version": note["version"] + 1, "body": "changed"}
    assert Answer(app, "PUT", "/api/studies/1/note", body, **known, **headers).status == status
    body = Answer(app, "GET", "/api/studies/1", **known).json["note"]["body"]
    assert body == ("changed" if status == 204 else NOTE)


@pytest.mark.parametrize("host", ["example.org", "example.org:8080", "127.0.0.1.example.org", "localhost.example.org"])
@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_name_for_this_machine_is_refused(serve: Callable[..., Any], host: str, method: str) -> None:
    answer = Answer(serve(), method, "/api/studies", {"study_name": "n", "directions": ["maximize"]}, host=host)
    assert answer.status == 403
    assert answer.json["reason"] == "open the dashboard as localhost or 127.0.0.1"


def test_this_machine_s_own_names_are_not(serve: Callable[..., Any]) -> None:
    for host in ("localhost", "localhost:9000", "127.0.0.1", "[::1]:8080"):
        assert Answer(serve(), "GET", "/api/studies", host=host).status == 200
    for host in ("", "[", "127.0.0.1,example.org"):
        assert Answer(serve(), "GET", "/api/studies", host=host).status == 403


# --- reading only -----------------------------------------------------------------------------------------


def test_read_only_refuses_every_change_and_the_file_stays_the_same(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    file = home / "yard" / "studies.db"
    place.engine.dispose()
    before = file.read_bytes()
    app = serve(read_only=True)
    for method, path in _routes(home, place):
        answer = Answer(app, method, path, None if method == "GET" else BODY)
        if method == "GET":
            expected = 404 if path == f"/artifacts/1/{ARTIFACT}" else 200  # it belongs to a trial, not to a study
            assert answer.status in (expected, 302), (path, answer.body)
            assert Answer(app, "HEAD", path).status == answer.status
        else:
            assert (answer.status, answer.json) == (403, {"reason": "this dashboard is read-only"})
    for method in ("PATCH", "OPTIONS", "get", "TRACE"):
        assert Answer(app, method, "/api/studies").status == 403
    place.engine.dispose()
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.glob("studies.db*")) == ["studies.db", "studies.db.locks"]


def test_without_read_only_the_same_requests_change_something(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    app = serve()
    for method, path in _routes(home, place):
        if method != "GET":
            Answer(app, method, path, BODY)
    assert registry.names(place) == []  # the last of them deleted it


def test_a_get_changes_nothing_even_where_changes_are_allowed(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    file = home / "yard" / "studies.db"
    place.engine.dispose()
    before = file.read_bytes()
    app = serve()
    for method, path in _routes(home, place):
        if method == "GET":
            Answer(app, method, path)
    place.engine.dispose()
    assert file.read_bytes() == before


def test_the_database_itself_refuses_where_only_reading_is_allowed(
    home: Path, either_url: str, trivial: Definition
) -> None:
    opened = database.create(either_url)
    registry.create(trivial, opened, {"fingerprint": "0" * 16})
    app = dashboard.application(opened, home, read_only=True)
    for _ in range(2):  # also through connections that were given back
        assert Answer(app, "GET", "/api/studies/1").json["name"] == "trivial"
        assert Answer(app, "GET", "/csv/1").status == 200
    with pytest.raises((OptunaError, SQLAlchemyError)):
        opened.set_study_user_attr(1, "changed", 1)
    with pytest.raises(StorageError, match="may only be read"):
        ledger.set_state(opened, ledger.find(opened, "trivial"), "paused")
    with pytest.raises((OptunaError, SQLAlchemyError)):
        opened.delete_study(1)
    opened.engine.dispose()
    again = database.connect(either_url)
    assert "changed" not in again.get_study_user_attrs(1)
    again.set_study_user_attr(1, "changed", 1)
    again.engine.dispose()


# --- what it answers --------------------------------------------------------------------------------------


def _same(ours: Answer, stock: Answer) -> dict[str, Any]:
    """Compares the two answers, ignoring the order where the package has none."""
    assert ours.status == stock.status, ours.body
    assert ours.headers["content-type"] == stock.headers["content-type"]
    actual, expected = ours.json, stock.json
    for answer in (actual, expected):
        for key in ("union_user_attrs", "plotly_graph_objects"):
            answer.get(key, []).sort(key=str)
    if "user_attrs" in actual:  # see test_the_attributes_of_a_study_are_for_people
        del actual["user_attrs"], expected["user_attrs"]
    assert actual == expected
    assert isinstance(actual, dict)
    return actual


def test_a_study_s_page_is_the_package_s_own(home: Path, place: PatientStorage, me: Owner) -> None:
    """Through a study's life: finished, running and waiting trials; notes, plots, artifacts, infinities."""
    ledger.raise_budget(place, ledger.find(place, "trivial"), ledger.Budget(trials=10, hours=None))
    study = registry.open("trivial", place)
    app = dashboard.pages(place, home / "yard" / "artifacts")

    def compare(*afters: int) -> dict[str, Any]:
        stock = optuna_dashboard.wsgi(database.connect(str(place.engine.url)), artifact_store=object())
        answer = {}
        for after in afters:
            path = f"/api/studies/1?after={after}"
            answer = _same(Answer(app, "GET", path), Answer(stock, "GET", path))
        return answer

    found = compare(0, 4, 5, 6)
    assert [trial["number"] for trial in found["best_trials"]] == [1]
    running, waiting = claims.claim(place, ledger.find(place, "trivial"), me, 60.0), place.create_new_trial(1)
    assert running is not None
    place.set_trial_state_values(waiting, TrialState.WAITING)
    compare(0, 5, 7)
    for step, value in enumerate((0.5, math.nan, math.inf, -math.inf), start=1):
        claims.record_epochs(place, running, {step: value})
    place.set_trial_user_attr(running.trial_id, "new", "one")
    optuna_dashboard.save_note(optuna.trial.Trial(study, running.trial_id), "it runs")
    optuna_dashboard.save_note(optuna.trial.Trial(study, 1), "another text " * 400)
    compare(0, 5)
    place.set_trial_param(running.trial_id, "dropout", 0.8, FloatDistribution(0.0, 0.9))
    claims.finish(place, running, TrialState.COMPLETE, 0.95, {"epochs": 4})
    answer = compare(0, 5, 6)
    assert [trial["number"] for trial in answer["best_trials"]] == [5]
    assert [trial["state"] for trial in answer["trials"]] == ["Waiting"]
    compare(7, 0)


def test_the_attributes_of_a_study_are_for_people(home: Path, place: PatientStorage, serve: Callable[..., Any]) -> None:
    place.set_study_user_attr(1, "team", "vision")
    place.set_study_system_attr(1, notes.FOUND, ["The best is trial 1.", "Its accuracy is 0.9."])
    answer = Answer(serve(), "GET", "/api/studies/1").json
    shown = {attribute["key"]: attribute["value"] for attribute in answer["user_attrs"]}
    assert next(iter(shown.items())) == ("what was found", "The best is trial 1. Its accuracy is 0.9.")
    assert shown["definition (TOML)"] == to_toml(parse(TRIVIAL))
    assert shown["budget"] == "5 trials"
    assert shown["team"] == "vision"
    assert not any(key.startswith("trialyard:") for key in shown)
    assert answer["objective_names"] == ["validation accuracy"]


def test_attributes_of_ours_that_another_program_changed_are_shown_as_they_are() -> None:
    changed = {"trialyard:definition": [1], "trialyard:budget": {"trials": "x"}, "trialyard:state": 7}
    assert for_people(changed, []) == {"state": "7", "budget": "{'trials': 'x'}", "definition (TOML)": "[1]"}


def test_attributes_of_another_shape_are_left_out(home: Path, place: PatientStorage) -> None:
    app = dashboard.pages(place, home / "yard" / "artifacts")

    def answer() -> dict[str, Any]:
        found = Answer(app, "GET", "/api/studies/1?after=0")
        assert found.status == 200, found.body
        return dict(found.json)

    before = answer()
    first = before["trials"][0]["trial_id"]
    waiting = place.create_new_trial(1)
    of_trials: dict[str, Any] = {
        "fixed_params": 5,
        "artifacts:x": "not JSON",
        "artifacts:y": json.dumps({"mimetype": "text/plain"}),
        "constraints": "low",
    }
    for key, value in of_trials.items():
        place.set_trial_system_attr(waiting, key, value)
    of_study: dict[str, Any] = {
        f"dashboard:{first}:note_ver": "new",
        "dashboard:note_ver": [1],
        "dashboard:note_str:0": 7,
        "artifacts:z": 3,
        "dashboard:plot_data:figure:0": {},
    }
    for key, value in of_study.items():
        place.set_study_system_attr(1, key, value)
    after = answer()
    assert [trial["number"] for trial in after["trials"]] == [0, 1, 2, 3, 4, 5]
    assert after["trials"][0]["params"] == before["trials"][0]["params"]
    assert after["union_search_space"] == before["union_search_space"]


def test_a_study_of_another_kind_is_answered_by_the_package(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    two = optuna.create_study(storage=place, study_name="two", directions=["maximize", "minimize"])
    two.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=3)
    new = optuna.create_study(storage=place, study_name="new")
    stock = optuna_dashboard.wsgi(database.connect(str(place.engine.url)), artifact_store=object())
    app = serve()
    for path in (
        *(f"/api/studies/{two._study_id}", f"/api/studies/{new._study_id}", "/api/studies/77", "/api/studies"),
        *("/api/studies/1?after=-1", "/api/studies/1?after=x", "/api/meta"),
    ):
        _same(Answer(app, "GET", path), Answer(stock, "GET", path))


def test_a_new_study_with_a_deleted_one_s_id_shows_its_own_trials(
    home: Path, place: PatientStorage, serve: Callable[..., Any], trivial: Definition, me: Owner
) -> None:
    app = serve()
    assert len(Answer(app, "GET", "/api/studies/1").json["trials"]) == 5
    other = database.connect(str(place.engine.url))  # as another process would
    other.delete_study(1)
    assert Answer(app, "GET", "/api/studies/1").status == 404
    registry.create(trivial, other, {"fingerprint": "0" * 16})
    for number in range(5):
        claim = claims.claim(other, ledger.find(other, trivial.name), me, 60.0)
        assert claim is not None
        assert (claim.study_id, claim.trial_id) == (1, number + 1)  # SQLite gives them again
        claims.finish(other, claim, TrialState.COMPLETE, 0.25, {"epochs": 1})
    answer = Answer(app, "GET", "/api/studies/1").json
    assert [trial["values"] for trial in answer["trials"]] == [[0.25]] * 5
    assert answer["best_trials"][0]["values"] == [0.25]
    assert answer["union_search_space"] == []
    assert Answer(app, "GET", "/csv/1").body.count(b"0.25") == 5
    other.engine.dispose()


def test_a_large_answer_is_compressed_for_clients_that_accept_it(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    optuna_dashboard.save_note(registry.open("trivial", place), "long " * 20_000)
    app = serve()
    plain = Answer(app, "GET", "/api/studies/1")
    packed = Answer(app, "GET", "/api/studies/1", accept_encoding="gzip, deflate")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert len(packed.body) < len(plain.body) / 10
    assert dashboard.gzip.decompress(packed.body) == plain.body


def test_a_study_is_not_renamed(place: PatientStorage, serve: Callable[..., Any]) -> None:
    answer = Answer(serve(), "POST", "/api/studies/1/rename", {"study_name": "other"})
    assert answer.status == 403
    assert "use the study's name" in answer.json["reason"]
    assert registry.names(place) == ["trivial"]


# --- artifacts --------------------------------------------------------------------------------------------


def test_a_trial_s_file_is_downloaded_from_where_it_is(home: Path, serve: Callable[..., Any]) -> None:
    app = serve()
    (listed,) = Answer(app, "GET", "/api/studies/1").json["trials"][0]["artifacts"]
    answer = Answer(app, "GET", f"/artifacts/1/1/{listed['artifact_id']}", origin="http://example.org")
    assert (answer.status, answer.body) == (200, b"the model")
    # It must neither be read by other sites nor run as a page of this one.
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["content-security-policy"] == "sandbox"
    (home / "yard" / "artifacts" / MODEL_PATH).unlink()
    assert Answer(app, "GET", f"/artifacts/1/1/{listed['artifact_id']}").status == 404


def test_a_model_that_retention_removed_is_no_longer_offered(
    home: Path, place: PatientStorage, serve: Callable[..., Any], me: Owner
) -> None:
    """By a dashboard that had read the finished trial before."""
    ledger.raise_budget(place, ledger.find(place, "trivial"), ledger.Budget(trials=7, hours=None))
    root = home / "yard" / "artifacts"
    app = serve()

    def offered(number: int) -> list[str]:
        files = Answer(app, "GET", "/api/studies/1").json["trials"][number]["artifacts"]
        for one in files:
            assert Answer(app, "GET", f"/artifacts/1/{number + 1}/{one['artifact_id']}").body == b"the file"
        return sorted(one["filename"] for one in files)

    for number, value in ((5, 0.97), (6, 0.98)):
        claim = claims.claim(place, ledger.find(place, "trivial"), me, 60.0)
        assert claim is not None
        folder = root / claim.folder
        folder.mkdir(parents=True)
        for name in (artifacts.MODEL, artifacts.HISTORY):
            (folder / name).write_bytes(b"the file")
        recorded = {"model": str(claim.folder / artifacts.MODEL)}
        claims.finish(place, claim, TrialState.COMPLETE, value, recorded, [artifacts.MODEL, artifacts.HISTORY])
        assert offered(number) == ["history.json", "model.keras"]
        retention.trim(place, claim, root, keep=1)
    assert offered(5) == ["history.json"]
    assert offered(6) == ["history.json", "model.keras"]


def test_a_file_in_the_folder_of_optuna_s_own_store_is_found(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    folder = home / "yard" / "artifacts"
    (home / "curve.txt").write_text("the curve")
    uploaded = optuna.artifacts.upload_artifact(
        artifact_store=optuna.artifacts.FileSystemArtifactStore(folder),
        file_path=str(home / "curve.txt"),
        study_or_trial=registry.open("trivial", place),
    )
    assert Answer(serve(), "GET", f"/artifacts/1/{uploaded}").body == b"the curve"


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "..", "", "link"])
def test_no_file_outside_the_folder_is_served(
    home: Path, place: PatientStorage, serve: Callable[..., Any], name: str
) -> None:
    (home / "secret").write_text("secret")
    (home / "yard" / "artifacts" / MODEL_PATH).with_name("link").symlink_to(home / "secret")
    ledger.raise_budget(place, ledger.find(place, "trivial"), ledger.Budget(trials=6, hours=None))
    trial_id = place.create_new_trial(1)
    odd = ARTIFACT.replace("a", "b")
    meta = {"artifact_id": odd, "filename": name, "mimetype": "text/plain", "encoding": None}
    place.set_trial_system_attr(trial_id, f"artifacts:{odd}", json.dumps(meta))
    assert Answer(serve(), "GET", f"/artifacts/1/{trial_id}/{odd}").status == 404


def test_nothing_is_uploaded_and_no_file_is_removed(
    home: Path, place: PatientStorage, serve: Callable[..., Any]
) -> None:
    app = serve()
    files = sorted((home / "yard" / "artifacts").rglob("*"))
    for path in ("/api/artifacts/1", f"/api/artifacts/1/{place.create_new_trial(1)}"):
        answer = Answer(app, "POST", path, {"file": "data:text/plain;base64,YQ==", "filename": "a.txt"})
        assert (answer.status, answer.json["reason"].split(":")[0]) == (403, "files cannot be uploaded here")
    assert Answer(app, "DELETE", "/api/studies/1", {}).status == 204
    assert sorted((home / "yard" / "artifacts").rglob("*")) == files
    unneeded = retention.unneeded(place, home / "yard" / "artifacts", 5)
    assert [file.why for file in unneeded] == ["its study is gone"], "prune removes them when it is asked to"


def test_a_study_is_deleted_while_a_worker_records_epochs(
    home: Path, either_url: str, trivial: Definition, me: Owner
) -> None:
    opened = database.create(either_url)
    registry.create(trivial, opened, {"fingerprint": "0" * 16})
    study = ledger.find(opened, "trivial")
    claim = claims.claim(opened, study, me, 60.0)
    assert claim is not None
    for _ in range(100):
        opened.create_new_trial(study.id)
    over, lost = threading.Event(), threading.Event()

    def record() -> None:
        storage = database.connect(either_url)
        try:
            for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count(1)):
                claims.record_epochs(storage, claim, {number: 0.5})
        except (StudyGone, claims.ClaimLost):
            lost.set()
        finally:
            storage.engine.dispose()

    worker = threading.Thread(target=record)
    worker.start()
    app = dashboard.application(opened, home)
    try:
        assert Answer(app, "DELETE", f"/api/studies/{study.id}", {}).status == 204
        assert registry.names(opened) == []
        assert lost.wait(30)
    finally:
        over.set()
        worker.join()
    assert Answer(app, "GET", f"/api/studies/{study.id}").status == 404
    opened.engine.dispose()


# --- the command ------------------------------------------------------------------------------------------


@contextmanager
def _started(home: Path, *options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real command on a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "search.cli", "dashboard", "--port", "0", *options],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        assert address is not None, line + process.stderr.read()
        yield process, address[0]
    finally:
        process.kill()
        process.wait()


def _get(url: str, password: str | None = None) -> Any:
    asked = urllib.request.Request(url)
    if password is not None:
        asked.add_header("Authorization", _basic(password))
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return answer.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_cleanly(home: Path, finished_study: str, number: signal.Signals) -> None:
    with _started(home) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        studies = json.loads(_get(f"{address}/api/studies"))["study_summaries"]
        assert [study["study_name"] for study in studies] == [finished_study]
        assert b"bundle.js" in _get(address)
        process.send_signal(number)
        assert process.wait(15) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not list((home / "yard").glob("studies.db-*"))  # SQLite's log was closed, too


def test_no_secret_is_shown(home: Path, finished_study: str) -> None:
    (home / "secret").write_text(PASSWORD)
    with _started(home, "--read-only", TRIALYARD_DASHBOARD_PASSWORD_FILE=str(home / "secret")) as (process, address):
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            _get(f"{address}/api/studies", "wrong")
        shown = refused.value.read() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        for path in ("/dashboard", "/api/meta", "/api/studies", "/api/studies/1"):
            shown += _get(address + path, PASSWORD)
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert said == "a wrong password came from 127.0.0.1\n"
    for secret in (PASSWORD, _basic(PASSWORD).split()[1]):
        assert secret.encode() not in shown


def test_mistakes_are_one_sentence(finished_study: str, start: Command) -> None:
    def fail(*options: str) -> str:
        out, err = ended(start("dashboard", *options), code=1)
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert fail("--host", "0.0.0.0").startswith("error: --host 0.0.0.0 lets other machines in")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port} (Address already in use): choose another --port" in fail(
            "--port", port
        )
    assert "there is no database at" in fail("--storage", "sqlite:///not-there.db")


def test_it_starts_without_keras(home: Path, finished_study: str) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from search import dashboard\n"
        "from storage import database\n"
        "dashboard.application(database.connect('sqlite:///yard/studies.db'), Path('yard/artifacts'))\n"
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch') if name in sys.modules])"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environ, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout == "[]\n"


def test_importances_are_shown_only_if_they_are_more_than_chance(
    place: PatientStorage, serve: Callable[..., Any], me: Owner
) -> None:
    """The package's own shows "dropout 1.00" for two trials, and leaves pruned ones out."""
    study = registry.create(
        parse(TRIVIAL.replace("trials = 5", "trials = 40"), name="many"), place, {"fingerprint": "0" * 16}
    ).study

    def run(count: int, effect: float) -> None:
        for number in range(count):
            claim = claims.claim(place, study, me, 60.0)
            assert claim is not None
            dropout = number * 0.7 / count
            claims.begin(place, claim, {"dropout": (FloatDistribution(0.0, 0.7), dropout)})
            value = 0.5 + (number * 7919 % 13) / 1000 - effect * dropout
            claims.record_epochs(place, claim, {1: value})
            state = TrialState.PRUNED if number % 2 else TrialState.COMPLETE
            claims.finish(place, claim, state, value, {})

    app, path = serve(), f"/api/studies/{study.id}/param_importances"
    assert Answer(app, "GET", path).json == {"param_importances": [[]]}  # there is no trial
    run(2, 0.0)
    ((row,),) = Answer(app, "GET", path).json["param_importances"]
    assert (row["name"], row["importance"]) == (dashboard.NO_IMPORTANCES, 0.0)
    run(30, 0.5)
    (shares,) = Answer(app, "GET", path).json["param_importances"]
    assert [(share["name"], share["distribution"]) for share in shares] == [("dropout", "FloatDistribution")]
    assert 0.5 < shares[0]["importance"] <= 1.0


def test_what_is_remembered_of_a_deleted_study_is_forgotten(
    serve: Callable[..., Any], place: PatientStorage, trivial: Definition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "FORGET_SECONDS", 0.0)
    details: list[dashboard.StudyDetail] = []
    original = dashboard.StudyDetail.__init__

    def noted(self: dashboard.StudyDetail, *arguments: Any) -> None:
        original(self, *arguments)
        details.append(self)

    monkeypatch.setattr(dashboard.StudyDetail, "__init__", noted)
    registry.create(trivial.model_copy(update={"name": "other"}), place, {"fingerprint": "0" * 16})
    app = serve()
    ids = [study.id for study in ledger.studies(place)]
    for study_id in ids:
        assert Answer(app, "GET", f"/api/studies/{study_id}?after=0").status == 200
    (detail,) = details
    assert detail._seen.keys() == set(ids)
    assert detail._storage._studies.keys() == set(ids)
    registry.delete("other", place)
    assert Answer(app, "GET", f"/api/studies/{ids[0]}?after=0").status == 200
    assert detail._seen.keys() == detail._storage._studies.keys() == {ids[0]}
