"""Notes and figures for optuna-dashboard, written into the study while workers run its trials.

A plain optuna-dashboard shows them. It reads the notes and figures from system attributes of the study, also the notes
of trials, and splits each into pieces for databases with short columns. Our databases have long ones. For each page it
searches all attributes for each trial, so we write each note and figure as one piece, and limit how many trials have a
note. All are written in one transaction, so that nobody reads half a figure.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, delete, insert, or_, select

from storage import artifact_store, ledger
from storage.artifact_store import ArtifactStore
from storage.artifacts import SUMMARY, inside
from storage.owners import database_now
from storage.tables import IDS_IN_CLAUSE, StudySystemAttributeModel, dashboard_note_prefix, dashboard_plot_prefix
from storage.transactions import read, write
from studies import confirmation, findings, notebook, registry, results, text
from studies.content import Content, of_trials
from studies.definition import Definition
from studies.predictions import Answered
from studies.registry import StorageLike

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0  # between two publications of a study by any workers
SHARE = 0.05  # of the time: how much publishing a large study may take
BEST_WITH_NOTE, LATEST_WITH_NOTE = 50, 250  # trials

# The kinds of figures that are published. The dashboard's page asks for all of them every few seconds, and has its own
# of the hyperparameters.
FIGURES = ("confirmed", "learning-curves", "confusion", "classes", "dropout", "cost", "progress", "notebook")
MOST_CLASSES = 50  # of a confusion matrix that is published: with 200 it has 0.7 MB
# Databases have this text. Changing it would make the notes of earlier versions look like a user's own.
MARK = "*Written by Trialyard, and anew as trials end: what you write above this line stays.*"
FOUND = "trialyard:found"  # system attribute: what was found, a sentence each
STATE = "trialyard:published"  # system attribute: what was published last, and when


@dataclass(frozen=True, kw_only=True)
class _Published:
    at: str  # by the database's clock, UTC
    finished: int = -1  # trials
    state: str = ""  # of the study
    seconds: float = 0.0  # how long it took


def publish(
    name: str,
    storage: RDBStorage,
    artifacts: ArtifactStore | Path,
    cached: BaseStorage,
    *,
    last: bool = False,
    force: bool = False,
) -> bool:
    """Writes the notes and figures of study `name`, unless they are up to date or were written a moment ago.

    `cached` is the same storage with Optuna's cache of finished trials. `last` ignores the pause, because this worker
    ends; but not while trials run elsewhere, whose workers write them again: a hundred that end together would each
    draw all figures. `force` writes them even if nothing in the study has changed.
    Returns whether the notes and figures in the database are up to date, as far as this caller knows.
    """
    study = registry.find(name, storage)
    last = last and study.running == 0
    lock = f"{name} (notes)"  # a lock of its own: a claim must not wait for it
    # Most often it is not its turn: a hundred workers would wait for the lock, each with its only connection.
    if not force and not read(storage, lambda connection: _is_turn(connection, study, last)):
        return _is_current(storage, study)
    if not write(storage, lock, lambda connection: _take_turn(connection, study, last)) and not force:
        return _is_current(storage, study)
    drawn = _drawn(study, storage, artifacts, cached)
    is_current = write(storage, lock, lambda connection: _write(connection, study, drawn))
    if drawn.content.counts.finished >= drawn.content.budget:
        _publish_related(drawn.content.definition, storage, artifacts)
    return is_current


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What is to be published of a study, as of one moment."""

    began: float  # by the monotonic clock
    content: Content
    of_study: dict[str, str]  # attributes of the dashboard: figures, and the note
    of_trials: dict[str, str]  # notes of trials that have none yet, by their keys
    keep: frozenset[str]  # the keys of all trials' notes that stay


def _drawn(study: ledger.Study, storage: RDBStorage, artifacts: ArtifactStore | Path, cached: BaseStorage) -> _Drawn:
    # Plotly takes a moment to import, which no command should spend that draws nothing.
    from studies import figures

    began = time.monotonic()
    trials = cached.get_all_trials(study.id, deepcopy=False)
    content = replace(of_trials(study, trials, storage), confirmed=confirmation.last_of(study, storage))
    definition = content.definition
    subject = figures.Subject(
        trials=trials,
        definition=definition,
        curves=results.curves_of(trials, artifacts, figures.CURVES),
        replays=notebook.replays(definition, storage),
        confirmed=content.confirmed,
        answered=figures.best_answers(trials, artifacts, content.class_names),
    )
    plots = figures.all_figures(subject, _kinds(subject.answered))
    of_study = {f"{dashboard_plot_prefix()}{name}:": figure.to_json() for name, figure in plots.items()}
    by_note_key = {dashboard_note_prefix(trial._trial_id): trial for trial in _trials_with_note(trials)}

    # Before the transaction that writes: an object store may be slow.
    histories = [trial.user_attrs.get("history") for trial in by_note_key.values()]
    artifact_store.of(artifacts).fetch_all([*histories, *filter(None, map(_summary_of, histories))])
    stored = read(storage, lambda connection: _stored(connection, study.id))
    return _Drawn(
        began=began,
        content=content,
        of_study=of_study | {dashboard_note_prefix(None): text.note(content)},
        of_trials={
            key: text.trial_note(trial, definition, results.curves_of([trial], artifacts), _summary(trial, artifacts))
            for key, trial in by_note_key.items()
            if not _has_note(stored, key)
        },
        keep=frozenset(by_note_key),
    )


