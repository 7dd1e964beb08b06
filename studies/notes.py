"""Notes and figures for optuna-dashboard, written into the study while workers work on it.

A plain optuna-dashboard shows them. It keeps notes and figures, those of trials too, in system attributes of the
study, each cut into pieces for databases whose columns are short. Ours are not, and every page that it makes looks
through all attributes for every trial: so here each note and figure is one piece, written in one transaction with the
others, so that nobody ever reads half a figure, and only so many trials have a note.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, delete, insert, or_, select

from storage import attributes, ledger
from storage.artifacts import SUMMARY, inside
from storage.owners import database_now
from storage.tables import StudySystemAttributeModel, dashboard_note_prefix, dashboard_plot_prefix
from storage.transactions import write
from studies import findings, notebook, registry, results
from studies.definition import Definition, from_json, to_toml
from studies.registry import StorageLike

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0  # between two publications of a study, whoever makes them
SHARE = 0.05  # of one core that publishing may take, where a study is large
BEST_NOTED, LATEST_NOTED = 50, 250  # trials with a note
CURVES = 5  # trials in the figure of learning curves
LAYERS = 40  # lines of a model's summary that a note has, at most

MARK = "*Written by Trialyard, and anew as trials end: what you write above this line stays.*"
STATE = "trialyard:published"  # system attribute: what stands there, and since when


@dataclass(frozen=True, kw_only=True)
class _Published:
    at: str  # by the database's clock, UTC
    finished: int = -1  # trials
    state: str = ""  # of the study
    seconds: float = 0.0  # that it took


def publish(
    name: str, storage: RDBStorage, artifacts: Path, cached: BaseStorage, *, last: bool = False, anew: bool = False
) -> bool:
    """Writes the notes and figures of study `name`, unless they stand or were written a moment ago.

    `cached` is the same storage with Optuna's cache of finished trials. `last` waits for no pause: nothing more will
    come from this worker. `anew` writes them also where they stand: something beside the study has changed.
    Returns whether what stands is up to date, as far as this caller knows.
    """
    study = registry.find(name, storage)
    lock = f"{name} (notes)"  # a lock of its own: a claim must not wait for it
    if not write(storage, lock, lambda connection: _take_turn(connection, study, last)) and not anew:
        return _is_current(storage, study)
    # Plotly takes a moment to import, which no command should spend that draws nothing.
    from studies import figures

    began = time.monotonic()
    definition, state, total = from_json(study.definition), study.state, study.budget.total
    trials = cached.get_all_trials(study.id, deepcopy=False)
    curves = results.curves_of(trials, artifacts, CURVES)
    drawn = figures.drawn(trials, definition, curves, notebook.replays(definition, storage))
    attributes = {
        **{f"{dashboard_plot_prefix()}{name}:": figure.to_json() for name, figure in drawn.items()},
        dashboard_note_prefix(None): study_note(trials, definition, study.data, state=state, budget=total),
    }
    noted = {dashboard_note_prefix(trial._trial_id): trial for trial in _noted(trials)}

    def work(connection: Connection) -> bool:
        stored = _stored(connection, study.id)
        standing = _published(stored)
        finished = sum(trial.state.is_finished() for trial in trials)
        if standing is not None and standing.finished > finished:
            return False  # somebody who read later was faster
        wanted = dict(attributes)
        for key, trial in noted.items():
            # A finished trial's note never changes; ours is one piece, until a person edits it.
            if MARK not in str(stored.get(f"{key}0")) and MARK not in _body(stored, key):
                curve = results.curves_of([trial], artifacts)
                wanted[key] = trial_note(trial, definition, curve, _summary(trial, artifacts))
        changes = _changes(stored, wanted, keep=noted)
        now = _published_at(connection)
        spent = round(time.monotonic() - began, 3)
        changes[STATE] = asdict(_Published(at=now, finished=finished, state=state, seconds=spent))
        _apply(connection, study.id, changes)
        return True

    written = write(storage, lock, work)
    ended = sum(trial.state.is_finished() for trial in trials) >= total
    # A replay of the notebook is shown beside the notebook's own study, too.
    if ended and notebook.reference_results(definition) and notebook.NAME in registry.names(storage):
        publish(notebook.NAME, storage, artifacts, optuna.storages.get_storage(storage), anew=True)
    return written


def publish_once(name: str, storage: StorageLike, artifacts: Path) -> None:
    """As `publish`, for a study that no worker may ever work on."""
    opened = registry.storage_of(storage)
    publish(name, opened, artifacts, optuna.storages.get_storage(opened), last=True)


# --- the notes --------------------------------------------------------------------------------------------


def study_note(
    trials: Sequence[FrozenTrial], definition: Definition, data: Mapping[str, Any], *, state: str, budget: int
) -> str:
    """Markdown: what was found and what cannot be said, the counts, what is searched and fixed, the definition."""
    told = findings.findings(trials, definition, data)
    states = {one: sum(trial.state == one for trial in trials) for one in TrialState}
    counts = ", ".join(f"{count} {one.name.lower()}" for one, count in states.items() if count)
    finished = sum(count for one, count in states.items() if one.is_finished())
    stands = "has ended" if finished >= budget else f"is {state}"
    lines = [
        f"## {escaped(definition.name)}",
        escaped(definition.description),
        f"**{finished} of {budget} trials** ({counts or 'none yet'}); the study {stands}.",
        *map(escaped, told.found),
        *(f"- {escaped(sentence)}" for sentence in told.mattered),
        *(f"- **Mind:** {escaped(sentence)}" for sentence in told.cautions),
        "### Searched",
        *(f"- **{escaped(name)}**: {escaped(span)}" for name, span in findings.searched(definition).items()),
        "### Fixed",
        *(
            f"- **{escaped(name)}**: {escaped(findings.shown({'': value}).strip())}"
            for name, value in definition.fixed.items()
        ),
        *([] if definition.fixed else ["nothing: all else has its default"]),
        "### Definition",
        fenced(to_toml(definition).rstrip(), "toml"),
    ]
    return _paragraphs(line for line in lines if line)


def trial_note(
    trial: FrozenTrial, definition: Definition, curves: Sequence[results.Curve], summary: Sequence[str] = ()
) -> str:
    """Markdown: the last epoch, the model and the lines of its `summary`, device and speed; or why the trial failed."""
    told = trial.user_attrs
    lines = [f"**Trial {trial.number}**: {escaped(findings.shown(trial.params)) or 'no hyperparameters'}"]
    if trial.state == TrialState.FAIL:
        failure = attributes.failure(told.get("failure"))
        lines += [f"Failed ({escaped(failure['kind'])}):", fenced(failure["message"])]
        return _paragraphs(lines)
    judged = "test" if definition.data.validation == "test" else "validation"
    if trial.state == TrialState.PRUNED:
        lines.append(f"Ended early, after epoch {trial.last_step}: it lagged behind.")
    elif trial.values is not None:
        at, epochs = attributes.number(told.get("best_epoch")), attributes.number(told.get("epochs"))
        best = "" if at is None or epochs is None else f" (epoch {at} of {epochs})"
        lines.append(f"Complete: {judged} accuracy **{trial.values[0]:.4f}**{best}.")
    if told.get("imported"):
        source = ": " + ", ".join(str(told[key]) for key in ("label", "source") if key in told)
        lines.append(escaped(f"Imported, not run here{source.rstrip(': ')}."))
    curve = curves[0] if curves else None
    if curve is not None and curve.loss:
        lines.append(
            f"- last epoch, {len(curve.loss)}: loss {curve.loss[-1]:.4f}, accuracy {curve.accuracy[-1]:.4f}; "
            f"{judged} loss {curve.val_loss[-1]:.4f}, accuracy {curve.val_accuracy[-1]:.4f}"
        )
    elif trial.last_step is not None:
        lines.append(
            f"- last epoch, {trial.last_step}: {judged} accuracy {trial.intermediate_values[trial.last_step]:.4f}"
        )
    if isinstance(told.get("parameters"), int):
        lines.append(f"- model: {escaped(definition.model)} of {told['parameters']:,} weights")
        if len(summary) > LAYERS:
            summary = [*summary[: LAYERS - 1], "...", summary[-1]]
        lines += [fenced("\n".join(summary))] if summary else []
    if "device" in told:
        lines.append(
            escaped(
                f"- trained on {told['device']} ({told.get('slot')}) in {told.get('precision')}, "
                f"{attributes.number(told.get('images_per_second')) or 0:,.0f} images/s, "
                f"{attributes.number(told.get('seconds')) or 0:,.1f} s"
            )
        )
    if inside(Path(), told.get("model")) is not None:
        lines.append(f"- files, below the artifacts' folder: `{told['model']}`, `{told.get('history')}`")
    return _paragraphs(lines)


def _summary(trial: FrozenTrial, artifacts: Path) -> list[str]:
    """The lines of the model's summary; none where its file lies on another machine, or there is none."""
    history = inside(artifacts, trial.user_attrs.get("history"))
    if history is None:
        return []
    try:
        return history.with_name(SUMMARY).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


