"""What older versions left in the database never breaks a command, is found by the check, and is repaired."""

import math
from collections.abc import Iterator

import pytest
import sqlalchemy
from optuna.storages._rdb.models import TrialValueModel
from optuna.trial import TrialState

from storage import claims, database
from storage.database import PatientStorage
from storage.workers import Worker
from studies import queries, registry
from studies.definition import Definition

DATA = {"fingerprint": "0" * 16, "train": 100, "validation": 10}


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind, with the tables and no study."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


@pytest.fixture
def scores(storage: PatientStorage, trivial: Definition, me: Worker) -> str:
    """A study whose complete trials have the scores 0.5, NaN, infinity, 0.7 and minus infinity."""
    registry.create(trivial, storage, DATA)
    for value in (0.5, math.nan, math.inf, 0.7, -math.inf):
        claim = claims.claim(storage, trivial.name, me, 60.0)
        assert claim is not None
        claims.finish(storage, claim, TrialState.COMPLETE, 0.0, {})
        number, kind = TrialValueModel.value_to_stored_repr(value)  # as the older version did
        with storage.engine.begin() as connection:
            connection.execute(
                sqlalchemy.update(TrialValueModel)
                .where(TrialValueModel.trial_id == claim.trial_id)
                .values(value=number, value_type=kind)
            )
    return trivial.name


def test_a_score_that_is_not_finite_is_in_no_ranking(storage: PatientStorage, scores: str) -> None:
    assert queries.best_trial(scores, storage).number == 3
    assert [(row.number, row.value) for row in queries.leaderboard(scores, storage)] == [(3, 0.7), (0, 0.5)]
    status = queries.status(scores, storage)
    assert (status.best, status.complete, status.ended) == (0.7, 5, True)
    assert [curve.number for curve in queries.curves(scores, storage)] == [3, 0]


def test_a_study_with_a_score_of_nan_is_read_by_optuna(storage: PatientStorage, scores: str) -> None:
    trials = registry.open(scores, storage).trials
    assert [trial.values for trial in trials] == [[0.5], None, [math.inf], [0.7], [-math.inf]]
    assert trials[1].state == TrialState.FAIL
    assert storage.get_trial(trials[1]._trial_id).state == TrialState.FAIL


def test_check_finds_scores_that_are_not_finite_and_upgrade_repairs_them(
    storage: PatientStorage, scores: str, either_url: str
) -> None:
    (problem,) = claims.check(storage)
    assert problem == (
        f"study {scores}: trials 1, 2, 4 are complete without a finite score: `trialyard storage upgrade` marks them "
        "as failed"
    )
    _, repaired = database.upgrade(either_url)
    assert repaired == [f"study {scores}: trials 1, 2, 4 are failed now, for want of a finite score"]
    assert claims.check(storage) == []
    counts = claims.counts(storage, registry.study_id(scores, storage))
    assert counts == claims.Counts(complete=2, pruned=0, failed=3, running=0, waiting=0)
    study = registry.open(scores, storage)
    assert [trial.values for trial in study.trials] == [[0.5], None, None, [0.7], None]
    assert study.best_trial.number == 3
    assert study.trials[1].user_attrs["failure"]["kind"] == "nan"
    (failure,) = queries.status(scores, storage).failures
    assert failure.startswith("nan: its score was not a finite number")
    assert database.upgrade(either_url)[1] == []
