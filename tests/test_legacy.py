"""Data of older versions never breaks a command. `storage check` finds it, and `storage upgrade` repairs it."""

import math
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import optuna
import pytest
import sqlalchemy
from conftest import TRIVIAL, attempts_at
from optuna.trial import TrialState

from search import checks
from storage import attempt_table, attributes, claims, database, ledger, legacy, metric, openings, promises
from storage.errors import StorageError
from storage.owners import Owner
from storage.tables import TrialHeartbeatModel, TrialValueModel, set_trial_attributes, update_trial, value_row
from storage.transactions import PatientStorage
from studies import registry, results
from studies.definition import Data, Definition, parse

DATA = {"fingerprint": "0" * 16, "train": 100, "validation": 10}


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind, with the tables and no study."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


@pytest.fixture
def scores(storage: PatientStorage, trivial: Definition, me: Owner) -> str:
    """A study whose complete trials have the scores 0.5, NaN, infinity, 0.7 and minus infinity."""
    registry.create(trivial, storage, DATA)
    for value in (0.5, math.nan, math.inf, 0.7, -math.inf):
        claim = claims.claim(storage, ledger.find(storage, trivial.name), me, 60.0)
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
    assert results.best_trial(scores, storage).number == 3
    assert [(row.number, row.value) for row in results.leaderboard(scores, storage)] == [(3, 0.7), (0, 0.5)]
    status = results.status(scores, storage)
    assert (status.best, status.complete, status.ended) == (0.7, 5, True)
    assert [curve.number for curve in results.curves(scores, storage)] == [3, 0]


def test_a_study_with_a_score_of_nan_is_read_by_optuna(storage: PatientStorage, scores: str) -> None:
    trials = registry.open(scores, storage).trials
    assert [trial.values for trial in trials] == [[0.5], None, [math.inf], [0.7], [-math.inf]]
    assert trials[1].state == TrialState.FAIL
    assert storage.get_trial(trials[1]._trial_id).state == TrialState.FAIL


def test_check_finds_scores_that_are_not_finite_and_upgrade_repairs_them(
    storage: PatientStorage, scores: str, either_url: str
) -> None:
    (problem,) = promises.check(storage)
    assert problem == (
        f"study {scores}: trials 1, 2, 4 are complete without a finite score: `trialyard storage upgrade` marks them "
        "as failed"
    )
    _, repaired = database.upgrade(either_url)
    assert repaired == [f"study {scores}: trials 1, 2, 4 are now marked as failed, without a finite score"]
    assert promises.check(storage) == []
    counts = ledger.counts(storage, registry.find(scores, storage).id)
    assert counts == ledger.Counts(complete=2, pruned=0, failed=3, running=0, waiting=0)
    study = registry.open(scores, storage)
    assert [trial.values for trial in study.trials] == [[0.5], None, None, [0.7], None]
    assert study.best_trial.number == 3
    assert study.trials[1].user_attrs["failure"]["kind"] == "nan"
    (failure,) = results.status(scores, storage).failures
    assert failure.startswith("nan: its score was not a finite number")
    assert database.upgrade(either_url)[1] == []


# --- attributes without a prefix --------------------------------------------------------------------------


def _make_old(storage: PatientStorage, name: str) -> None:
    """Names the attributes of a study as the older version did, and its metric not at all."""
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DELETE FROM study_system_attributes WHERE key = '{metric.KEY}'"))
        connection.execute(
            sqlalchemy.text(
                "UPDATE study_user_attributes "
                "SET key = replace(replace(key, 'trialyard:incarnation', 'founded'), 'trialyard:', '') "
                "WHERE study_id = (SELECT study_id FROM studies WHERE study_name = :name)"
            ),
            {"name": name},
        )


@pytest.fixture
def old(storage: PatientStorage, trivial: Definition, me: Owner) -> str:
    """A study with every attribute and one trial, as the older version left it."""
    registry.create(trivial, storage, DATA)
    registry.check_software(registry.find(trivial.name, storage), storage, {"trialyard": "0.1", "keras": "3.15"})
    registry.pause(trivial.name, storage)
    registry.resume(trivial.name, storage)
    claim = claims.claim(storage, ledger.find(storage, trivial.name), me, 60.0)
    assert claim is not None
    claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
    _make_old(storage, trivial.name)
    return trivial.name


OLD_ATTEMPT = {
    "machine": "a/b",
    "host": "there",
    "pid": 7,
    "born": 12.5,
    "slot": "cpu:0",
    "began": "2026-01-02T03:04:05+00:00",
}


OF_0_1 = {"budget", "state", "incarnation", "definition", "data", "software"}  # the attributes of a study