def escaped(text: str) -> str:
    """`text` with nothing in it that Markdown would take for markup."""
    flat = " ".join(text.split())
    begin = "\\" if flat[:1] in ("+", "=") else ""
    return begin + "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~&" else letter for letter in flat)


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code, whatever is in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _paragraphs(lines: Iterable[str]) -> str:
    return "\n\n".join(lines)


# --- which trials -----------------------------------------------------------------------------------------


def _noted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    finished = [trial for trial in trials if trial.state.is_finished()]
    chosen = {trial.number: trial for trial in finished[-LATEST_NOTED:]}
    chosen |= {trial.number: trial for trial in findings.ranked(finished)[:BEST_NOTED]}
    return list(chosen.values())


# --- optuna-dashboard's attributes ------------------------------------------------------------------------


def _version_key(note_key: str) -> str:
    return f"{note_key.removesuffix('note_str:')}note_ver"


def _changes(stored: Mapping[str, Any], wanted: Mapping[str, str], keep: Iterable[str]) -> dict[str, Any]:
    """What must be written, by key, so that each of `wanted` stands; None: taken away."""
    changes: dict[str, Any] = {}
    kept = {*wanted, *keep}
    for key, body in wanted.items():
        before = _body(stored, key)
        after = _beside_a_person_s(before, body) if "note_str" in key else body
        if after != before:
            changes |= dict.fromkeys(_pieces(stored, key)) | {f"{key}0": after}
            if "note_str" in key:
                # The dashboard refuses a person's edit of an older version than the one that stands.
                changes[_version_key(key)] = int(stored.get(_version_key(key), 0)) + 1
    for version in stored:
        key = f"{version.removesuffix('note_ver')}note_str:"
        if version.endswith(":note_ver") and key not in kept and key != dashboard_note_prefix(None):
            body = _body(stored, key)
            if body.startswith(MARK):  # a person's words are never taken away
                changes |= dict.fromkeys([*_pieces(stored, key), version])
    # What there is no data for any more, or an older version drew.
    for piece in stored:
        if piece.startswith(dashboard_plot_prefix()) and f"{piece.rpartition(':')[0]}:" not in kept and _is_ours(piece):
            changes[piece] = None
    return changes


