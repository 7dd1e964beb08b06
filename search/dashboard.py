"""optuna-dashboard's own pages behind our guard, on storage that remembers finished trials.

The guard is in front of the whole application. So no route, now or in a later version, can be reached without the
password, from another site, or with a change where only reading is allowed. One answer is ours: the study that a page
polls again and again. The package's own work for it grows with the notes of all trials.
"""

import base64
import binascii
import gzip
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import optuna_dashboard
import waitress
from bottle import HTTPError, request, response
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard._bottle_util import json_api_view
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty
from optuna_dashboard._serializer import serialize_frozen_trial, serialize_study_detail
from pydantic import SecretStr
from sqlalchemy import Connection, select

from search.errors import DashboardError
from storage import artifacts, claims
from storage.attempt_table import of_trial
from storage.attributes import of_study
from storage.ranking import is_scored
from storage.tables import (
    StudyDirectionModel,
    StudyModel,
    StudySystemAttributeModel,
    StudyUserAttributeModel,
    TrialModel,
    TrialSystemAttributeModel,
)
from storage.transactions import PatientStorage, forbid_writing, read
from studies import findings

log = logging.getLogger(__name__)

THREADS = 8
MAX_BODY = 10 * 2**20  # bytes; the largest thing that the page sends is a note
TRIES, TRY_SECONDS = 10, 6.0  # wrong passwords from one address: this many at once, then one in so many seconds
ADDRESSES = 10_000  # at most so many addresses are remembered
TRUSTED_COOKIE = "trialyard"  # name of the cookie of a browser that sent the right password before
GZIP_FROM = 2**16  # bytes: below this, compressing costs more than it saves
SAFE_METHODS = ("GET", "HEAD")
DETAIL = ("GET", "/api/studies/<study_id:int>")
RENAME = ("POST", "/api/studies/<study_id:int>/rename")
PREFERENTIAL = "preference:is_preferential"

# The package keeps each trial's note and old artifacts among the study's attributes, under the trial's id.
OF_A_TRIAL = re.compile(r"dashboard:(?:artifacts:)?(\d+):")

HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),  # a frame on another site could trick its visitor into a click on "delete"
    ("Referrer-Policy", "same-origin"),
)


