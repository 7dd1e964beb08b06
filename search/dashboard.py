"""optuna-dashboard's own pages behind our guard, on storage that remembers finished trials.

The guard (`search.guard`) is in front of the whole application. Two answers are ours. The study that a page polls again
and again: the package's own work for it grows with the notes of all trials. In ours the study's attributes have titles
for people. And the importances of hyperparameters: the package shows them also where chance alone would give them.
"""

import copy
import gzip
import json
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, BinaryIO, NoReturn
from wsgiref.types import WSGIApplication

import optuna_dashboard
import waitress
from bottle import HTTPError, request, response
from optuna.storages import BaseStorage
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
from search.guard import guarded, is_loopback
from storage import artifact_store, artifacts, claims
from storage.artifact_store import ArtifactStore
from storage.attempt_table import of_trial
from storage.attributes import decoded, of_study
from storage.errors import ObjectStoreError, SettingsError
from storage.ranking import is_feasible, is_scored, rank_key
from storage.tables import (
    StudyDirectionModel,
    StudyModel,
    StudySystemAttributeModel,
    StudyUserAttributeModel,
    TrialModel,
    TrialSystemAttributeModel,
)
from storage.transactions import PatientStorage, forbid_writing, read
from studies import importance, notes
from studies.attribute_texts import for_people

log = logging.getLogger(__name__)

FORGET_SECONDS = 60.0  # between two looks for studies that were deleted
THREADS = 8
MAX_BODY = 10 * 2**20  # bytes; the largest thing that the page sends is a note
GZIP_FROM = 2**16  # bytes: below this, compressing costs more than it saves
DETAIL = ("GET", "/api/studies/<study_id:int>")
RENAME = ("POST", "/api/studies/<study_id:int>/rename")
IMPORTANCES = ("GET", "/api/studies/<study_id:int>/param_importances")
NO_IMPORTANCES = "none: chance could give them"
# What the package raises where a system attribute, which any program may write, has another shape than its own.
UNREADABLE = (TypeError, ValueError, KeyError, AttributeError)
PREFERENTIAL = "preference:is_preferential"

# The package keeps each trial's note and old artifacts among the study's attributes, under the trial's id.
OF_A_TRIAL = re.compile(r"dashboard:(?:artifacts:)?(\d+):")