def _write(connection: Connection, study: ledger.Study, drawn: _Drawn) -> bool:
    """Writes what was `drawn`, unless another worker has published newer results meanwhile; returns whether it did."""
    stored = _stored(connection, study.id)
    published, finished = _published(stored), drawn.content.counts.finished
    if published is not None and published.finished > finished:
        return False
    # The note of a finished trial never changes.
    notes = {key: note for key, note in drawn.of_trials.items() if not _has_note(stored, key)}
    changes = _changes(stored, drawn.of_study | notes, keep=drawn.keep)
    now, spent = _published_at(connection), round(time.monotonic() - drawn.began, 3)
    changes[FOUND] = [*drawn.content.findings.best]
    changes[STATE] = asdict(_Published(at=now, finished=finished, state=study.state, seconds=spent))
    _apply(connection, study.id, changes)
    return True


def _publish_related(definition: Definition, storage: RDBStorage, artifacts: ArtifactStore | Path) -> None:
    """Renews the notes of the studies that show the result of the one with this `definition`, which has ended."""
    shown_by = []
    if notebook.reference_results(definition):
        shown_by.append(notebook.NAME)  # the imported study also shows the replays
    if definition.confirm is not None:
        shown_by.append(definition.confirm.study)
    names = registry.names(storage) if shown_by else ()
    for name in shown_by:
        if name in names:
            publish(name, storage, artifacts, optuna.storages.get_storage(storage), force=True)


def _kinds(answered: Answered | None) -> list[str]:
    """The kinds of figures to publish. The page asks again and again for a matrix that grows with classes²."""
    is_large = answered is not None and len(answered.predictions.counts) > MOST_CLASSES
    return [kind for kind in FIGURES if not (is_large and kind == "confusion")]


def publish_once(name: str, storage: StorageLike, artifacts: ArtifactStore | Path) -> None:
    """As `publish`, for a study that no worker may ever work on."""
    opened = registry.storage_of(storage)
    publish(name, opened, artifacts, optuna.storages.get_storage(opened), last=True)


def _summary(trial: FrozenTrial, artifacts: ArtifactStore | Path) -> list[str]:
    """The lines of the model's summary; empty if this machine does not have its file."""
    file = artifact_store.of(artifacts).fetch(_summary_of(trial.user_attrs.get("history")))
    if file is None:
        return []
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


def _summary_of(history: object) -> str | None:
    """The file beside a trial's history; None if that is not one."""
    path = inside(Path(), history)
    return None if path is None else str(path.with_name(SUMMARY))


# --- which trials -----------------------------------------------------------------------------------------