def application(
    storage: PatientStorage,
    artifact_folder: Path,
    *,
    host: str = "127.0.0.1",
    password: SecretStr | None = None,
    read_only: bool = False,
) -> WSGIApplication:
    """The guarded dashboard of the studies in `storage`, to be served at `host`.

    Raises DashboardError if `host` is not an address of this machine alone and there is no password.
    """
    local = is_loopback(host)
    if not local and password is None:
        raise DashboardError(
            f"--host {host} lets other machines in, and there is no password: set TRIALYARD_DASHBOARD_PASSWORD or "
            "TRIALYARD_DASHBOARD_PASSWORD_FILE, or leave --host out to serve this machine alone"
        )
    if read_only:
        # A second barrier behind the guard: even a GET that writes, in a later version, could not change anything.
        forbid_writing(storage)
    return guarded(pages(storage, artifact_folder), local=local, password=password, read_only=read_only)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`: a loopback address, or ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(app: WSGIApplication, host: str, port: int, on_listening: Callable[[list[str]], None]) -> None:
    """Serves `app` until SIGTERM or Ctrl-C. `on_listening` gets its addresses once it listens; port 0 is any free port.

    Raises DashboardError if it cannot listen at this address. Call it from the main thread.
    """
    try:
        server = waitress.create_server(
            app, host=host, port=port, threads=THREADS, ident=None, max_request_body_size=MAX_BODY
        )
    except (OSError, ValueError) as error:
        raise DashboardError(
            f"the dashboard cannot listen at {host}:{port} ({getattr(error, 'strerror', None) or error}): choose "
            "another --port, or an address of this machine with --host"
        ) from error
    single = hasattr(server, "effective_host")  # a server with several sockets has `effective_listen` instead
    listening = [(server.effective_host, server.effective_port)] if single else server.effective_listen
    with _exit_on_signals():
        on_listening([f"http://{f'[{name}]' if ':' in name else name}:{number}" for name, number in listening])
        server.run()  # on SystemExit waitress ends its threads and returns
    server.close()


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the guard --------------------------------------------------------------------------------------------


def guarded(app: WSGIApplication, *, local: bool, password: SecretStr | None, read_only: bool) -> WSGIApplication:
    """`app` behind the guard: only allowed requests reach it.

    With a `password`, HTTP Basic asks for it, with any user name. The browser has the dialog, so no login page or
    session can be forged or stolen. After too many wrong passwords an address gets 429 for a while, whatever
    it sends. Browsers that sent the right password before are exempt; their cookie gives no access by itself. `local`
    means that the server listens on this machine alone.
    """
    # Digests have one length, so comparing them does not even reveal the password's length.
    expected = None if password is None else _digest(password.get_secret_value().encode())
    throttle, trusted = LoginThrottle(), secrets.token_urlsafe()

    def guard(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        # The application never sees the password, so it cannot log it.
        given = environ.pop("HTTP_AUTHORIZATION", "")
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # the package raises KeyError without it
        if local and not _names_this_machine(environ.get("HTTP_HOST", "")):
            # DNS rebinding: a foreign site whose name resolves to 127.0.0.1 could read and write as its own page.
            return _refused(start, "403 Forbidden", "open the dashboard as localhost or 127.0.0.1")
        address = environ.get("REMOTE_ADDR", "")
        untrusted = expected is not None and not hmac.compare_digest(
            _trusted_cookie(environ.pop("HTTP_COOKIE", "")), trusted
        )
        if untrusted and given and (seconds := throttle.retry_after(address)):
            retry_after = ("Retry-After", str(seconds))
            return _refused(start, "429 Too Many Requests", f"too many wrong passwords: wait {seconds} s", retry_after)
        if expected is not None and not hmac.compare_digest(_digest(_password_in(given)), expected):
            if given:
                log.warning("a wrong password came from %s", address)
                throttle.record_failure(address)
            challenge = ("WWW-Authenticate", 'Basic realm="Trialyard", charset="UTF-8"')
            return _refused(start, "401 Unauthorized", "the password is needed, with any user name", challenge)
        if environ["REQUEST_METHOD"] not in SAFE_METHODS:
            if read_only:
                return _refused(start, "403 Forbidden", "this dashboard is read-only")
            if not _from_own_page(environ):
                return _refused(start, "403 Forbidden", "another site's page may not change anything here")

        def start_with_headers(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            # The package allows every site to read artifacts.
            kept = [header for header in headers if header[0].lower() != "access-control-allow-origin"]
            if environ["PATH_INFO"].startswith("/artifacts/"):
                # A user's file must not run as a page of this server.
                kept.append(("Content-Security-Policy", "sandbox"))
            if untrusted:
                kept.append(("Set-Cookie", f"{TRUSTED_COOKIE}={trusted}; Path=/; HttpOnly; SameSite=Strict"))
            return start(status, [*kept, *HEADERS], *error)

        return app(environ, start_with_headers)

    return guard


class LoginThrottle:
    """Slows down guessing: an address may send TRIES wrong passwords at once, then one every TRY_SECONDS.

    Only wrong passwords count. The counts are in memory: a restart clears them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # requests are answered by several threads
        self._until: dict[str, float] = {}  # when the count is back at zero, by `time.monotonic`

    def retry_after(self, address: str) -> int:
        """Whole seconds until `address` may try again; 0: now."""
        with self._lock:
            seconds = self._until.get(_network(address), 0.0) - time.monotonic()
        return max(0, math.ceil(seconds - (TRIES - 1) * TRY_SECONDS))

    def record_failure(self, address: str) -> None:
        """Counts a wrong password."""
        now, network = time.monotonic(), _network(address)
        with self._lock:
            if len(self._until) >= ADDRESSES:
                self._until = {key: until for key, until in self._until.items() if until > now}
            self._until[network] = max(now, self._until.pop(network, now)) + TRY_SECONDS
            if len(self._until) > ADDRESSES:
                del self._until[next(iter(self._until))]


def _network(address: str) -> str:
    # One IPv6 host usually has a whole /64 network, which is 2**64 addresses.
    try:
        return str(ipaddress.ip_network((address, 64), strict=False)) if ":" in address else address
    except ValueError:
        return address


def _trusted_cookie(cookies: str) -> str:
    match = re.search(rf"(?:^|;) *{TRUSTED_COOKIE}=([\w-]*)", cookies, re.ASCII)
    return match[1] if match else ""


def _digest(password: bytes) -> bytes:
    return hashlib.sha256(password).digest()


def _password_in(header: str) -> bytes:
    scheme, _, coded = header.partition(" ")
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(coded.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _names_this_machine(host: str) -> bool:
    # The port does not matter: a tunnel may use another one at its far end.
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _from_own_page(environ: WSGIEnvironment) -> bool:
    """Whether a request that changes something comes from our own page, or from no page at all.

    Every browser sends at least one of these three headers with such a request. A request without them comes from a
    program, which a foreign page cannot control. `Sec-Fetch-Site` goes first, because a proxy that ends TLS changes
    `Host`.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return bool(site == "same-origin")
    for header in ("HTTP_ORIGIN", "HTTP_REFERER"):
        if header in environ:
            try:
                return bool(urlsplit(environ[header]).netloc == environ.get("HTTP_HOST", ""))
            except ValueError:
                return False
    return True


def _refused(start: StartResponse, status: str, reason: str, *headers: tuple[str, str]) -> list[bytes]:
    # The page shows `reason` to its user.
    body = json.dumps({"reason": reason}).encode()
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers, *HEADERS])
    return [body]


# --- the pages --------------------------------------------------------------------------------------------


def pages(storage: PatientStorage, artifact_folder: Path) -> Any:
    """optuna-dashboard's application (a `bottle.Bottle`) on `storage`, without the guard."""
    cached = RememberingStorage(storage)
    app = optuna_dashboard.wsgi(cached, artifact_store=TrialFiles(storage, artifact_folder))
    for route in app.routes:
        if (route.method, route.rule) == DETAIL:
            route.callback = json_api_view(StudyDetail(cached, artifact_folder, route.callback).answer)
            route.reset()
        if (route.method, route.rule) == RENAME:
            route.callback = json_api_view(_refuse_rename)
            route.reset()
    return app


def _refuse_rename(study_id: int) -> NoReturn:
    # The package copies the trials to a new study. Workers, files, plots and budget would stay with the old name.
    raise HTTPError(403, "workers and files use the study's name: create another study with --name")


class RememberingStorage(_CachedStorage):
    """Optuna's cached storage, which reads a finished trial once, made safe for a process that runs for weeks."""

    def __init__(self, backend: PatientStorage) -> None:
        super().__init__(backend)
        self.backend = backend
        self._reading = threading.Lock()
        self._last: dict[int, tuple[int, Any]] = {}  # by study: the last trial that is remembered, and its row

    def delete_study(self, study_id: int) -> None:
        """As Optuna, but the deletion is recorded, so that the study's files may go, too."""
        claims.announce_deletion(self.backend, study_id)
        super().delete_study(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies, without their plots and notes, which the list of studies does not show."""

        def work(connection: Connection) -> list[FrozenStudy]:
            directions: dict[int, list[StudyDirection]] = {}
            columns = select(StudyDirectionModel.study_id, StudyDirectionModel.direction)
            for study_id, direction in connection.execute(columns.order_by(StudyDirectionModel.objective)):
                directions.setdefault(study_id, []).append(direction)
            attributes: list[dict[int, dict[str, Any]]] = []
            for model in (StudyUserAttributeModel, StudySystemAttributeModel):
                by_study: dict[int, dict[str, Any]] = {}
                query = select(model.study_id, model.key, model.value_json).where(model.key.not_like("dashboard:%"))
                for study_id, key, value in connection.execute(query.order_by(*model.__table__.primary_key)):
                    by_study.setdefault(study_id, {})[key] = json.loads(value)
                attributes.append(by_study)
            return [
                FrozenStudy(
                    study_name=name,
                    direction=None,
                    directions=directions.get(study_id, []),
                    user_attrs=attributes[0].get(study_id, {}),
                    system_attrs=attributes[1].get(study_id, {}),
                    study_id=study_id,
                )
                for study_id, name in connection.execute(
                    select(StudyModel.study_id, StudyModel.study_name).order_by(StudyModel.study_id)
                )
            ]

        return read(self.backend, work)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """All trials of a study, by number. Trials that had finished at the last call are not read again."""
        with self._reading:
            last = self._last.get(study_id)
            # SQLite uses the ids of a deleted study and of its trials again.
            if last is None or self._row(last[0]) != last[1]:
                self._forget(study_id)
            trials = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
            newest = self._studies[study_id].last_finished_trial_id
            if newest >= 0 and (last is None or last[0] != newest or study_id not in self._last):
                self._last[study_id] = (newest, self._row(newest))
            return trials

    def _row(self, trial_id: int) -> Any:
        columns = (TrialModel.study_id, TrialModel.number, TrialModel._datetime_complete_utc)
        query = select(*columns).where(TrialModel.trial_id == trial_id)
        return read(self.backend, lambda connection: connection.execute(query).first())

    def _forget(self, study_id: int) -> None:
        self._last.pop(study_id, None)
        with self._lock:
            study = self._studies.pop(study_id, None)
            for number in study.trials if study is not None else ():
                trial_id = self._study_id_and_number_to_trial_id.pop((study_id, number))
                self._trial_id_to_study_id_and_number.pop(trial_id, None)


@dataclass(kw_only=True)
class _Seen:
    """What is remembered of a study from one poll to the next."""

    space: Any = field(default_factory=_CachedExtraStudyProperty)  # search spaces and attribute names of all trials
    settled: int = 0  # how many trials, from the first on, are finished and included in `space`
    last: FrozenTrial | None = None  # the last of them
    # By trial id: the trial, its attributes as stored, the path of its model if it offers one (retention may remove it
    # later), and the JSON of all this.
    lines: dict[int, tuple[FrozenTrial, list[tuple[str, str]], Path | None, bytes]] = field(default_factory=dict)


class StudyDetail:
    """The answer for a study's page: the package's own JSON, built once for each finished trial.

    The package reads all attributes of all studies for each poll, and searches all of a study's for each trial's note.
    With 10,000 trials that have notes this takes minutes (optuna-dashboard 0.21).
    """

    def __init__(self, storage: RememberingStorage, artifact_folder: Path, stock: Callable[[int], Any]) -> None:
        self._storage, self._folder, self._stock = storage, artifact_folder, stock
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()

    def answer(self, study_id: int) -> Any:
        """The body of ``GET /api/studies/<id>?after=<number>``."""
        after = request.params.get("after", "0")
        study, of_trials = self._study(study_id)
        if (
            study is None
            or len(study.directions) != 1
            or study.system_attrs.get(PREFERENTIAL, False)
            or not (after.isascii() and after.isdecimal())
        ):
            return self._stock(study_id)
        trials = self._storage.get_all_trials(study_id, deepcopy=False)
        with self._lock:
            seen = self._update_seen(study_id, trials)
            lines = [self._line(study, trial, of_trials, seen) for trial in trials[int(after) :]]
            best = [self._line(study, trial, of_trials, seen) for trial in _best(trials, study.directions[0])]
            detail = serialize_study_detail(
                study,
                [],
                [],
                seen.space.intersection_search_space,
                seen.space.union_search_space,
                seen.space.union_user_attrs,
                seen.space.has_intermediate_values,
                get_plotly_graph_objects(study.system_attrs),
                [],
            )
        del detail["trials"], detail["best_trials"]
        rest = json.dumps(detail).encode()
        body = b'{"trials": [%b], "best_trials": [%b], %b' % (b", ".join(lines), b", ".join(best), rest[1:])
        return _compressed(body)

    def _study(self, study_id: int) -> tuple[FrozenStudy | None, dict[int, list[tuple[str, str]]]]:
        """The study without its trials' attributes; and the trials' attributes by trial id, as stored."""

        def work(connection: Connection) -> tuple[Any, list[StudyDirection], list[tuple[str, str]], list[Any]]:
            def attributes(model: Any) -> list[Any]:
                query = select(model.key, model.value_json).where(model.study_id == study_id)
                return [tuple(row) for row in connection.execute(query.order_by(*model.__table__.primary_key))]

            directions = (
                select(StudyDirectionModel.direction)
                .where(StudyDirectionModel.study_id == study_id)
                .order_by(StudyDirectionModel.objective)
            )
            return (
                connection.execute(select(StudyModel.study_name).where(StudyModel.study_id == study_id)).scalar(),
                list(connection.execute(directions).scalars()),
                attributes(StudyUserAttributeModel),
                attributes(StudySystemAttributeModel),
            )

        name, directions, user, system = read(self._storage.backend, work)
        of_trials: dict[int, list[tuple[str, str]]] = {}
        of_study: dict[str, Any] = {}
        for key, value in system:
            trial = OF_A_TRIAL.match(key)
            if trial is None:
                of_study[key] = json.loads(value)
            else:
                of_trials.setdefault(int(trial[1]), []).append((key, value))
        if name is None:
            return None, {}
        study = FrozenStudy(
            study_name=name,
            direction=None,
            directions=directions,
            user_attrs={key: json.loads(value) for key, value in user},
            system_attrs=of_study,
            study_id=study_id,
        )
        return study, of_trials

    def _update_seen(self, study_id: int, trials: list[FrozenTrial]) -> _Seen:
        seen = self._seen.setdefault(study_id, _Seen())
        if seen.settled and (len(trials) < seen.settled or trials[seen.settled - 1] is not seen.last):
            seen = self._seen[study_id] = _Seen()  # another study has its id
        # Only new trials: if all are finished, the package would go through all of them each time.
        seen.space.update(trials[seen.settled :])
        while seen.settled < len(trials) and trials[seen.settled].state.is_finished():
            seen.last = trials[seen.settled]
            seen.settled += 1
        return seen

    def _line(
        self, study: FrozenStudy, trial: FrozenTrial, of_trials: dict[int, list[tuple[str, str]]], seen: _Seen
    ) -> bytes:
        own = of_trials.get(trial._trial_id, [])
        known = seen.lines.get(trial._trial_id)
        # The cache returns the same object for the same finished trial. Only its note may change.
        if known is not None and known[0] is trial and known[1] == own and (known[2] is None or known[2].is_file()):
            return known[3]
        attributes = {key: json.loads(value) for key, value in own}
        serialized: dict[str, Any] = serialize_frozen_trial(study._study_id, trial, attributes)
        model = self._offered_model(trial, serialized)
        if model is not None and not model.is_file():
            others = [artifact for artifact in serialized["artifacts"] if artifact["filename"] != artifacts.MODEL]
            serialized["artifacts"] = others
            model = None
        line = json.dumps(serialized).encode()
        if trial.state.is_finished():
            seen.lines[trial._trial_id] = (trial, own, model, line)
        return line

    def _offered_model(self, trial: FrozenTrial, serialized: dict[str, Any]) -> Path | None:
        """The path of the model that the page would offer for download; None if it offers none."""
        below = trial.user_attrs.get("model")
        offered = any(artifact["filename"] == artifacts.MODEL for artifact in serialized["artifacts"])
        return artifacts.inside(self._folder, below) if offered else None


def _best(trials: list[FrozenTrial], direction: StudyDirection) -> list[FrozenTrial]:
    """The best complete and feasible trial as in `studies.best_trial`; empty if there is none."""
    sign = 1 if direction == StudyDirection.MAXIMIZE else -1
    complete = [trial for trial in trials if is_scored(trial) and findings.is_feasible(trial)]
    return [max(complete, key=lambda trial: (sign * trial.values[0], -trial.number))] if complete else []


def _compressed(body: bytes) -> bytes:
    if len(body) < GZIP_FROM or "gzip" not in request.headers.get("Accept-Encoding", ""):
        return body
    response.set_header("Content-Encoding", "gzip")
    response.set_header("Vary", "Accept-Encoding")
    return gzip.compress(body, compresslevel=1)


# --- artifacts --------------------------------------------------------------------------------------------


class TrialFiles:
    """A read-only artifact store over the trials' files, for the metadata that Optuna keeps.

    An artifact is a file of an attempt at the trial that registered its id (`artifacts.attempt_folder`), or
    ``<folder>/<id>`` as Optuna's own ``FileSystemArtifactStore`` writes it.
    """

    def __init__(self, storage: PatientStorage, folder: Path) -> None:
        self._storage, self._folder = storage, folder

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's bytes. Answers 404 if the file was removed: most trials keep no model."""
        for path in self._paths(artifact_id):
            if path.resolve().is_relative_to(self._folder.resolve()) and path.is_file():
                return path.open("rb")
        raise HTTPError(404, "this file was removed, or is on another machine")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refused with 403: a trial's files are written by its worker."""
        raise HTTPError(403, "files cannot be uploaded here: a trial's files are written by its worker")

    def remove(self, artifact_id: str) -> None:
        """Does nothing: ``trialyard storage prune`` removes files that no trial needs."""

    def _named(self, trial_id: int) -> list[str]:
        attrs = self._storage.get_trial(trial_id).user_attrs
        paths = (attrs.get(key) for key in ("model", "history"))
        return [str(path) for path in paths if artifacts.inside(self._folder, path) is not None]

    def _paths(self, artifact_id: str) -> Iterator[Path]:
        key = f"artifacts:{artifact_id}"

        def work(connection: Connection) -> list[Any]:
            owner = (
                select(StudyModel.study_id, StudyModel.study_name, TrialModel.number, TrialModel.trial_id)
                .add_columns(TrialSystemAttributeModel.value_json)
                .where(TrialSystemAttributeModel.key == key)
                .where(TrialModel.trial_id == TrialSystemAttributeModel.trial_id)
                .where(StudyModel.study_id == TrialModel.study_id)
            )
            return [
                (row, of_study(connection, row[0], "incarnation"), of_trial(connection, row[3]))
                for row in connection.execute(owner).all()
            ]

        for (_, study, number, trial_id, stored), incarnation, attempts in read(self._storage, work):
            if (name := (json.loads(json.loads(stored)) or {}).get("filename", "")) != Path(name).name or not name:
                continue
            own = [attempt.attempt for attempt in attempts] if incarnation else []
            folders = [artifacts.attempt_folder(study, incarnation, number, attempt) for attempt in own]
            folders.append(PurePosixPath(study, str(number)))  # as older versions had it
            folders += [PurePosixPath(path).parent for path in self._named(trial_id)]  # as a copy of a study has them
            for folder in folders:
                # The id says which of them: it follows from the path. Others' artifacts have random ids.
                if artifacts.listing(folder / name)[0] == key:
                    yield self._folder / folder / name
        yield self._folder / artifact_id
