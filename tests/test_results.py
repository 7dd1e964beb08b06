"""The best trial is the best complete one; the counts are exact; reading changes nothing."""

import dataclasses
import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from conftest import TRIVIAL
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from search.messages import Epoch
from storage import attempt_table, claims, database, ledger, owners
from storage.owners import Owner
from studies import findings, registry, results
from studies.definition import parse
from studies.errors import StudyError

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def _end(storage: RDBStorage, study: str, me: Owner, *ends: tuple[TrialState, float | None]) -> None:
    for state, value in ends:
        claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
        assert claim is not None
        attrs = {"failure": {"kind": "nan", "message": "the loss became nan"}} if state == FAIL else {"epochs": 2}
        claims.finish(storage, claim, state, value, attrs)


def test_the_best_is_the_first_of_the_highest_complete_ones(storage: RDBStorage, study: str, me: Owner) -> None:
    _end(storage, study, me, (COMPLETE, 0.7), (PRUNED, 0.99), (COMPLETE, 0.9), (FAIL, None), (COMPLETE, 0.9))
    best = results.best_trial(study, storage)
    assert (best.number, best.values) == (2, [0.9])
    rows = results.leaderboard(study, storage)
    assert [(row.rank, row.number, row.value, row.epochs) for row in rows] == [
        (1, 2, 0.9, 2),
        (1, 4, 0.9, 2),
        (3, 0, 0.7, 2),
    ]


def test_of_equally_accurate_trials_that_with_the_lowest_loss_is_the_best(either_url: str) -> None:
    storage = database.create(either_url)
    registry.create(parse(TRIVIAL), storage, {"fingerprint": "0" * 16})
    opened = registry.open("trivial", storage)
    # What an older version stored, what other programs may store, and what our trainer does.
    losses: list[Any] = [None, "low", True, math.nan, [0.0], 10**400, 0.25, 1e-05, 0.5, 0.25, 3]
    for value, loss in [*((0.9, loss) for loss in losses), (0.8, 0.1), (0.95, 0.9)]:
        attrs = {} if loss is None else {"val_loss": loss}
        opened.add_trial(optuna.trial.create_trial(value=value, user_attrs=attrs))
    expected = [12, 7, 6, 9, 8, 10, 0, 1, 2, 3, 4, 5, 11]
    for top in (1, 2, 3, 5, 8, 12, None):
        assert [row.number for row in results.leaderboard("trivial", storage, top=top)] == expected[:top]
    assert [trial.number for trial in findings.ranked(opened.trials)] == expected
    assert [curve.number for curve in results.curves_of(opened.trials, Path())] == expected
    storage.engine.dispose()


def test_without_a_complete_trial_there_is_no_best(storage: RDBStorage, study: str, me: Owner) -> None:
    assert results.leaderboard(study, storage) == []
    with pytest.raises(StudyError, match=r"no complete trial yet: `trialyard work trivial`"):
        results.best_trial(study, storage)
    _end(storage, study, me, *[(FAIL, None)] * 4, (PRUNED, 0.5))
    with pytest.raises(StudyError, match=r"ended without a complete trial \(4 failed, 1 pruned\)"):
        results.best_trial(study, storage)


def test_a_violated_constraint_never_wins(storage: RDBStorage, study: str, me: Owner) -> None:
    # As a study of somebody's own with constraints has them: in Optuna 5's form, and in the one before.
    constrained = (
        {"constraints:size": 1.5},
        {"constraints:size": -1.0},
        {"constraints": [-1.0, 2.0]},
        {"constraints": None},
    )
    for value, constraints in zip((0.99, 0.7, 0.98, 0.8), constrained, strict=True):
        claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
        assert claim is not None
        for key, constraint in constraints.items():
            storage.set_trial_system_attr(claim.trial_id, key, constraint)
        claims.finish(storage, claim, COMPLETE, value, {})
    assert results.best_trial(study, storage).number == 3
    assert [row.number for row in results.leaderboard(study, storage)] == [3, 1]
    assert [row.number for row in results.leaderboard(study, storage, top=1)] == [3]
    assert (results.status(study, storage).best, results.status(study, storage).best_number) == (0.8, 3)
    assert registry.open(study, storage).best_trial.number == 3  # as Optuna itself decides


def test_a_constraint_that_all_violate_is_named(storage: RDBStorage, study: str, me: Owner) -> None:
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    storage.set_trial_system_attr(claim.trial_id, "constraints:size", 1.5)
    claims.finish(storage, claim, COMPLETE, 0.9, {})
    assert results.status(study, storage).best is None
    with pytest.raises(
        StudyError, match="study 'trivial' has 1 complete trial, and none has a finite score and satisfies"
    ):
        results.best_trial(study, storage)


def test_a_curve_may_have_an_accuracy_that_is_not_finite(
    storage: RDBStorage, study: str, me: Owner, tmp_path: Path
) -> None:
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    epochs = [
        Epoch(
            epoch=number,
            loss=1.0,
            accuracy=accuracy,
            val_loss=2.0,
            val_accuracy=accuracy,
            seconds=1.0,
            images_per_second=9.0,
        )
        for number, accuracy in enumerate((math.nan, 0.5), start=1)
    ]
    (tmp_path / "history.json").write_text(json.dumps([epoch.to_json() for epoch in epochs], allow_nan=False))
    claims.finish(storage, claim, COMPLETE, 0.5, {"history": "history.json"})
    (curve,) = results.curves(study, storage, tmp_path)
    assert (math.isnan(curve.val_accuracy[0]), curve.val_accuracy[1], curve.val_loss) == (True, 0.5, (2.0, 2.0))