def _with_old_attempts(storage: PatientStorage, trial_id: int, attempts_json: list[dict[str, Any]]) -> None:
    """Puts a trial's attempts where older versions had them."""
    with storage.engine.begin() as connection:
        connection.execute(attempt_table.table.delete().where(attempt_table.table.c.trial_id == trial_id))
        set_trial_attributes(connection, trial_id, {"attempts": attempts_json})
        beat = datetime(2026, 1, 2, 4, 0, 0)
        connection.execute(sqlalchemy.insert(TrialHeartbeatModel).values(trial_id=trial_id, heartbeat=beat))


def test_a_database_of_older_studies_alone_says_what_to_run(storage: PatientStorage, old: str, either_url: str) -> None:
    for call in (database.connect, database.create):
        with pytest.raises(StorageError, match=rf"older Trialyard \({old}\): run `trialyard storage upgrade`"):
            call(either_url)


def test_upgrade_gives_the_attributes_of_older_studies_their_prefix(
    storage: PatientStorage, old: str, either_url: str, trivial: Definition, me: Owner
) -> None:
    assert registry.names(storage) == []
    before = storage.get_study_user_attrs(storage.get_study_id_from_name(old))
    assert set(before) == {legacy.OLD_NAMES.get(name, name) for name in attributes.SHAPES if name in OF_0_1}
    _, repaired = database.upgrade(either_url)
    assert repaired == [f"study {old}: brought over from an older Trialyard"]
    after = storage.get_study_user_attrs(registry.find(old, storage).id)
    changed = {"founded", "software"}
    kept = {f"trialyard:{name}": value for name, value in before.items() if name not in changed}
    assert after.items() >= kept.items()
    assert set(after) - set(kept) == {"trialyard:incarnation", "trialyard:software"}
    assert after["trialyard:software"] == {"keras": "3.15", "trialyard": checks.software()["trialyard"]}
    assert len(after["trialyard:incarnation"]) == 32
    assert registry.open(old, storage).metric_names == ["validation accuracy"]
    assert registry.names(storage) == [old]
    assert promises.check(storage) == []
    assert not registry.create(trivial, storage, DATA).changed
    assert claims.claim(storage, ledger.find(storage, old), me, 60.0) is not None
    assert database.upgrade(either_url)[1] == []
    database.connect(either_url).engine.dispose()


@pytest.mark.parametrize(
    ("fixed", "averages"), [({"depth": 5}, "keras"), ({"depth": 3, "batch_norm": True}, "keras"), ({"depth": 3}, None)]
)
def test_an_older_study_keeps_its_way_of_scoring(
    storage: PatientStorage, trivial: Definition, either_url: str, fixed: dict[str, Any], averages: str | None
) -> None:
    """Its trials were scored with Keras's own averages: those to come must be, or they could not be compared."""
    created = registry.create(trivial.model_copy(update={"fixed": fixed}), storage, DATA)
    registry.check_software(created.study, storage, {"trialyard": "0.1"})
    _make_old(storage, trivial.name)
    _, repaired = database.upgrade(either_url)
    assert registry.definition_of(trivial.name, storage).fixed.get("batch_norm_averages") == averages
    elsewhere = [sentence for sentence in repaired if "at depth 5 the dropout is behind the pooling now" in sentence]
    assert len(elsewhere) == (fixed == {"depth": 5})
    assert registry.find(trivial.name, storage).software == {
        "trialyard": "0.1" if elsewhere else checks.software()["trialyard"]
    }


@pytest.mark.parametrize(("images", "kept"), [({"limit": 60}, True), ({"limit": 60, "validation": "test"}, False)])
def test_an_older_study_keeps_its_validation_images(
    storage: PatientStorage, trivial: Definition, either_url: str, images: dict[str, Any], kept: bool
) -> None:
    """They were a share of those of the limit."""
    registry.create(trivial.model_copy(update={"data": Data(**images)}), storage, DATA)
    _make_old(storage, trivial.name)
    database.upgrade(either_url)
    assert registry.definition_of(trivial.name, storage).data == Data(**images, limit_includes_validation=kept)


def test_older_studies_among_current_ones_are_named(
    storage: PatientStorage, old: str, either_url: str, trivial: Definition, caplog: pytest.LogCaptureFixture
) -> None:
    registry.create(trivial.model_copy(update={"name": "new"}), storage, DATA)
    database.connect(either_url).engine.dispose()
    assert (
        f"these studies were made by an older Trialyard and are left out: {old}; see `trialyard storage check`"
        in caplog.text
    )
    assert registry.names(storage) == ["new"]
    assert promises.check(storage) == [
        f"study {old} is of an older Trialyard, and is left out: run `trialyard storage upgrade`"
    ]
    with pytest.raises(StorageError, match="of an older Trialyard: run `trialyard storage upgrade`"):
        results.status(old, storage)
    with pytest.raises(StorageError, match="of an older Trialyard: run `trialyard storage upgrade`"):
        registry.create(trivial, storage, DATA)


