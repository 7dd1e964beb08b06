"""A study is created completely, and never changed so that its trials cannot be compared."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import Connection, delete

from storage import artifacts, claims, database, ledger, promises, study_progress
from storage.owners import Owner
from storage.tables import StudyUserAttributeModel
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Definition, parse
from studies.errors import StudyError

DATA = {"fingerprint": "0" * 16}

GRID = """
name = "grid"
dataset = "digits"
model = "convnet"

[space]
dropout = { low = 0.0, high = 0.3, step = 0.1 }

[fixed]
depth = 3

[sampler]
kind = "grid"
"""


def test_a_study_is_created_once(storage: PatientStorage, trivial: Definition) -> None:
    assert registry.create(trivial, storage, DATA).changed
    assert not registry.create(trivial, storage, DATA).changed
    assert registry.names(storage) == ["trivial"]
    assert registry.definition_of("trivial", storage) == trivial


def test_a_grid_waits_in_the_queue_each_point_once(storage: PatientStorage, me: Owner) -> None:
    definition = parse(GRID)
    registry.create(definition, storage, DATA)
    registry.create(definition, storage, DATA)
    points = []
    while (claim := claims.claim(storage, ledger.find(storage, "grid"), me, 60.0)) is not None:
        study = registry.open("grid", storage)
        assert len(study.trials) == 4
        points.append(optuna.Trial(study, claim.trial_id).suggest_float("dropout", 0.0, 0.3, step=0.1))
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
    assert points == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("furnished", [False, True])
def test_a_creation_that_was_killed_half_way_is_completed(storage: PatientStorage, furnished: bool) -> None:
    definition = parse(GRID)
    if furnished:  # as an older version left it, which wrote the budget in a separate transaction
        registry.create(definition, storage, DATA)
        study_id = registry.find("grid", storage).id
        with storage.engine.begin() as connection:
            budget = (StudyUserAttributeModel.study_id == study_id, StudyUserAttributeModel.key == "trialyard:budget")
            connection.execute(delete(StudyUserAttributeModel).where(*budget))
    else:
        study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "grid")
    assert registry.names(storage) == []
    assert registry.create(definition, storage, DATA).changed
    assert ledger.counts(storage, study_id).waiting == 4
    fixed = [trial.system_attrs["fixed_params"] for trial in storage.get_all_trials(study_id)]
    assert fixed == definition.queue()
    assert ledger.find(storage, "grid").budget == ledger.Budget(trials=4, hours=None)


def test_a_larger_budget_is_taken_and_a_smaller_one_changes_nothing(
    storage: PatientStorage, study: str, trivial: Definition, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    def with_trials(trials: int) -> Definition:
        return trivial.model_copy(update={"budget": trivial.budget.model_copy(update={"trials": trials})})

    for _ in range(3):
        claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert registry.create(with_trials(9), storage, DATA).changed
    for fewer in (2, 5):
        assert not registry.create(with_trials(fewer), storage, DATA).changed
    assert f"study {study} keeps its larger budget of 9 trials" in caplog.text
    found = ledger.find(storage, study).budget
    assert (found.trials, found.hours) == (9, None)


def test_another_definition_under_the_same_name_is_refused(
    storage: PatientStorage, study: str, trivial: Definition
) -> None:
    other = trivial.model_copy(update={"fixed": {"depth": 5}})
    with pytest.raises(StudyError, match=r"fixed.depth = 3 in the database and 5 in this definition.*--name"):
        registry.create(other, storage, DATA)
    assert registry.definition_of(study, storage) == trivial


def test_other_data_are_refused(storage: PatientStorage, study: str, trivial: Definition) -> None:
    with pytest.raises(StudyError, match=r"started with other images .*use the same data"):
        registry.create(trivial, storage, {"fingerprint": "1" * 16})


SOFTWARE = {"trialyard": "0.1", "keras": "3.15", "backend": "tensorflow"}


def _recorded(storage: PatientStorage, study: str) -> Any:
    return storage.get_study_user_attrs(registry.find(study, storage).id).get("trialyard:software")


def test_the_first_worker_s_software_is_the_study_s(storage: PatientStorage, study: str) -> None:
    assert _recorded(storage, study) is None
    registry.check_software(registry.find(study, storage), storage, SOFTWARE)
    assert _recorded(storage, study) == SOFTWARE
    registry.check_software(registry.find(study, storage), storage, SOFTWARE)


@pytest.mark.parametrize(
    ("part", "here"), [("trialyard", "0.2"), ("keras", "3.16"), ("keras", "4.15"), ("backend", "jax")]
)
def test_other_software_is_refused_and_changes_nothing(
    storage: PatientStorage, study: str, part: str, here: str
) -> None:
    registry.check_software(registry.find(study, storage), storage, SOFTWARE)
    sentence = (
        f"started with {part} {SOFTWARE[part]}, and this machine has {part} {here}, so results may differ: install"
    )
    with pytest.raises(StudyError, match=sentence):
        registry.check_software(registry.find(study, storage), storage, SOFTWARE | {part: here})
    assert _recorded(storage, study) == SOFTWARE


OWN = {"own:build": "1" * 16}


def test_a_study_takes_the_precision_of_its_first_worker(storage: PatientStorage, study: str) -> None:
    found = registry.find(study, storage)
    assert ledger.record_precision(storage, found, "float32") == "float32"
    assert ledger.record_precision(storage, found, "mixed_bfloat16") == "float32"
    assert registry.find(study, storage).precision == "float32"


def test_an_older_study_keeps_the_precision_of_its_trials(storage: PatientStorage, study: str, me: Owner) -> None:
    found = registry.find(study, storage)
    claim = claims.claim(storage, found, me, 60.0)
    assert claim is not None
    claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {"precision": "mixed_bfloat16"})
    assert ledger.record_precision(storage, found, "float32") == "mixed_bfloat16"


def test_another_file_of_an_own_model_is_refused(storage: PatientStorage, study: str) -> None:
    registry.check_sources(registry.find(study, storage), OWN)  # nothing is recorded
    registry.check_software(registry.find(study, storage), storage, SOFTWARE | OWN)
    began = registry.find(study, storage)
    assert registry.sources(began) == OWN
    registry.check_sources(began, OWN)
    edited = {"own:build": "2" * 16}
    message = r"began with another file of own:build than this machine has, .*: bring the same file .*--name"
    with pytest.raises(StudyError, match=message):
        registry.check_sources(began, edited)
    with pytest.raises(StudyError, match=message):
        registry.check_software(began, storage, SOFTWARE | edited)
    assert registry.sources(registry.find(study, storage)) == OWN


def test_a_study_without_a_recorded_file_takes_that_of_the_first_machine_with_its_software(
    storage: PatientStorage, study: str
) -> None:
    registry.check_software(registry.find(study, storage), storage, SOFTWARE)  # as an older version recorded it
    with pytest.raises(StudyError, match=r"keras 3\.16"):
        registry.check_software(registry.find(study, storage), storage, SOFTWARE | OWN | {"keras": "3.16"})
    assert registry.sources(registry.find(study, storage)) == {}
    registry.check_software(registry.find(study, storage), storage, SOFTWARE | OWN)
    with pytest.raises(StudyError, match="another file of own:build"):
        registry.check_software(registry.find(study, storage), storage, SOFTWARE | {"own:build": "2" * 16})


def test_software_that_only_one_side_tells_of_is_not_compared(storage: PatientStorage, study: str) -> None:
    registry.check_software(registry.find(study, storage), storage, SOFTWARE)
    registry.check_software(registry.find(study, storage), storage, SOFTWARE | {"more": "1"})
    registry.check_software(registry.find(study, storage), storage, {"keras": "3.15"})


def test_of_two_first_workers_only_one_records_its_software(either_url: str, trivial: Definition) -> None:
    """The software is recorded under the study's lock, so that both workers cannot record their own."""
    storage = database.create(either_url)
    refused: list[str] = []
    for round_ in range(5):
        name = f"race-{round_}"
        registry.create(trivial.model_copy(update={"name": name}), storage, DATA)
        together = threading.Barrier(2)

        def begin(keras: str, name: str = name, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                registry.check_software(registry.find(name, storage), storage, SOFTWARE | {"keras": keras})
            except StudyError:
                refused.append(keras)

        threads = [threading.Thread(target=begin, args=(keras,)) for keras in ("3.14", "3.15")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == round_ + 1
        assert _recorded(storage, name)["keras"] != refused[-1]
    storage.engine.dispose()


def test_another_program_s_study_is_not_changed(storage: PatientStorage, trivial: Definition) -> None:
    own = optuna.create_study(study_name="trivial", storage=storage)
    own.tell(own.ask(), 1.0)
    with pytest.raises(StudyError, match="Trialyard did not make it: choose another name"):
        registry.create(trivial, storage, DATA)
    assert registry.names(storage) == []
    with pytest.raises(StudyError, match="open it with plain Optuna"):
        registry.definition_of("trivial", storage)


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        ([StudyDirection.MINIMIZE], "study 'trivial' minimizes its value, and Trialyard maximizes exactly one"),
        ([StudyDirection.MAXIMIZE] * 2, "study 'trivial' has 2 objectives, and Trialyard maximizes exactly one"),
    ],
)
def test_another_program_s_empty_study_is_accepted_only_if_it_maximizes(
    either_url: str, trivial: Definition, directions: list[StudyDirection], words: str
) -> None:
    storage = database.create(either_url)
    study_id = storage.create_new_study(directions, "trivial")
    with pytest.raises(StudyError, match=words + r".*--name, or remove it with `optuna delete-study --study-name t"):
        registry.create(trivial, storage, DATA)
    assert storage.get_study_user_attrs(study_id) == {}
    storage.delete_study(study_id)
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "trivial")
    assert registry.create(trivial, storage, DATA).changed
    # An older version took over any.
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE study_directions SET direction = 'MINIMIZE'")
    for refused in (
        lambda: registry.create(trivial, storage, DATA),
        lambda: registry.check_direction(registry.find("trivial", storage), storage),
    ):
        with pytest.raises(StudyError, match="study 'trivial' minimizes its value"):
            refused()
    (problem,) = promises.check(storage)
    assert problem.startswith("study trivial minimizes its value, and its samplers search for the worst accuracy: ")
    storage.engine.dispose()


