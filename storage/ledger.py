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
from datetime import datetime, timedelta
from typing import Any, Literal

from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import ColumnElement, Connection, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from storage import attributes, legacy, openings, study_progress
from storage.errors import NotOurStudy, StorageError, StudyGone, StudyUnreadable, WrongDirection, trials_text
from storage.metric import name_metric
from storage.tables import (
    StudyDirectionModel,
    StudyModel,
    StudyUserAttributeModel,
    TrialModel,
    TrialParamModel,
    TrialUserAttributeModel,
    TrialValueModel,
    find_study,
    insert_study,
    insert_waiting,
    next_number,
    param_row,
    utc_now,
    value_row,
)
from storage.transactions import read, write

log = logging.getLogger(__name__)

IMPORT_KEY = "import_key"  # user attribute of an imported trial: a digest of all that it says
IMPORT_KEY_PATTERN = re.compile(r"[0-9a-f]{16}-[0-9]+")  # its value

State = Literal["open", "paused", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a study may spend, over all its workers."""

    trials: int  # that are run here: complete, pruned and failed ones count
    hours: float | None  # since the first trial started; no trial starts later
    imported: int = 0  # trials that were run elsewhere; they count in addition to those above

    @property
    def total(self) -> int:
        """How many trials the study ends with."""
        return self.trials + self.imported


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as the database had it at one moment. Pass this on, and not its name."""

    id: int  # a database may use the id of a deleted study again
    name: str
    incarnation: str  # never used again: tells the study from a deleted one with the same id and name
    definition: Mapping[str, Any]  # checked JSON
    data: Mapping[str, Any]  # of its images: fingerprint, sizes
    software: Mapping[str, str] | None  # that it began with; None before its first worker
    precision: str | None  # Keras's dtype policy that it began with; None before its first worker
    budget: Budget
    state: State
    pause_reason: str | None  # why Trialyard paused it; None: it did not
    priority: int  # workers that share their slots take trials of a higher one first
    finished: int  # trials that are complete, pruned or failed: they count against the budget for good
    running: int  # by workers
    outside: int  # RUNNING trials that no worker started, such as those of a `study.ask()`: no budget is kept for them
    waiting: int
    first_began: datetime | None  # when its first trial began here; None before that
    read_at: datetime  # when it was read; both naive UTC, by the database's clock

    @property
    def size(self) -> int:
        """How many trials it has, in any state: their numbers are the whole numbers below."""
        return self.finished + self.running + self.outside + self.waiting

    @property
    def is_late(self) -> bool:
        """Whether its hours are over: no trial starts any more."""
        if self.budget.hours is None or self.first_began is None:
            return False
        return self.read_at - self.first_began >= timedelta(hours=self.budget.hours)

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to run: the budget is spent, or no trial runs and it is stopped or out of time."""
        over = self.state == "stopped" or self.is_late
        return self.finished >= self.budget.total or (self.running == 0 and over)


@dataclass(frozen=True, kw_only=True)
class Creation:
    """What `create_study` did."""

    changed: bool  # whether the study, a trial or a larger budget is new
    study: Study


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
    opens_tests_of: str | None = None,
) -> Creation:
    """Creates a study whole, in one transaction: its row, attributes, waiting trials, imported trials and budget.

    `points` are hyperparameters that are tried first, in this order. An empty study that somebody else made is
    completed. If the study exists already, `accept` gets its stored definition and data, and raises an error to refuse
    it; then imported trials are added, and the budget is raised if `budget` is larger (see `raise_budget`). A study
    that is new and opens the test images of another one, `opens_tests_of`, is counted in the table of openings.

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
        require_direction(connection, study_id)
        if stored is None:
            for name, value in {"definition": definition, "data": data}.items():
                _set_attribute(connection, study_id, name, value)
            for number, point in enumerate(points):
                insert_waiting(connection, study_id, number, point)
            if opens_tests_of is not None:
                openings.add(connection, opens_tests_of, str(data.get("fingerprint")))
        else:
            accept(stored, attributes.of_study(connection, study_id, "data") or {})
        name_metric(connection, study_id, stored or definition)
        if attributes.of_study(connection, study_id, "incarnation") is None:
            _set_attribute(connection, study_id, "incarnation", uuid.uuid4().hex)
        before = budget_of(connection, study_id)
        added = _add_imported(connection, study_id, digests)
        actual = set_larger_budget(connection, study_id, budget)
        (created,) = _load(connection, StudyModel.study_id == study_id)
        return Creation(changed=added > 0 or actual != before, study=created)

    try:
        return write(storage, study, work)
    except IntegrityError:
        # Plain Optuna, which does not take our lock, has created a study of this name in the same moment.
        return write(storage, study, work)


def raise_budget(storage: RDBStorage, study: Study, budget: Budget) -> Budget:
    """Gives `study` a larger budget in trials or hours; returns the budget that it has then.

    Less of either than it has changes nothing: a study that others asked more of is not ended. A budget without hours
    has no limit, which is more than any. `budget.imported` is ignored: the trials in the database count. Raises
    StudyGone.
    """

    def work(connection: Connection) -> Budget:
        return set_larger_budget(connection, current(connection, study).id, budget)

    return write(storage, study.name, work)


def set_larger_budget(connection: Connection, study_id: int, budget: Budget) -> Budget:
    """Raises the study's budget to `budget` in the caller's transaction; returns what it is then."""
    existing = budget_of(connection, study_id)
    larger = budget if existing is None else _larger(budget, existing)
    actual = replace(larger, imported=len(imported_digests(connection, study_id)))
    if actual != existing:
        _set_attribute(connection, study_id, "budget", asdict(actual))
    return actual


def _larger(one: Budget, other: Budget) -> Budget:
    hours = None if one.hours is None or other.hours is None else max(one.hours, other.hours)
    return Budget(trials=max(one.trials, other.trials), hours=hours)


def import_trials(storage: RDBStorage, study: Study, trials: Sequence[Imported]) -> int:
    """Adds trials that were run elsewhere to `study`, finished, all or nothing; returns how many were new.

    The budget grows with them: it says what the study may still run. Each is recognized by a digest of all that it
    says, so the same trials given again add nothing, also after a transaction whose answer was lost. Equal trials in
    one call are distinguished by their order.

    Raises ValueError, and adds nothing, if a value is not finite; and StudyGone.
    """
    digests = _by_digest(trials)

    def work(connection: Connection) -> int:
        existing = current(connection, study)
        added = _add_imported(connection, study.id, digests)
        if added:
            set_larger_budget(connection, study.id, existing.budget)
        return added

    return write(storage, study.name, work)


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
    existing = imported_digests(connection, study_id)
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
        params += [param_row(trial_id, name, *param) for name, param in trial.params.items()]
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


def imported_digests(connection: Connection, study_id: int) -> set[str]:
    """The digests of the study's imported trials. What others store under this name does not have their form."""
    digests = attributes.of_all_trials(connection, study_id, IMPORT_KEY)
    return {digest for digest in digests if isinstance(digest, str) and IMPORT_KEY_PATTERN.fullmatch(digest)}


def record_software(storage: RDBStorage, study: Study, software: Mapping[str, str]) -> Mapping[str, str]:
    """The software that `study` started with. If none is recorded yet, `software` is, and is returned.

    What a study of an older version has not recorded, such as the digests of the user's own files, is recorded by the
    first machine whose other software is the same. Under the lock, so that of two first workers with different software
    one sees the other's. Raises StudyGone.
    """

    def work(connection: Connection) -> Mapping[str, str]:
        recorded = current(connection, study).software
        known = recorded or {}
        whole = {**software, **known}
        is_same = all(software.get(part, value) == value for part, value in known.items())
        if not is_same or whole == recorded:
            return known
        _set_attribute(connection, study.id, "software", whole)
        return whole

    return write(storage, study.name, work)


def record_precision(storage: RDBStorage, study: Study, precision: str) -> str:
    """The precision that `study` started with: the recorded one, else that of its trials, else this `precision`.

    Under the lock, as `record_software`. Raises StudyGone.
    """

    def work(connection: Connection) -> str:
        recorded = current(connection, study).precision
        if recorded is None:
            # Studies of older versions recorded it with each trial.
            of_trials = attributes.of_all_trials(connection, study.id, "precision")
            recorded = next((each for each in of_trials if isinstance(each, str)), precision)
            _set_attribute(connection, study.id, "precision", recorded)
        return recorded

    return write(storage, study.name, work)


def set_state(storage: RDBStorage, study: Study, state: State) -> None:
    """Opens, pauses or stops `study`. Its workers see it at their next beat or epoch, and give their trials back.

    Raises StudyGone.
    """
    write(storage, study.name, lambda connection: change_state(connection, current(connection, study).id, state))


def change_state(connection: Connection, study_id: int, state: State, pause_reason: str | None = None) -> None:
    """Sets the study's state in the caller's transaction; `pause_reason` is why Trialyard itself pauses it."""
    _set_attribute(connection, study_id, "state", state)
    _set_attribute(connection, study_id, "pause_reason", pause_reason)


def set_priority(storage: RDBStorage, study: Study, priority: int) -> None:
    """Sets the priority of `study`, 0 for the default. Its workers see it at their next look. Raises StudyGone."""

    def work(connection: Connection) -> None:
        _set_attribute(connection, current(connection, study).id, "priority", priority or None)

    write(storage, study.name, work)


def _set_attribute(connection: Connection, study_id: int, name: str, value: Any) -> None:
    stored, key = StudyUserAttributeModel, attributes.PREFIX + name
    connection.execute(delete(stored).where(stored.study_id == study_id, stored.key == key))
    if value is not None:
        connection.execute(insert(stored).values(study_id=study_id, key=key, value_json=json.dumps(value)))


# --- read -------------------------------------------------------------------------------------------------


def studies(storage: RDBStorage) -> list[Study]:
    """All readable studies of Trialyard, oldest first, in two statements.

    A study that is not readable is left out, with one warning in this process.
    """
    return read(storage, _load)


def find(storage: RDBStorage, name: str) -> Study:
    """The study of this name.

    Raises StudyGone if there is none; NotOurStudy if Trialyard did not create it; StudyUnreadable; and StorageError if
    it is of an older version, or its creation was cut off.
    """
    return read(storage, lambda connection: _find(connection, name))


def _find(connection: Connection, name: str) -> Study:
    study_id = find_study(connection, name)
    if study_id is None:
        raise StudyGone(_gone_text(name))
    if study_id in legacy.outdated(connection):
        raise StorageError(f"study {name!r} is of an older Trialyard: run `trialyard storage upgrade`")
    here = attributes.of_studies(connection, attributes.SHAPES, StudyModel.study_id == study_id)
    if not here or ("definition" not in here[0].values and here[0].problem is None):
        raise NotOurStudy(f"study {name!r} has no definition, so Trialyard did not make it: open it with plain Optuna")
    if here[0].problem is not None:
        raise StudyUnreadable(here[0].problem)
    found = _load(connection, StudyModel.study_id == study_id)
    if not found:
        raise StorageError(f"study {name!r} has no budget: run `trialyard create` for it again")
    return found[0]


def current(connection: Connection, study: Study) -> Study:
    """The study as it is now, in a transaction of the caller. Raises StudyGone if it was deleted."""
    now = _load(connection, StudyModel.study_id == study.id)
    if not now or now[0].name != study.name or now[0].incarnation != study.incarnation:
        again = find_study(connection, study.name) is not None
        raise StudyGone(
            f"study {study.name!r} was deleted, and another one made: start again" if again else _gone_text(study.name)
        )
    return now[0]


def by_id(connection: Connection, study_id: int) -> Study | None:
    """The study with this id; None if it was deleted, or is not readable."""
    return next(iter(_load(connection, StudyModel.study_id == study_id)), None)


def _gone_text(name: str) -> str:
    return f"study {name!r} is gone from the database: `trialyard create` makes it again"


def _load(connection: Connection, *where: ColumnElement[bool]) -> list[Study]:
    complete = [
        study
        for study in attributes.of_studies(connection, attributes.SHAPES, *where)
        if _is_readable(study) and {"budget", "definition", "incarnation"} <= study.values.keys()
    ]
    progress = study_progress.of_studies(connection, [study.study_id for study in complete])
    return [
        Study(
            id=study.study_id,
            name=study.name,
            incarnation=study.values["incarnation"],
            definition=study.values["definition"],
            data=study.values.get("data") or {},
            software=study.values.get("software"),
            precision=study.values.get("precision"),
            budget=Budget(**study.values["budget"]),
            state=study.values.get("state") or "open",
            pause_reason=study.values.get("pause_reason"),
            priority=study.values.get("priority") or 0,
            **progress[study.study_id],
        )
        for study in complete
        if study.study_id in progress  # else it was deleted between the two statements
    ]


def _is_readable(study: attributes.StudyAttributes) -> bool:
    if study.problem is not None and study.problem not in _warned:
        _warned.add(study.problem)
        log.warning("%s", study.problem)
    return study.problem is None


_warned: set[str] = set()


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


def check_direction(storage: RDBStorage, study: Study) -> None:
    """Raises WrongDirection unless the study maximizes exactly one value."""
    read(storage, lambda connection: require_direction(connection, study.id))


def require_direction(connection: Connection, study_id: int) -> None:
    """Raises WrongDirection unless the study maximizes exactly one value."""
    directions = (
        connection.execute(select(StudyDirectionModel.direction).where(StudyDirectionModel.study_id == study_id))
        .scalars()
        .all()
    )
    if len(directions) != 1:
        raise WrongDirection(f"has {len(directions)} objectives")
    if directions[0] != StudyDirection.MAXIMIZE:
        raise WrongDirection("minimizes its value")


def state_of(connection: Connection, study_id: int) -> State:
    """Whether the study is open, paused or stopped, in a transaction of the caller."""
    stored: State | None = attributes.of_study(connection, study_id, "state")
    return stored or "open"


def budget_of(connection: Connection, study_id: int) -> Budget | None:
    """The study's budget; None if it has none, because its creation was cut off."""
    stored = attributes.of_study(connection, study_id, "budget")
    return None if stored is None else Budget(**stored)


# --- sentences ------------------------------------------------------------------------------------------------


def started_outside_text(numbers: Sequence[int]) -> str:
    """A sentence for people about trials that were started outside Trialyard."""
    were, have = ("trial was", "has") if len(numbers) == 1 else ("trials were", "have")
    them = "it" if len(numbers) == 1 else "them"
    return (
        f"{len(numbers)} {were} started outside Trialyard and {have} not ended: {trials_text(numbers)}; no worker "
        f"waits for {them}, and `optuna tell` ends {them}"
    )


def left_waiting_text(waiting: int) -> str:
    """A sentence for people about trials that wait in a study whose budget is spent."""
    wait, them = ("trial waits", "it") if waiting == 1 else ("trials wait", "them")
    return (
        f"{waiting} {wait}, and the budget has no room for {them}: `trialyard create` with a larger --trials adds room"
    )