def _is_ours(piece: str) -> bool:
    name = piece.removeprefix(dashboard_plot_prefix()).rpartition(":")[0]
    return name in ("learning-curves", "dropout", "cost", "progress", "notebook")


def _beside_a_person_s(before: str, ours: str) -> str:
    above = before.partition(MARK)[0].strip()
    return (f"{above}\n\n---\n\n" if above.strip("- \n") else "") + f"{MARK}\n\n{ours}"


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
    for start in range(0, len(keys), 500):  # SQLite takes only so many variables in a statement
        part = keys[start : start + 500]
        connection.execute(delete(model).where(model.study_id == study_id, model.key.in_(part)))
    rows = [
        {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        for key, value in changes.items()
        if value is not None
    ]
    if rows:
        connection.execute(insert(model), rows)


# --- whose turn it is -------------------------------------------------------------------------------------


def _take_turn(connection: Connection, study: ledger.Study, last: bool) -> bool:
    """Whether there is something to publish, and it is time; then nobody else does for a while."""
    standing = _standing(connection, study.id)
    counted = _counted(connection, study)
    if standing is not None:
        if (standing.finished, standing.state) == counted:
            return False
        age = (database_now(connection) - datetime.fromisoformat(standing.at)).total_seconds()
        if not last and 0 <= age < max(PAUSE_SECONDS, standing.seconds / SHARE):
            return False
    now = _published_at(connection)
    mine = _Published(at=now) if standing is None else _Published(**(asdict(standing) | {"at": now}))
    _apply(connection, study.id, {STATE: asdict(mine)})
    return True


def _counted(connection: Connection, study: ledger.Study) -> tuple[int, ledger.State]:
    """How many trials have finished, and the study's state: if neither changed, there is no news."""
    now = ledger.current(connection, study)
    return now.finished, now.state


def _is_current(storage: RDBStorage, study: ledger.Study) -> bool:
    with storage.engine.connect() as connection:
        standing = _standing(connection, study.id)
        return standing is not None and (standing.finished, standing.state) == _counted(connection, study)


def _standing(connection: Connection, study_id: int) -> _Published | None:
    model = StudySystemAttributeModel
    found = connection.execute(select(model.value_json).where(model.study_id == study_id, model.key == STATE)).scalar()
    return None if found is None else _Published(**json.loads(found))


def _published(stored: Mapping[str, Any]) -> _Published | None:
    return _Published(**stored[STATE]) if STATE in stored else None


def _published_at(connection: Connection) -> str:
    return database_now(connection).isoformat(timespec="milliseconds")