def test_another_program_s_study_is_not_paused(storage: PatientStorage) -> None:
    optuna.create_study(study_name="plain", storage=storage)
    with pytest.raises(StudyError, match="'plain' has no definition"):
        registry.pause("plain", storage)
    assert optuna.load_study(study_name="plain", storage=storage).user_attrs == {}


def test_an_unknown_study_is_named_with_the_nearest(storage: PatientStorage, study: str) -> None:
    with pytest.raises(StudyError, match=r"no study 'trivail' .*did you mean 'trivial'\?"):
        registry.open("trivail", storage)


def test_a_study_that_is_deleted_while_all_are_read_is_left_out(
    either_url: str, trivial: Definition, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = database.create(either_url)
    for name in ("kept", "deleted"):
        registry.create(trivial.model_copy(update={"name": name}), storage, DATA)
    count = study_progress.of_studies

    def count_after_a_deletion(connection: Connection, study_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        if len(study_ids) == 2:
            other = database.connect(either_url)
            claims.delete(other, ledger.find(other, "deleted"), 60.0)
            other.engine.dispose()
        return count(connection, study_ids)

    monkeypatch.setattr(study_progress, "of_studies", count_after_a_deletion)
    assert [study.name for study in ledger.studies(storage)] == ["kept"]
    storage.engine.dispose()


def test_open_gives_optuna_s_own_study(storage: PatientStorage, study: str) -> None:
    opened = registry.open(study, storage)
    assert type(opened) is optuna.Study
    assert opened.direction == StudyDirection.MAXIMIZE
    assert optuna.load_study(study_name=study, storage=storage).user_attrs == opened.user_attrs


def test_a_database_file_that_was_replaced_is_seen(home: Path, trivial: Definition) -> None:
    url = "sqlite:///studies.db"
    created = database.create(url)
    registry.create(trivial, created, DATA)
    assert registry.names(url) == [trivial.name]
    for storage in (created, registry.storage_of(url)):
        storage.engine.dispose()  # the last one to leave brings SQLite's log into the file
    (home / "studies.db").rename(home / "old.db")
    database.create(url).engine.dispose()
    assert registry.names(url) == []
    assert registry.names("sqlite:///old.db") == [trivial.name]


def test_a_study_of_any_name_has_a_lock_and_a_folder(storage: PatientStorage, study: str, me: Owner) -> None:
    """Ours have plain names; plain Optuna copies a study under any other."""
    for name in ("\u6570\u5b57\u8a8d\u8b58" * 10, "../../outside"):
        optuna.copy_study(from_study_name=study, from_storage=storage, to_storage=storage, to_study_name=name)
        claim = claims.claim(storage, ledger.find(storage, name), me, 60.0)
        assert claim is not None
        assert artifacts.inside(Path("folder"), str(claim.folder)) is not None
        assert str(claim.folder).startswith("study-")
