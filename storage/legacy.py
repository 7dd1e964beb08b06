"""Repairs for databases of older versions: `storage check` reports what `storage upgrade` would repair."""

import json
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from optuna.trial import TrialState
from sqlalchemy import Connection, and_, delete, func, insert, select, update
from sqlalchemy.orm import aliased

from storage import attempt_table, openings
from storage.artifacts import CHECKPOINT
from storage.attributes import PREFIX, SHAPES, decoded, number
from storage.errors import trials_text
from storage.metric import name_metric
from storage.ranking import is_finite
from storage.tables import (
    StudyModel,
    StudyUserAttributeModel,
    TrialHeartbeatModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialUserAttributeModel,
    TrialValueModel,
)

# `incarnation` tells a study from a deleted one of the same name. It was the time of creation before.
OLD_NAMES = {"incarnation": "founded"}
NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}

OLD_BEAT_SECONDS = 10.0
FAILURE = {"kind": "nan", "message": "its score was not a finite number, and an older version stored it as a result"}


def problems(connection: Connection, study_id: int, name: str) -> list[str]:
    """What `upgrade` would repair in a study of ours, one sentence each."""
    unscored = _unscored(connection, study_id)
    if not unscored:
        return []
    trials_are = _trials_are(list(unscored.values()))
    return [
        f"study {name}: {trials_are} complete without a finite score: `trialyard storage upgrade` marks them as failed"
    ]


def upgrade(connection: Connection) -> list[str]:
    """Repairs everything, in the caller's transaction; returns what was done, one sentence each."""
    done = []
    older = set(outdated(connection))
    for study_id in older:
        _rename(connection, study_id)
    for study_id, name in _ours(connection):
        moved = _move_attempts(connection, study_id, name)
        if study_id in older or moved:
            _renew_incarnation(connection, study_id)
            done.append(f"study {name}: brought over from an older Trialyard")
            if _drops_elsewhere(connection, study_id):
                done.append(
                    f"study {name}: at depth 5 the dropout is behind the pooling now, so new trials could not be "
                    "compared with those that it has, and no worker continues it: create it again with --name"
                )
            else:
                _continue_with_this_version(connection, study_id)
        _move_openings(connection, study_id, name)
        definition = decoded(_attribute(connection, study_id, "definition"))
        if SHAPES["definition"](definition):
            name_metric(connection, study_id, definition)
        unscored = _unscored(connection, study_id)
        if unscored:
            _fail(connection, list(unscored))
            trials_are = _trials_are(list(unscored.values()))
            done.append(f"study {name}: {trials_are} now marked as failed, without a finite score")
    return done


def _move_openings(connection: Connection, study_id: int, name: str) -> None:
    """Moves the count of the openings of a study's test images from an attribute to the table."""
    count, data = (decoded(_attribute(connection, study_id, key)) for key in ("test_openings", "data"))
    fingerprint = data.get("fingerprint") if isinstance(data, dict) else None
    if not isinstance(fingerprint, str):
        return  # nobody can tell which images they were: what is there stays
    if isinstance(count, int):
        for _ in range(count):
            openings.add(connection, name, fingerprint)
    keys = [f"{PREFIX}{key}" for key in ("test_openings", "last_test_opening")]
    stored = StudyUserAttributeModel
    connection.execute(delete(stored).where(stored.study_id == study_id, stored.key.in_(keys)))


