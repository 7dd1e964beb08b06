"""Which promises the studies in a database do not keep: for `trialyard storage check`."""

from optuna.storages import RDBStorage
from sqlalchemy import Connection, func, select

from storage import attempt_table, attributes, ledger, legacy, study_progress
from storage.errors import WrongDirection, many
from storage.tables import TrialModel
from storage.transactions import read


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
        ledger.require_direction(connection, study_id)
    except WrongDirection as wrong:
        problems.append(
            f"study {name} {wrong}, and its samplers search for the worst accuracy: `trialyard delete {name}`, and "
            "create it again"
        )
    limit = ledger.budget_of(connection, study_id)
    if limit is None:
        problems.append(f"study {name}: it has no budget: `trialyard create` with its definition completes it")
    else:
        progress = study_progress.of_studies(connection, [study_id])[study_id]
        begun = progress["finished"] + progress["running"]
        if begun > limit.total:
            problems.append(f"study {name}: it has {many(begun, 'trial')}, but its budget is {limit.total}")
        imported = len(ledger.imported_digests(connection, study_id))
        if imported != limit.imported:
            problems.append(f"study {name}: {many(imported, 'imported trial')}, and its budget says {limit.imported}")
    twice = connection.execute(
        select(TrialModel.number)
        .where(TrialModel.study_id == study_id)
        .group_by(TrialModel.number)
        .having(func.count() > 1)
    ).scalars()
    problems += [f"study {name}: two trials have the number {number}" for number in twice]
    outside = attempt_table.started_outside(connection, study_id)
    problems += [f"study {name}: {ledger.started_outside_text(outside)}"] if outside else []
    return problems + legacy.problems(connection, study_id, name)