def test_a_leaderboard_is_the_same_however_many_trials_are_named(
    storage: RDBStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0.7, 0.9, 0.8):
        claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
        assert claim is not None
        opened = registry.open(study, storage)
        assert len(opened.trials) > claim.number  # Optuna's cache must have seen it
        optuna.Trial(opened, claim.trial_id).suggest_float("dropout", 0.0, 0.7)
        claims.finish(storage, claim, COMPLETE, value, {"epochs": 2, "parameters": 9, "seconds": 1.5})
    named = results.leaderboard(study, storage)
    assert [set(row.params) for row in named] == [{"dropout"}] * 3
    assert [(row.epochs, row.parameters, row.seconds) for row in named] == [(2, 9, 1.5)] * 3
    monkeypatch.setattr(results, "IDS_IN_CLAUSE", 1)
    assert results.leaderboard(study, storage) == named
    assert results.leaderboard(study, storage, top=2) == named[:2]
    assert [trial.params for trial in registry.open(study, storage).trials] == [
        row.params for row in sorted(named, key=lambda row: row.number)
    ]


def test_status_counts_exactly(storage: RDBStorage, study: str, me: Owner) -> None:
    status = results.status(study, storage)
    assert (status.budget, status.ended, status.best, status.seconds_left) == (5, False, None, None)
    _end(storage, study, me, (COMPLETE, 0.7), (PRUNED, 0.2), (FAIL, None))
    running, waiting = (claims.claim(storage, ledger.find(storage, study), me, 60.0) for _ in range(2))
    assert running is not None
    assert waiting is not None
    claims.requeue(storage, waiting, "interrupted", "")
    status = results.status(study, storage)
    assert (status.complete, status.pruned, status.failed, status.running, status.waiting) == (1, 1, 1, 1, 1)
    assert (status.best, status.best_number, status.failures) == (0.7, 0, ("nan: the loss became nan",))
    assert [running.number for running in status.workers] == [3]
    assert status.seconds_left is not None
    claims.finish(storage, running, COMPLETE, 0.8, {})
    _end(storage, study, me, (COMPLETE, 0.6))
    status = results.status(study, storage)
    assert (status.ended, status.seconds_left, status.best) == (True, 0.0, 0.8)


def test_the_time_left_follows_from_finished_trials_and_free_slots(storage: RDBStorage, study: str, me: Owner) -> None:
    _end(storage, study, me, (COMPLETE, 0.7), (COMPLETE, 0.8))
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    two_days, minute = timedelta(days=2), timedelta(minutes=1)
    with storage.engine.begin() as connection:
        rows, now = attempt_table.table, owners.database_now(connection)
        # Two trials of a minute, with two days between them, and the third one now.
        for trial, began in ((0, now - two_days), (1, now - minute)):
            mine = sqlalchemy.and_(rows.c.trial_id == trial + 1, rows.c.attempt == 1)
            connection.execute(sqlalchemy.update(rows).where(mine).values(began=began, ended=began + minute))
    assert results.status(study, storage).seconds_left == 180.0
    other = dataclasses.replace(me, slot="cpu:1")
    claims.beat(storage, {me: "a processor", other: "a processor"}, [claim])
    assert results.status(study, storage).seconds_left == 90.0


def test_the_hours_of_a_budget_limit_the_time_left(storage: RDBStorage, study: str, me: Owner) -> None:
    def status() -> results.Status:
        budget = ledger.Budget(trials=1000, hours=1.0)
        return results.status_of(dataclasses.replace(ledger.find(storage, study), budget=budget), storage)

    assert results.status(study, storage).hours_left is None
    assert status().hours_left == 1.0, "they begin with the first trial"
    _end(storage, study, me, (COMPLETE, 0.7))
    rows = attempt_table.table

    def moved(minutes_ago: int, minutes: int) -> results.Status:
        with storage.engine.begin() as connection:
            began = owners.database_now(connection) - timedelta(minutes=minutes_ago)
            values = {"began": began, "ended": began + timedelta(minutes=minutes)}
            connection.execute(sqlalchemy.update(rows).values(**values))
        return status()

    # 999 trials of 10 minutes would take days; one that starts in the last of the 20 minutes takes 10 more.
    assert moved(minutes_ago=40, minutes=10).seconds_left == pytest.approx(1800.0, abs=30.0)
    late = moved(minutes_ago=61, minutes=10)
    assert (late.hours_left, late.seconds_left, late.ended) == (0.0, 0.0, True)


def test_reading_changes_nothing(storage: RDBStorage, study: str, me: Owner) -> None:
    _end(storage, study, me, (COMPLETE, 0.7), (FAIL, None))

    def dump() -> list[str]:
        with storage.engine.connect() as connection:
            return list(connection.connection.driver_connection.iterdump())  # type: ignore[union-attr]

    before = dump()
    results.best_trial(study, storage)
    results.leaderboard(study, storage)
    results.status(study, storage)
    registry.open(study, storage)
    registry.names(storage)
    assert dump() == before
