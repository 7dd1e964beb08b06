"""The studies: created in one transaction, with their budget, state and counts; listed, imported into, checked.

What the database says of a study is here; who runs its trials is in `storage.claims`.
"""

import hashlib
import json
import logging
import math
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import Connection, and_, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from storage import attributes, legacy
from storage.database import read, write
from storage.errors import NotOurStudy, StorageError, StudyGone, WrongDirection, trials_text
from storage.tables import (
    StudyDirectionModel,
    StudyUserAttributeModel,
    TrialHeartbeatModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
    find_study,
    insert_study,
    insert_trial,
    next_number,
    utc_now,
    value_row,
)

log = logging.getLogger(__name__)

IMPORT_KEY = "import_key"  # user attribute of an imported trial: a digest of all that it says
IMPORT_KEY_PATTERN = re.compile(r"[0-9a-f]{16}-[0-9]+")  # its value

State = Literal["open", "paused", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a study may spend, over all its workers."""

    trials: int  # that are run here: complete, pruned and failed ones count
    hours: float | None  # since the first trial started; no trial starts later
    imported: int = 0  # trials that were run elsewhere; they count beside those above, not against them

    @property
    def total(self) -> int:
        """How many trials the study ends with."""
        return self.trials + self.imported


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as the database had it at one moment."""

    id: int  # a database may use the id of a deleted study again
    name: str
    incarnation: str | None  # differs from that of a deleted study with the same id and name
    budget: Budget
    state: State


@dataclass(frozen=True, kw_only=True)
class Creation:
    """What `create_study` did."""

    changed: bool  # whether the study, a trial or a larger budget is new
    budget: Budget  # that the study has now


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A complete trial that was run elsewhere."""

    value: float
    params: Mapping[str, tuple[BaseDistribution, Any]]  # by name: the distribution, and the value
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A study's trials by state."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        """How many count against the budget for good."""
        return self.complete + self.pruned + self.failed


# --- create and change ------------------------------------------------------------------------------------


def create_study(
    storage: RDBStorage,
    study: str,
    *,
    definition: Mapping[str, Any],
    data: Mapping[str, Any],
    budget: Budget,
    points: Sequence[Mapping[str, Any]] = (),
    imported: Sequence[Imported] = (),
    accept: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = lambda definition, data: None,
) -> Creation:
    """Creates a study whole, in one transaction: its row, attributes, waiting trials, imported trials and budget.

    `points` are hyperparameters that are tried first, in this order. An empty study that somebody else made is
    completed. If the study exists already, `accept` gets its stored definition and data and raises whatever speaks
    against it; then imported trials are added, and the budget is raised if `budget` is larger (see `raise_budget`).

    Raises WrongDirection if a study of this name does not maximize exactly one value; NotOurStudy if it has trials
    and no definition; StorageError if it is of an older version.
    """
    digests = _by_digest(imported)

    def work(connection: Connection) -> Creation:
        study_id = find_study(connection, study)
        if study_id is None:
            study_id = insert_study(connection, study)
        if study_id in legacy.outdated(connection):
            raise StorageError(f"study {study!r} is of an older Trialyard: run `trialyard storage upgrade`")
        stored = attributes.of_study(connection, study_id, "definition")
        empty = next_number(connection, study_id) == 0
        if stored is None and not empty:
            raise NotOurStudy
        _require_direction(connection, study_id)
        if stored is None:
            start = {"definition": definition, "data": data, "incarnation": uuid.uuid4().hex}
            for name, value in start.items():
                _set_attribute(connection, study_id, name, value)
            for number, point in enumerate(points):
                trial_id = insert_trial(connection, study_id, number, TrialState.WAITING)
                row = {"trial_id": trial_id, "key": "fixed_params", "value_json": json.dumps(point)}
                connection.execute(insert(TrialSystemAttributeModel).values(row))
        else:
            accept(stored, attributes.of_study(connection, study_id, "data") or {})
        before = budget_of(connection, study_id)
        added = _add_imported(connection, study_id, digests)
        actual = _raise_budget(connection, study_id, budget)
        return Creation(changed=added > 0 or actual != before, budget=actual)

    try:
        return write(storage, study, work)
    except IntegrityError:
        # Plain Optuna, which does not take our lock, has created a study of this name in the same moment.
        return write(storage, study, work)


def raise_budget(storage: RDBStorage, study: str, budget: Budget) -> Budget:
    """Gives `study` a larger budget in trials, or other hours; returns the budget that it has then.

    Fewer trials than it has change nothing: nobody ends a study that others asked more of. `budget.imported` is
    ignored: the trials in the database count.
    """
    return write(storage, study, lambda connection: _raise_budget(connection, study_id_of(connection, study), budget))


def _raise_budget(connection: Connection, study_id: int, budget: Budget) -> Budget:
    existing = budget_of(connection, study_id)
    trials = budget.trials if existing is None else max(budget.trials, existing.trials)
    actual = replace(budget, trials=trials, imported=len(_imported_digests(connection, study_id)))
    if actual != existing:
        _set_attribute(connection, study_id, "budget", asdict(actual))
    return actual


def import_trials(storage: RDBStorage, study: str, trials: Sequence[Imported]) -> int:
    """Adds trials that were run elsewhere to `study`, finished, all or nothing; returns how many were new.

    The budget grows with them: it says what the study may still run. Each is recognized by a digest of all that it
    says, so the same trials given again add nothing, also after a transaction whose answer was lost. Equal trials in
    one call are distinguished by their order.

    Raises ValueError, and adds nothing, if a value is not finite.
    """
    digests = _by_digest(trials)

    def work(connection: Connection) -> int:
        study_id = study_id_of(connection, study)
        added = _add_imported(connection, study_id, digests)
        existing = budget_of(connection, study_id)
        if added and existing is not None:
            _raise_budget(connection, study_id, existing)
        return added

    return write(storage, study, work)


def _by_digest(trials: Sequence[Imported]) -> dict[str, Imported]:
    seen: Counter[str] = Counter()
    by_digest: dict[str, Imported] = {}
    for trial in trials:
        if not math.isfinite(trial.value):
            raise ValueError(f"the value of an imported trial is {trial.value}: it must be a finite number")
        digest = _digest(trial)
        seen[digest] += 1
        by_digest[f"{digest}-{seen[digest]}"] = trial
    return by_digest


def _digest(trial: Imported) -> str:
    params = {name: value for name, (_, value) in trial.params.items()}
    content = json.dumps([trial.value, params, dict(trial.attributes)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _add_imported(connection: Connection, study_id: int, by_digest: Mapping[str, Imported]) -> int:
    """Inserts the trials that are not there yet. Table by table, not trial by trial: the study is locked meanwhile."""
    existing = _imported_digests(connection, study_id)
    new = {digest: trial for digest, trial in by_digest.items() if digest not in existing}
    if not new:
        return 0
    first = next_number(connection, study_id)
    # When they ran is not known: they get the time of their import.
    row = {
        "study_id": study_id,
        "state": TrialState.COMPLETE,
        "datetime_start": utc_now(),
        "datetime_complete": utc_now(),
    }
    connection.execute(insert(TrialModel.__table__), [row | {"number": first + index} for index in range(len(new))])
    inserted = select(TrialModel.trial_id).where(TrialModel.study_id == study_id, TrialModel.number >= first)
    ids = connection.execute(inserted.order_by(TrialModel.number)).scalars().all()
    params: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    user_attributes: list[dict[str, Any]] = []
    for trial_id, (digest, trial) in zip(ids, new.items(), strict=True):
        for name, (distribution, value) in trial.params.items():
            params.append(
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(value),
                    "distribution_json": distribution_to_json(distribution),
                }
            )
        values.append(value_row(trial_id, trial.value))
        marked = {**trial.attributes, "imported": True, IMPORT_KEY: digest}
        user_attributes += [
            {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in marked.items()
        ]
    if params:
        connection.execute(insert(TrialParamModel), params)
    connection.execute(insert(TrialValueModel), values)
    connection.execute(insert(TrialUserAttributeModel), user_attributes)
    return len(new)


def _imported_digests(connection: Connection, study_id: int) -> set[str]:
    """The digests of the study's imported trials. What others store under this name does not have their form."""
    stored = connection.execute(
        select(TrialUserAttributeModel.value_json)
        .join(TrialModel, TrialModel.trial_id == TrialUserAttributeModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialUserAttributeModel.key == IMPORT_KEY)
    ).scalars()
    digests = map(attributes.decoded, stored)
    return {digest for digest in digests if isinstance(digest, str) and IMPORT_KEY_PATTERN.fullmatch(digest)}


def record_software(storage: RDBStorage, study: str, software: Mapping[str, str]) -> dict[str, str]:
    """The software that `study` started with. If none is recorded yet, `software` is, and is returned.

    Under the lock, so that of two first workers with different software one sees the other's. Raises StudyGone.
    """

    def work(connection: Connection) -> dict[str, str]:
        study_id = study_id_of(connection, study)
        recorded: dict[str, str] | None = attributes.of_study(connection, study_id, "software")
        if recorded is None:
            _set_attribute(connection, study_id, "software", dict(software))
        return recorded or dict(software)

    return write(storage, study, work)


def set_state(storage: RDBStorage, study: str, state: State) -> None:
    """Opens, pauses or stops `study`. Its workers see it at their next beat or epoch, and give their trials back."""
    write(
        storage,
        study,
        lambda connection: _set_attribute(connection, study_id_of(connection, study), "state", state),
    )


def _set_attribute(connection: Connection, study_id: int, name: str, value: Any) -> None:
    stored, key = StudyUserAttributeModel, attributes.PREFIX + name
    connection.execute(delete(stored).where(stored.study_id == study_id, stored.key == key))
    connection.execute(insert(stored).values(study_id=study_id, key=key, value_json=json.dumps(value)))


# --- read -------------------------------------------------------------------------------------------------


def studies(storage: RDBStorage) -> list[Study]:
    """All readable studies of Trialyard, oldest first, in one query.

    A study that is not readable is left out, with one warning in this process.
    """

    def work(connection: Connection) -> list[Study]:
        return [
            Study(
                id=study.study_id,
                name=study.name,
                incarnation=study.values.get("incarnation"),
                budget=Budget(**study.values["budget"]),
                state=study.values.get("state") or "open",
            )
            for study in attributes.of_studies(connection, ("budget", "incarnation", "state"))
            if _is_readable(study) and "budget" in study.values
        ]

    return read(storage, work)


def names(storage: RDBStorage) -> list[str]:
    """The names of `studies` whose definitions are readable, too: what commands list."""

    def work(connection: Connection) -> list[str]:
        listed = attributes.of_studies(connection, attributes.SHAPES)
        return [
            study.name for study in listed if _is_readable(study) and {"budget", "definition"} <= study.values.keys()
        ]

    return read(storage, work)


def _is_readable(study: attributes.StudyAttributes) -> bool:
    if study.problem is not None and study.problem not in _warned:
        _warned.add(study.problem)
        log.warning("%s", study.problem)
    return study.problem is None


_warned: set[str] = set()


def attribute(storage: RDBStorage, study_id: int, name: str) -> Any:
    """An attribute of a study, one of `attributes.SHAPES`; None if it has none. Raises StudyUnreadable."""
    return read(storage, lambda connection: attributes.of_study(connection, study_id, name))


def budget(storage: RDBStorage, study_id: int) -> Budget | None:
    """The study's budget; None for a study that is not ours."""
    return read(storage, lambda connection: budget_of(connection, study_id))


def state(storage: RDBStorage, study_id: int) -> State:
    """Whether the study is open, paused or stopped."""
    return read(storage, lambda connection: state_of(connection, study_id))


def incarnation(storage: RDBStorage, study_id: int) -> str | None:
    """What tells the study from a deleted one with the same id and name: a database uses ids again."""
    value: str | None = attribute(storage, study_id, "incarnation")
    return value


def counts(storage: RDBStorage, study_id: int) -> Counts:
    """The study's trials by state, in one query that reads no trial."""

    def work(connection: Connection) -> dict[TrialState, int]:
        rows = connection.execute(
            select(TrialModel.state, func.count()).where(TrialModel.study_id == study_id).group_by(TrialModel.state)
        )
        return {state: int(number) for state, number in rows}

    by_state = read(storage, work)
    return Counts(
        complete=by_state.get(TrialState.COMPLETE, 0),
        pruned=by_state.get(TrialState.PRUNED, 0),
        failed=by_state.get(TrialState.FAIL, 0),
        running=by_state.get(TrialState.RUNNING, 0),
        waiting=by_state.get(TrialState.WAITING, 0),
    )


def has_ended(storage: RDBStorage, study_id: int) -> bool:
    """Whether nothing is left to run: the budget is spent, or no trial runs and the study is stopped or out of time."""

    def work(connection: Connection) -> bool:
        limit = budget_of(connection, study_id)
        if limit is None:
            return True
        finished, running = finished_and_running(connection, study_id)
        over = state_of(connection, study_id) == "stopped" or is_late(connection, study_id, limit)
        return finished >= limit.total or (running == 0 and over)

    return read(storage, work)


def check_direction(storage: RDBStorage, study_id: int) -> None:
    """Raises WrongDirection unless the study maximizes exactly one value."""
    read(storage, lambda connection: _require_direction(connection, study_id))


def _require_direction(connection: Connection, study_id: int) -> None:
    directions = (
        connection.execute(select(StudyDirectionModel.direction).where(StudyDirectionModel.study_id == study_id))
        .scalars()
        .all()
    )
    if len(directions) != 1:
        raise WrongDirection(f"has {len(directions)} objectives")
    if directions[0] != StudyDirection.MAXIMIZE:
        raise WrongDirection("minimizes its value")


def is_outdated(storage: RDBStorage, study: str) -> bool:
    """Whether the study is of an older version, whose attributes have no prefix."""
    return read(storage, lambda connection: study in legacy.outdated(connection).values())


# --- in a transaction of the caller -----------------------------------------------------------------------


def study_id_of(connection: Connection, study: str) -> int:
    """The id of `study`. Raises StudyGone."""
    study_id = find_study(connection, study)
    if study_id is None:
        raise StudyGone(f"study {study!r} is gone from the database: `trialyard create` makes it again")
    return study_id


def budget_of(connection: Connection, study_id: int) -> Budget | None:
    """As `budget`."""
    stored = attributes.of_study(connection, study_id, "budget")
    return None if stored is None else Budget(**stored)


def state_of(connection: Connection, study_id: int) -> State:
    """As `state`."""
    stored: State | None = attributes.of_study(connection, study_id, "state")
    return stored or "open"


def finished_and_running(connection: Connection, study_id: int) -> tuple[int, int]:
    """How many trials are finished, and how many run. Counts only unfinished trials, which are few."""
    mine = TrialModel.study_id == study_id
    waiting, running = (
        select(func.count()).where(mine, TrialModel.state == state).scalar_subquery()
        for state in (TrialState.WAITING, TrialState.RUNNING)
    )
    last = select(func.max(TrialModel.number)).where(mine).scalar_subquery()
    # One statement sees one moment, also without a lock: a trial that changes its state is counted once.
    row = connection.execute(select(last, waiting, running)).one()
    size = 0 if row[0] is None else int(row[0]) + 1
    return size - int(row[1]) - int(row[2]), int(row[2])


def is_late(connection: Connection, study_id: int, limit: Budget) -> bool:
    """Whether the study's hours are over."""
    if limit.hours is None:
        return False
    started = _first_started(connection, study_id)
    return started is not None and datetime.now(UTC) - started >= timedelta(hours=limit.hours)


def _first_started(connection: Connection, study_id: int) -> datetime | None:
    # The trial with the lowest number that was run here. Optuna's own column has the start of its last attempt.
    number = -1
    while True:
        row = connection.execute(
            select(TrialModel.number, TrialUserAttributeModel.value_json)
            .join(TrialUserAttributeModel, TrialModel.trial_id == TrialUserAttributeModel.trial_id)
            .where(TrialModel.study_id == study_id, TrialUserAttributeModel.key == "attempts")
            .where(TrialModel.number > number)
            .order_by(TrialModel.number)
            .limit(1)
        ).first()
        if row is None:
            return None
        number, attempts = row[0], attributes.attempts(attributes.decoded(row[1]))
        if attempts:  # otherwise somebody else added this trial
            return datetime.fromisoformat(attempts[0]["began"])


# --- check ------------------------------------------------------------------------------------------------


def started_outside(storage: RDBStorage, study_id: int) -> list[int]:
    """The numbers of the RUNNING trials that none of our workers started: somebody called `study.ask()`."""
    return read(storage, lambda connection: _started_outside(connection, study_id))


def _started_outside(connection: Connection, study_id: int) -> list[int]:
    of_trial = and_(TrialUserAttributeModel.trial_id == TrialModel.trial_id, TrialUserAttributeModel.key == "attempts")
    rows = connection.execute(
        select(TrialModel.number, TrialUserAttributeModel.value_json)
        .outerjoin(TrialUserAttributeModel, of_trial)
        .where(TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING)
        .order_by(TrialModel.number)
    )
    return [number for number, value_json in rows if not attributes.attempts(attributes.decoded(value_json))]


def started_outside_text(numbers: Sequence[int]) -> str:
    """A sentence for people about trials that were started outside Trialyard."""
    were, have = ("trial was", "has") if len(numbers) == 1 else ("trials were", "have")
    ends = "it" if len(numbers) == 1 else "them"
    return (
        f"{len(numbers)} {were} started outside Trialyard and {have} not ended: {trials_text(numbers)}; "
        f"`optuna tell` ends {ends}"
    )


def check(storage: RDBStorage) -> list[str]:
    """Which promises the studies in the database do not keep, a sentence each; empty if they keep all."""
    return read(storage, _problems)


def _problems(connection: Connection) -> list[str]:
    problems = [
        f"study {name} is of an older Trialyard, and is left out: run `trialyard storage upgrade`"
        for name in legacy.outdated(connection).values()
    ]
    for study in attributes.of_studies(connection, attributes.SHAPES):
        problems += [study.problem] if study.problem is not None else _study_problems(connection, study)
    return problems


def _study_problems(connection: Connection, study: attributes.StudyAttributes) -> list[str]:
    study_id, name = study.study_id, study.name
    problems: list[str] = []
    try:
        _require_direction(connection, study_id)
    except WrongDirection as wrong:
        problems.append(
            f"study {name} {wrong}, and its samplers search for the worst accuracy: `trialyard delete {name}`, and "
            "create it again"
        )
    limit = budget_of(connection, study_id)
    if limit is None:
        problems.append(f"study {name}: it has no budget: `trialyard create` with its definition completes it")
    else:
        finished, running = finished_and_running(connection, study_id)
        if finished + running > limit.total:
            problems.append(f"study {name}: {finished + running} trials, over its {limit.total}")
        imported = len(_imported_digests(connection, study_id))
        if imported != limit.imported:
            problems.append(f"study {name}: {imported} imported trials, and its budget says {limit.imported}")
    twice = connection.execute(
        select(TrialModel.number)
        .where(TrialModel.study_id == study_id)
        .group_by(TrialModel.number)
        .having(func.count() > 1)
    ).scalars()
    problems += [f"study {name}: two trials have the number {number}" for number in twice]
    outside = _started_outside(connection, study_id)
    problems += [f"study {name}: {started_outside_text(outside)}"] if outside else []
    silent = connection.execute(
        select(TrialModel.number)
        .outerjoin(TrialHeartbeatModel, TrialHeartbeatModel.trial_id == TrialModel.trial_id)
        .where(
            TrialModel.study_id == study_id,
            TrialModel.state == TrialState.RUNNING,
            TrialHeartbeatModel.trial_id.is_(None),
        )
    ).scalars()
    problems += [f"study {name}: trial {number} runs without a heartbeat" for number in silent if number not in outside]
    return problems + legacy.problems(connection, study_id, name)
