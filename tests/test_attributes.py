"""Other programs' attributes with our names are ignored and raise no error, on both databases."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from storage import artifacts, attempt_table, attributes, claims, database, ledger, legacy, promises, transactions
from storage.errors import StudyUnreadable
from storage.ledger import Budget
from storage.owners import Owner
from storage.ranking import ranked
from storage.transactions import PatientStorage
from studies import notes, registry, results
from studies.definition import Definition
from studies.rendering import report

DATA = {"fingerprint": "0" * 16, "train": 100, "validation": 10}
JUNK: list[Any] = [None, True, -1, 4.5, "all", [], [1], {}, {"gpu_hours": 40}, [{"host": "a"}], {"kind": 1}]


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind, with the tables and no study."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


def _readable(storage: PatientStorage, name: str) -> None:
    """Calls every function that reads a study."""
    results.status(name, storage)
    results.leaderboard(name, storage)
    results.curves(name, storage)
    report(name, storage, "markdown")
    report(name, storage, "html")
    notes.publish(name, storage, Path("nowhere"), optuna.storages.get_storage(storage), last=True)
    promises.check(storage)
    claims.running_trials(storage, registry.find(name, storage).id)


def test_another_program_s_study_with_our_attribute_names_is_ignored(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    for at, value in enumerate(JUNK):
        other = optuna.create_study(study_name=f"other-{at}", storage=storage)
        for name in attributes.SHAPES:
            other.set_user_attr(name, value)
    assert registry.names(storage) == [study]
    assert [entry.name for entry in ledger.studies(storage)] == [study]
    assert promises.check(storage) == []
    assert claims.claim(storage, ledger.find(storage, study), me, 60.0) is not None


@pytest.mark.parametrize("name", list(attributes.SHAPES))
@pytest.mark.parametrize("value", [None, 4.5, [1], {"gpu_hours": 40}], ids=str)
def test_a_study_whose_attribute_has_a_wrong_shape_is_left_out_with_one_warning(
    storage: PatientStorage,
    trivial: Definition,
    study: str,
    name: str,
    value: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "data" and isinstance(value, dict):
        pytest.skip("it may hold anything")
    monkeypatch.setattr(ledger, "_warned", set())
    other = trivial.model_copy(update={"name": "other"})
    registry.create(other, storage, DATA)
    study_id = registry.find("other", storage).id
    storage.set_study_user_attr(study_id, f"trialyard:{name}", value)
    for _ in range(3):
        assert registry.names(storage) == [study]
    sentence = f"study 'other' is not readable, because Trialyard never writes its attribute trialyard:{name} as "
    assert caplog.text.count(sentence) == 1
    (problem,) = promises.check(storage)
    assert problem.startswith(sentence + json.dumps(value))
    for read_it in (ledger.find, lambda storage, name: results.status(name, storage)):
        with pytest.raises(StudyUnreadable, match="is not readable"):
            read_it(storage, "other")


@pytest.mark.parametrize("value", JUNK, ids=str)
def test_another_program_s_trial_with_our_attribute_names_breaks_nothing(
    storage: PatientStorage, study: str, me: Owner, value: Any
) -> None:
    study_id = registry.find(study, storage).id
    ledger.raise_budget(storage, ledger.find(storage, study), Budget(trials=20, hours=None))
    ours = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert ours is not None
    names = ("attempts", "import_key", "failure", "imported", "model", "history", "versions", "device", "label")
    attrs = dict.fromkeys((*names, "epochs", "best_epoch", "parameters", "seconds", "images_per_second"), value)
    opened = registry.open(study, storage)
    opened.add_trial(create_trial(value=0.9, user_attrs=attrs))
    opened.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    asked = opened.ask()
    for name in names:
        asked.set_user_attr(name, value)
    opened.enqueue_trial({}, user_attrs=attrs)
    _readable(storage, study)
    assert [holding.number for holding in claims.running_trials(storage, study_id)] == [0]
    (problem,) = promises.check(storage)
    assert problem == (
        f"study {study}: 1 trial was started outside Trialyard and has not ended: trial 3; "
        "no worker waits for it, and `optuna tell` ends it"
    )
    status = results.status(study, storage)
    assert (status.outside, status.failures) == ((3,), ("unknown: no reason was stored",))
    (row,) = results.leaderboard(study, storage)
    assert {type(cell) for cell in (row.epochs, row.parameters, row.seconds)} <= {int, float, type(None)}
    assert legacy.attempts_of(value) == []
    waiting = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert waiting is not None
    assert (waiting.number, waiting.attempt) == (4, 1)
    claims.finish(storage, waiting, TrialState.COMPLETE, 0.5, {})
    claims.finish(storage, ours, TrialState.COMPLETE, 0.5, {})


def test_hours_are_counted_from_a_trial_of_ours(storage: PatientStorage, study: str, me: Owner) -> None:
    storage.set_study_user_attr(ledger.find(storage, study).id, "trialyard:budget", {"trials": 20, "hours": 1.0})
    opened = registry.open(study, storage)
    for value in JUNK:
        opened.add_trial(create_trial(value=0.9, user_attrs={"attempts": value}))
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    assert not ledger.find(storage, study).has_ended
    with storage.engine.begin() as connection:
        connection.execute(attempt_table.table.update().values(began=datetime(2020, 1, 1)))
    claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
    assert claims.claim(storage, ledger.find(storage, study), me, 60.0) is None


@pytest.mark.parametrize(
    "below", [None, 3, "", ".", "/etc/passwd", "../x", "a/../../x", "a/..", "a\0b", {"a": 1}, ["a"]], ids=repr
)
def test_a_path_that_leads_outside_the_folder_is_not_followed(below: Any) -> None:
    assert artifacts.inside(Path("/folder"), below) is None


def test_a_path_below_the_folder_is_followed() -> None:
    assert artifacts.inside(Path("/folder"), "study/3/model.keras") == Path("/folder/study/3/model.keras")


@pytest.mark.parametrize("checkpoint", ["/etc/checkpoint.npz", "../../checkpoint.npz"])
def test_a_checkpoint_outside_the_folder_is_not_followed(
    storage: PatientStorage, study: str, me: Owner, checkpoint: str
) -> None:
    first = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert first is not None
    claims.requeue(storage, first, "interrupted", "")
    with storage.engine.begin() as connection:
        attempt_table.change(connection, first.trial_id, 1, checkpoint=checkpoint)
    second = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert second is not None
    assert second.checkpoints == (str(first.folder / artifacts.CHECKPOINT),)


def test_another_program_s_model_does_not_count_as_a_kept_model(storage: PatientStorage, study: str) -> None:
    opened = registry.open(study, storage)
    for model in ("resnet50", 3, "other/0/model.keras"):
        opened.add_trial(create_trial(value=0.9, user_attrs={"model": model}))
    study_id = registry.find(study, storage).id
    found = transactions.read(storage, lambda connection: ranked(connection, study_id, with_model=True))
    assert [standing.number for standing in found] == [2]