def _move_attempts(connection: Connection, study_id: int, name: str) -> int:
    """Moves the attempts of a study's trials from an attribute of each trial to the table; returns how many."""
    stored, beats = TrialUserAttributeModel, TrialHeartbeatModel
    rows = connection.execute(
        select(TrialModel.trial_id, TrialModel.number, TrialModel.state, stored.value_json, beats.heartbeat)
        .join(stored, and_(stored.trial_id == TrialModel.trial_id, stored.key == "attempts"))
        .outerjoin(beats, beats.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id)
        .order_by(TrialModel.number)
    ).all()
    last_epochs = {
        trial_id: int(step)
        for trial_id, step in connection.execute(
            select(TrialIntermediateValueModel.trial_id, func.max(TrialIntermediateValueModel.step))
            .join(TrialModel, TrialModel.trial_id == TrialIntermediateValueModel.trial_id)
            .where(TrialModel.study_id == study_id)
            .group_by(TrialIntermediateValueModel.trial_id)
        )
    }
    moved = 0
    for trial_id, trial, state, value_json, heartbeat in rows:
        old = attempts_of(decoded(value_json))
        for index, attempt in enumerate(old, start=1):
            last = index == len(old)
            began = _utc(attempt["began"])
            ended = None if last and state == TrialState.RUNNING else _utc(attempt.get("ended", attempt["began"]))
            unfinished = last and not state.is_finished()
            row = {key: attempt[key] for key in ("machine", "host", "pid", "born", "slot")} | {
                "trial_id": trial_id,
                "attempt": index,
                "began": began,
                "beat": heartbeat if last and heartbeat is not None else ended or began,
                "beat_seconds": OLD_BEAT_SECONDS,
                "resumed_after": attempt.get("resumed_after"),
                "epoch": attempt.get("epoch", last_epochs.get(trial_id, 0)),
                # Where older versions kept it: a folder for a trial, not for an attempt.
                "checkpoint": f"{name}/{trial}/{CHECKPOINT}" if unfinished else None,
                "ended": ended,
                "outcome": None if ended is None else attempt.get("outcome", "lost"),
                "reason": attempt.get("why"),
            }
            connection.execute(insert(attempt_table.table).values(row))
            moved += 1
        if old:
            connection.execute(delete(stored).where(stored.trial_id == trial_id, stored.key == "attempts"))
            connection.execute(delete(beats).where(beats.trial_id == trial_id))
    return moved


def attempts_of(value: Any) -> list[dict[str, Any]]:
    """The attempts at a trial, as older versions stored them. Empty if `value` is not of that shape: not our trial."""
    return value if isinstance(value, list) and all(map(_is_attempt, value)) else []


def _is_attempt(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("machine", "host", "slot")):
        return False
    try:
        times = [datetime.fromisoformat(value[key]) for key in ("began", "ended") if key in value]
    except (TypeError, ValueError):
        return False
    counts = (value.get("pid"), value.get("epoch", 0), value.get("resumed_after", 0))
    return (
        len(times) > 0
        and "began" in value
        and all(time.tzinfo is not None for time in times)
        and number(value.get("born")) is not None
        and all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
        and value.get("outcome", "lost") in ("finished", "interrupted", "crashed", "lost")
        and isinstance(value.get("why", ""), str)
    )


def _utc(moment: str) -> datetime:
    return datetime.fromisoformat(moment).astimezone(UTC).replace(tzinfo=None)


def _renew_incarnation(connection: Connection, study_id: int) -> None:
    """Gives a study an identity that no other study has: it was the time of its creation, or missing."""
    stored, key = StudyUserAttributeModel, f"{PREFIX}incarnation"
    connection.execute(delete(stored).where(stored.study_id == study_id, stored.key == key))
    connection.execute(insert(stored).values(study_id=study_id, key=key, value_json=json.dumps(uuid.uuid4().hex)))


def _continue_with_this_version(connection: Connection, study_id: int) -> None:
    """Lets this version's workers continue a study: they give its trials the scores that the older version gave."""
    stored, key = StudyUserAttributeModel, f"{PREFIX}software"
    mine = (stored.study_id == study_id, stored.key == key)
    software = decoded(connection.execute(select(stored.value_json).where(*mine)).scalar())
    if isinstance(software, dict) and "trialyard" in software:
        software |= {"trialyard": ".".join(version("trialyard").split(".")[:2])}
        connection.execute(update(stored).where(*mine).values(value_json=json.dumps(software)))


def _drops_elsewhere(connection: Connection, study_id: int) -> bool:
    """Whether a study has models of depth 5 with dropout, which was before the pooling."""
    stored = StudyUserAttributeModel
    definition = decoded(
        connection.execute(
            select(stored.value_json).where(stored.study_id == study_id, stored.key == f"{PREFIX}definition")
        ).scalar()
    )
    if not isinstance(definition, dict) or definition.get("model") != "convnet":
        return False
    fixed, space = definition.get("fixed") or {}, definition.get("space") or {}
    depths = space["depth"].get("choices", [5]) if isinstance(space.get("depth"), dict) else [fixed.get("depth")]
    return 5 in depths and any(name in space or fixed.get(name) for name in ("dropout", "conv_dropout"))