def _trials_with_note(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    finished = [trial for trial in trials if trial.state.is_finished()]
    chosen = {trial.number: trial for trial in finished[-LATEST_WITH_NOTE:]}
    chosen |= {trial.number: trial for trial in findings.ranked(finished)[:BEST_WITH_NOTE]}
    return list(chosen.values())


# --- optuna-dashboard's attributes ------------------------------------------------------------------------


def _version_key(note_key: str) -> str:
    return f"{note_key.removesuffix('note_str:')}note_ver"


def _has_note(stored: Mapping[str, Any], note_key: str) -> bool:
    """Whether a trial has a note of ours: it is one piece, until a user edits it."""
    return MARK in str(stored.get(f"{note_key}0")) or MARK in _body(stored, note_key)


def _changes(stored: Mapping[str, Any], wanted: Mapping[str, str], keep: Iterable[str]) -> dict[str, Any]:
    """The attributes to write so that the database has each of `wanted`; None: the attribute is removed."""
    changes: dict[str, Any] = {}
    kept = {*wanted, *keep}
    for key, body in wanted.items():
        before = _body(stored, key)
        after = _with_user_text(before, body) if "note_str" in key else body
        if after != before:
            changes |= dict.fromkeys(_pieces(stored, key)) | {f"{key}0": after}
            if "note_str" in key:
                # The dashboard refuses a user's edit of an older version.
                changes[_version_key(key)] = int(stored.get(_version_key(key), 0)) + 1
    for version in stored:
        key = f"{version.removesuffix('note_ver')}note_str:"
        if version.endswith(":note_ver") and key not in kept and key != dashboard_note_prefix(None):
            body = _body(stored, key)
            if body.startswith(MARK):  # a user's text is never removed
                changes |= dict.fromkeys([*_pieces(stored, key), version])
    # Figures that have no data any more, or that an older version drew.
    for piece in stored:
        if piece.startswith(dashboard_plot_prefix()) and f"{piece.rpartition(':')[0]}:" not in kept and _is_ours(piece):
            changes[piece] = None
    return changes


def _is_ours(piece: str) -> bool:
    name = piece.removeprefix(dashboard_plot_prefix()).rpartition(":")[0]
    return name in FIGURES


def _with_user_text(stored_note: str, note: str) -> str:
    """Our `note`, below the text that a user has written above our last one."""
    user_text = stored_note.partition(MARK)[0].strip()
    return (f"{user_text}\n\n---\n\n" if user_text.strip("- \n") else "") + f"{MARK}\n\n{note}"


def _pieces(stored: Mapping[str, Any], key: str) -> list[str]:
    return sorted((piece for piece in stored if piece.startswith(key)), key=lambda piece: (len(piece), piece))


def _body(stored: Mapping[str, Any], key: str) -> str:
    return "".join(str(stored[piece]) for piece in _pieces(stored, key))


def _stored(connection: Connection, study_id: int) -> dict[str, Any]:
    model = StudySystemAttributeModel
    rows = connection.execute(
        select(model.key, model.value_json).where(
            model.study_id == study_id, or_(model.key.like("dashboard:%"), model.key == STATE)
        )
    )
    return {key: json.loads(value) for key, value in rows}


def _apply(connection: Connection, study_id: int, changes: Mapping[str, Any]) -> None:
    model, keys = StudySystemAttributeModel, list(changes)
    for start in range(0, len(keys), IDS_IN_CLAUSE):
        part = keys[start : start + IDS_IN_CLAUSE]
        connection.execute(delete(model).where(model.study_id == study_id, model.key.in_(part)))
    rows = [
        {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        for key, value in changes.items()
        if value is not None
    ]
    if rows:
        connection.execute(insert(model), rows)


# --- which worker publishes -------------------------------------------------------------------------------


def _is_turn(connection: Connection, study: ledger.Study, last: bool) -> bool:
    """Whether there is something to publish, and the pause is over."""
    published = _last_published(connection, study.id)
    if published is None:
        return True
    if (published.finished, published.state) == _finished_and_state(connection, study):
        return False
    age = (database_now(connection) - datetime.fromisoformat(published.at)).total_seconds()
    return last or not 0 <= age < max(PAUSE_SECONDS, published.seconds / SHARE)


def _take_turn(connection: Connection, study: ledger.Study, last: bool) -> bool:
    """Whether the caller shall publish now; if so, the other workers wait for the pause."""
    if not _is_turn(connection, study, last):
        return False
    published, now = _last_published(connection, study.id), _published_at(connection)
    turn = _Published(at=now) if published is None else _Published(**(asdict(published) | {"at": now}))
    _apply(connection, study.id, {STATE: asdict(turn)})
    return True


def _finished_and_state(connection: Connection, study: ledger.Study) -> tuple[int, ledger.State]:
    """How many trials have finished, and the study's state. If both are unchanged, there is nothing to publish."""
    now = ledger.current(connection, study)
    return now.finished, now.state


def _is_current(storage: RDBStorage, study: ledger.Study) -> bool:
    with storage.engine.connect() as connection:
        published = _last_published(connection, study.id)
        if published is None:
            return False
        return (published.finished, published.state) == _finished_and_state(connection, study)


def _last_published(connection: Connection, study_id: int) -> _Published | None:
    model = StudySystemAttributeModel
    query = select(model.value_json).where(model.study_id == study_id, model.key == STATE)
    value_json = connection.execute(query).scalar()
    return None if value_json is None else _Published(**json.loads(value_json))


def _published(stored: Mapping[str, Any]) -> _Published | None:
    return _Published(**stored[STATE]) if STATE in stored else None


def _published_at(connection: Connection) -> str:
    return database_now(connection).isoformat(timespec="milliseconds")