def application(
    storage: PatientStorage,
    artifacts_at: ArtifactStore | Path,
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
    return guarded(pages(storage, artifacts_at), local=local, password=password, read_only=read_only)


def serve(app: WSGIApplication, host: str, port: int, on_listening: Callable[[list[str]], None]) -> None:
    """Serves `app` until SIGTERM or Ctrl-C. `on_listening` gets its addresses once it listens; port 0 is any free port.

    Raises DashboardError if it cannot listen at this address. Call it from the main thread.
    """
    # On a busy machine requests wait for a moment. It warns of each of them, and nobody can do anything about it.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
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


def pages(storage: PatientStorage, artifacts_at: ArtifactStore | Path) -> Any:
    """optuna-dashboard's application (a `bottle.Bottle`) on `storage`, without the guard."""
    cached, store = RememberingStorage(storage), artifact_store.of(artifacts_at)
    app = optuna_dashboard.wsgi(cached, artifact_store=TrialFiles(storage, store))
    for route in app.routes:
        if (route.method, route.rule) == DETAIL:
            route.callback = json_api_view(StudyDetail(cached, store, route.callback).answer)
            route.reset()
        if (route.method, route.rule) == IMPORTANCES:
            route.callback = json_api_view(Importances(cached, route.callback).answer)
            route.reset()
        if (route.method, route.rule) == RENAME:
            route.callback = json_api_view(_refuse_rename)
            route.reset()
    return app


def _refuse_rename(study_id: int) -> NoReturn:
    # The package copies the trials to a new study. Workers, files, plots and budget would stay with the old name.
    raise HTTPError(403, "workers and files use the study's name: create another study with --name")


class Importances:
    """The importances that a study's page shows if they are more than chance, as in our report.

    The package's own leave pruned trials out, and show shares for any two trials.
    """

    def __init__(self, storage: BaseStorage, stock: Callable[[int], Any]) -> None:
        self._storage, self._stock = storage, stock

    def answer(self, study_id: int) -> Any:
        """The body of ``GET /api/studies/<id>/param_importances``."""
        try:
            directions = self._storage.get_study_directions(study_id)
        except KeyError:
            return self._stock(study_id)
        if len(directions) != 1 or directions[0] != StudyDirection.MAXIMIZE:
            return self._stock(study_id)
        trials = self._storage.get_all_trials(study_id, deepcopy=False)
        shares = importance.importances(trials) if importance.is_significant(trials) else {}
        kinds = {name: type(kind).__name__ for trial in trials for name, kind in trial.distributions.items()}
        rows = [{"name": name, "importance": share, "distribution": kinds[name]} for name, share in shares.items()]
        if not rows and kinds:
            # The page has no room for a reason but the name of a bar, which here has no length.
            rows = [{"name": NO_IMPORTANCES, "importance": 0.0, "distribution": next(iter(kinds.values()))}]
        return {"param_importances": [rows]}


class RememberingStorage(_CachedStorage):
    """Optuna's cached storage, which reads a finished trial once, made safe for a process that runs for weeks."""

    def __init__(self, backend: PatientStorage) -> None:
        super().__init__(backend)
        self.backend = backend
        self._reading = threading.Lock()
        self._last: dict[int, tuple[int, Any]] = {}  # by study: the last trial that is remembered, and its row

    def delete_study(self, study_id: int) -> None:
        """As Optuna, also while workers record epochs; the deletion is recorded, so that the study's files may go."""
        is_gone = claims.delete_at_once(self.backend, study_id)
        with suppress(KeyError) if is_gone else nullcontext():
            super().delete_study(study_id)  # which forgets it, too

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
                    by_study.setdefault(study_id, {})[key] = decoded(value)
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

    def forget_all_but(self, existing: Collection[int]) -> None:
        """Drops what is remembered of studies that are not among the `existing` ones."""
        with self._reading:
            for study_id in self._studies.keys() - set(existing):
                self._forget(study_id)

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
    lines: dict[int, tuple[FrozenTrial, list[tuple[str, str]], PurePosixPath | None, bytes]] = field(
        default_factory=dict
    )


class StudyDetail:
    """The answer for a study's page: the package's own JSON, built once for each finished trial.

    The package reads all attributes of all studies for each poll, and searches all of a study's for each trial's note.
    With 10,000 trials that have notes this takes minutes (optuna-dashboard 0.21).
    """

    def __init__(self, storage: RememberingStorage, store: ArtifactStore, stock: Callable[[int], Any]) -> None:
        self._storage, self._store, self._stock = storage, store, stock
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()
        self._forget_at = 0.0  # when to look for deleted studies again, by the monotonic clock

    def answer(self, study_id: int) -> Any:
        """The body of ``GET /api/studies/<id>?after=<number>``."""
        after = request.params.get("after", "0")
        self._forget_deleted()
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
            try:
                detail = _detail(study, seen)
            except UNREADABLE as error:
                _warn_of_attributes(f"study {study.study_name}", error)
                study.system_attrs = {}
                detail = _detail(study, seen)
        del detail["trials"], detail["best_trials"]
        rest = json.dumps(detail).encode()
        body = b'{"trials": [%b], "best_trials": [%b], %b' % (b", ".join(lines), b", ".join(best), rest[1:])
        return _compressed(body)

    def _forget_deleted(self) -> None:
        """Drops what is remembered of studies that were deleted since: a large one takes hundreds of MB."""
        now = time.monotonic()
        with self._lock:
            if now < self._forget_at:
                return
            self._forget_at = now + FORGET_SECONDS
        query = select(StudyModel.study_id)
        existing = set(read(self._storage.backend, lambda connection: connection.execute(query).scalars().all()))
        with self._lock:
            for study_id in self._seen.keys() - existing:
                del self._seen[study_id]
        self._storage.forget_all_but(existing)

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
                of_study[key] = decoded(value)
            else:
                of_trials.setdefault(int(trial[1]), []).append((key, value))
        if name is None:
            return None, {}
        study = FrozenStudy(
            study_name=name,
            direction=None,
            directions=directions,
            user_attrs=for_people({key: decoded(value) for key, value in user}, _found(of_study)),
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
        if (
            known is not None
            and known[0] is trial
            and known[1] == own
            and (known[2] is None or self._exists(trial, known[2]))
        ):
            return known[3]
        attributes = {key: decoded(value) for key, value in own}
        try:
            serialized: dict[str, Any] = serialize_frozen_trial(study._study_id, trial, attributes)
        except UNREADABLE as error:
            _warn_of_attributes(f"study {study.study_name}: trial {trial.number}", error)
            # A copy: samplers read the fixed parameters of the original.
            without = copy.copy(trial)
            without._system_attrs = {}
            serialized = serialize_frozen_trial(study._study_id, without, {})
        serialized["artifacts"] = [artifact for artifact in serialized["artifacts"] if _is_file(artifact)]
        model = self._offered_model(trial, serialized)
        if model is not None and not self._exists(trial, model):
            removed = (artifacts.MODEL, *artifacts.WITH_MODEL)
            others = [artifact for artifact in serialized["artifacts"] if artifact["filename"] not in removed]
            serialized["artifacts"] = others
            model = None
        line = json.dumps(serialized).encode()
        if trial.state.is_finished():
            seen.lines[trial._trial_id] = (trial, own, model, line)
        return line

    def _exists(self, trial: FrozenTrial, model: PurePosixPath) -> bool:
        """Whether the model of a trial still exists. Of one in an object store the database knows: that is faster."""
        if not self._store.is_far:
            return bool(self._store.existing([model]))
        stored = TrialSystemAttributeModel
        entry = select(stored.key).where(stored.trial_id == trial._trial_id, stored.key == artifacts.listing(model)[0])
        return read(self._storage.backend, lambda connection: connection.execute(entry).first() is not None)

    def _offered_model(self, trial: FrozenTrial, serialized: dict[str, Any]) -> PurePosixPath | None:
        """The path of the model that the page would offer for download; None if it offers none."""
        below = trial.user_attrs.get("model")
        offered = any(artifact["filename"] == artifacts.MODEL for artifact in serialized["artifacts"])
        return PurePosixPath(str(below)) if offered and artifacts.inside(Path(), below) is not None else None


def _found(system_attrs: dict[str, Any]) -> list[str]:
    sentences = system_attrs.get(notes.FOUND)
    return [str(sentence) for sentence in sentences] if isinstance(sentences, list) else []


def _detail(study: FrozenStudy, seen: _Seen) -> dict[str, Any]:
    """The package's answer for the study, without its trials."""
    detail: dict[str, Any] = serialize_study_detail(
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
    return detail


def _is_file(artifact: Any) -> bool:
    """Whether it describes a file as the page needs it."""
    return isinstance(artifact, dict) and isinstance(artifact.get("filename"), str)


def _warn_of_attributes(of: str, error: Exception) -> None:
    log.warning(
        "%s is shown without notes, figures and files: another program stored a system attribute of another shape "
        "than optuna-dashboard's (%s: %s)",
        *(of, type(error).__name__, error),
    )


def _best(trials: list[FrozenTrial], direction: StudyDirection) -> list[FrozenTrial]:
    """The best complete and feasible trial as in `studies.best_trial`; empty if there is none."""
    complete = [trial for trial in trials if is_scored(trial) and is_feasible(trial)]
    # Ours maximize; another program's may not.
    key = rank_key if direction == StudyDirection.MAXIMIZE else lambda trial: (trial.values[0], trial.number)
    return [min(complete, key=key)] if complete else []


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

    def __init__(self, storage: PatientStorage, store: ArtifactStore) -> None:
        self._storage, self._store = storage, store

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's bytes. Answers 404 if the file was removed: most trials keep no model."""
        for path in self._paths(artifact_id):
            try:
                opened = self._store.open(path)
            except (ObjectStoreError, SettingsError) as error:
                raise HTTPError(503, str(error)) from error
            if opened is not None:
                return opened
        raise HTTPError(404, "this file was removed, or is on another machine")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refused with 403: a trial's files are written by its worker."""
        raise HTTPError(403, "files cannot be uploaded here: a trial's files are written by its worker")

    def remove(self, artifact_id: str) -> None:
        """Does nothing: ``trialyard storage prune`` removes files that no trial needs."""

    def _named(self, trial_id: int) -> list[str]:
        attrs = self._storage.get_trial(trial_id).user_attrs
        paths = (attrs.get(key) for key in ("model", "history"))
        return [str(path) for path in paths if artifacts.inside(Path(), path) is not None]

    def _paths(self, artifact_id: str) -> Iterator[PurePosixPath]:
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
                    yield folder / name
        yield PurePosixPath(artifact_id)