def test_openings_of_test_images_move_to_their_table(storage: PatientStorage, study: str, either_url: str) -> None:
    """They were counted in an attribute of the study, which was deleted with it."""
    study_id = registry.find(study, storage).id
    for name, value in (("test_openings", 2), ("last_test_opening", "a" * 32)):
        storage.set_study_user_attr(study_id, f"trialyard:{name}", value)
    for _ in range(2):
        database.upgrade(either_url)
        assert openings.count(storage, DATA["fingerprint"]) == 2
    assert not [name for name in storage.get_study_user_attrs(study_id) if "opening" in name]


def test_another_program_s_study_is_not_upgraded(storage: PatientStorage, study: str, either_url: str) -> None:
    others = {
        "budget": {"trials": 5, "hours": None},
        "founded": "2020-01-01",
        "state": "open",
        "definition": {"name": "x"},
        "data": {},
    }
    plain = optuna.create_study(study_name="plain", storage=storage)
    for name, value in others.items():
        plain.set_user_attr(name, value)
    assert database.upgrade(either_url)[1] == []
    assert plain.user_attrs == others


def test_attempts_of_older_versions_move_to_their_table(
    storage: PatientStorage, study: str, either_url: str, me: Owner
) -> None:
    """A finished trial of two attempts, a running one, a waiting one, and one that others gave such an attribute."""
    ids = []
    for _ in range(3):
        claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
        assert claim is not None
        claims.record_epochs(storage, claim, {1: 0.1, 2: 0.2, 3: 0.3})
        ids.append(claim.trial_id)
    finished, running, waiting = ids
    registry.open(study, storage).ask().set_user_attr("attempts", 3)
    crashed = OLD_ATTEMPT | {"ended": "2026-01-02T03:30:00+00:00", "outcome": "crashed", "why": "a signal", "epoch": 2}
    last = OLD_ATTEMPT | {"ended": "2026-01-02T03:40:00+00:00", "outcome": "finished", "resumed_after": 2}
    _with_old_attempts(storage, finished, [crashed, last])
    gone = {"machine": me.machine, "pid": 99_999_999}  # this machine has no such process
    _with_old_attempts(storage, running, [OLD_ATTEMPT | gone])
    _with_old_attempts(storage, waiting, [crashed | {"outcome": "interrupted"}])
    with storage.engine.begin() as connection:
        for trial_id, state in ((finished, TrialState.COMPLETE), (waiting, TrialState.WAITING)):
            update_trial(connection, trial_id, state=state)
        connection.execute(sqlalchemy.insert(TrialValueModel).values(value_row(finished, 0.3)))
    _make_old(storage, study)

    database.upgrade(either_url)
    first, second = attempts_at(storage, finished)
    assert (first.outcome, first.reason, first.epoch, first.checkpoint) == ("crashed", "a signal", 2, None)
    assert (second.outcome, second.resumed_after, second.epoch) == ("finished", 2, 3)
    assert (second.owner.host, second.began, second.ended) == (
        "there",
        datetime(2026, 1, 2, 3, 4, 5),
        datetime(2026, 1, 2, 3, 40),
    )
    (attempt,) = attempts_at(storage, running)
    assert (attempt.ended, attempt.outcome, attempt.beat) == (None, None, datetime(2026, 1, 2, 4, 0, 0))
    assert (attempt.epoch, attempt.checkpoint) == (3, f"{study}/1/checkpoint.npz")
    (attempt,) = attempts_at(storage, waiting)
    assert (attempt.outcome, attempt.checkpoint) == ("interrupted", f"{study}/2/checkpoint.npz")
    trials = registry.open(study, storage).trials
    assert [trial.user_attrs.get("attempts") for trial in trials] == [None, None, None, 3]
    again = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert again is not None
    assert (again.number, again.attempt) == (1, 2), "its worker is gone"
    assert again.checkpoints == (f"{study}/1/checkpoint.npz",)


def test_an_older_study_that_searches_batch_norm_keeps_its_scores(
    storage: PatientStorage, trivial: Definition, either_url: str
) -> None:
    searched = parse(TRIVIAL.replace("[fixed]", "batch_norm = { choices = [false, true] }\n\n[fixed]"))
    registry.create(searched, storage, DATA)
    _make_old(storage, searched.name)
    database.upgrade(either_url)
    assert registry.definition_of(searched.name, storage).fixed["batch_norm_averages"] == "keras"


def test_creation_does_not_take_a_database_of_an_older_version(storage: PatientStorage, either_url: str) -> None:
    with storage.engine.begin() as connection:
        attempt_table.table.drop(connection)
    with pytest.raises(StorageError, match="run `trialyard storage upgrade`"):
        database.create(either_url)