def outdated(connection: Connection) -> dict[int, str]:
    """The ids and names of the studies whose attributes have no prefix, as older versions wrote them.

    Other programs may use the same names. So the definition, and the budget or the incarnation, must have our shape.
    """
    stored, current = StudyUserAttributeModel, aliased(StudyUserAttributeModel)
    renamed = select(current.key).where(current.study_id == stored.study_id, current.key == f"{PREFIX}definition")
    rows = connection.execute(
        select(StudyModel.study_id, StudyModel.study_name, stored.key, stored.value_json)
        .join(stored, stored.study_id == StudyModel.study_id)
        .where(stored.key.in_(("definition", "budget", OLD_NAMES["incarnation"])), ~renamed.exists())
        .order_by(StudyModel.study_id)
    )
    studies: dict[tuple[int, str], dict[str, Any]] = {}
    for study_id, name, key, value_json in rows:
        studies.setdefault((study_id, name), {})[NEW_NAMES.get(key, key)] = decoded(value_json)

    def fits(values: dict[str, Any], key: str) -> bool:
        return key in values and SHAPES[key](values[key])

    return {
        study_id: name
        for (study_id, name), values in studies.items()
        if fits(values, "definition") and (fits(values, "budget") or fits(values, "incarnation"))
    }


def _rename(connection: Connection, study_id: int) -> None:
    old_names = [OLD_NAMES.get(name, name) for name in SHAPES]
    stored = StudyUserAttributeModel
    rows = connection.execute(
        select(stored.key, stored.value_json).where(stored.study_id == study_id, stored.key.in_(old_names))
    ).all()
    for old, value_json in rows:
        key, value = NEW_NAMES.get(old, old), decoded(value_json)
        if SHAPES[key](value):
            existing = connection.execute(
                select(stored.key).where(stored.study_id == study_id, stored.key == PREFIX + key)
            ).scalar()
            if existing is None:
                renamed = update(stored).where(stored.study_id == study_id, stored.key == old)
                new = _scored_as_before(value) if key == "definition" else value
                connection.execute(renamed.values(key=PREFIX + key, value_json=json.dumps(new)))


def _scored_as_before(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition by which new trials stay comparable with the older ones: with Keras's own moving averages, and a
    limit that the validation images are part of.
    """
    images = definition.get("data") or {}
    if images.get("limit") is not None and images.get("validation") != "test":
        definition = definition | {"data": images | {"limit_includes_validation": True}}
    fixed = definition.get("fixed", {})
    no_averages = definition["model"] == "mnist_cnn" or (
        fixed.get("depth") == 3 and not fixed.get("batch_norm") and "batch_norm" not in definition.get("space", {})
    )
    return definition if no_averages else definition | {"fixed": fixed | {"batch_norm_averages": "keras"}}


def _attribute(connection: Connection, study_id: int, name: str) -> str | None:
    stored = StudyUserAttributeModel
    query = select(stored.value_json).where(stored.study_id == study_id, stored.key == PREFIX + name)
    value_json: str | None = connection.execute(query).scalar()
    return value_json


def _ours(connection: Connection) -> list[tuple[int, str]]:
    """The id and name of every study that Trialyard made."""
    rows = connection.execute(
        select(StudyModel.study_id, StudyModel.study_name)
        .join(StudyUserAttributeModel, StudyUserAttributeModel.study_id == StudyModel.study_id)
        .where(StudyUserAttributeModel.key == f"{PREFIX}budget")
        .order_by(StudyModel.study_id)
    )
    return [(study_id, name) for study_id, name in rows]


def _unscored(connection: Connection, study_id: int) -> dict[int, int]:
    """The ids and numbers of the complete trials whose value is missing, NaN or infinite."""
    finite = select(TrialValueModel.trial_id).where(TrialValueModel.trial_id == TrialModel.trial_id, is_finite())
    rows = connection.execute(
        select(TrialModel.trial_id, TrialModel.number)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.COMPLETE, ~finite.exists())
        .order_by(TrialModel.number)
    )
    return {int(trial_id): int(number) for trial_id, number in rows}


def _fail(connection: Connection, trial_ids: list[int]) -> None:
    stored = TrialUserAttributeModel
    for trial_id in trial_ids:  # one at a time: the length of a statement is limited, and there are few
        connection.execute(update(TrialModel).where(TrialModel.trial_id == trial_id).values(state=TrialState.FAIL))
        connection.execute(delete(TrialValueModel).where(TrialValueModel.trial_id == trial_id))
        connection.execute(delete(stored).where(stored.trial_id == trial_id, stored.key == "failure"))
        connection.execute(insert(stored).values(trial_id=trial_id, key="failure", value_json=json.dumps(FAILURE)))


def _trials_are(numbers: list[int]) -> str:
    return f"{trials_text(numbers)} {'is' if len(numbers) == 1 else 'are'}"
