"""A study is created whole or completed later, and never changed so that its trials cannot be compared."""

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from storage import claims
from storage.database import PatientStorage
from storage.errors import StorageError
from storage.workers import Worker
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
    assert registry.create(trivial, storage, DATA)
    assert not registry.create(trivial, storage, DATA)
    assert registry.names(storage) == ["trivial"]
    assert registry.definition_of("trivial", storage) == trivial


def test_a_grid_waits_in_the_queue_each_point_once(storage: PatientStorage, me: Worker) -> None:
    definition = parse(GRID)
    registry.create(definition, storage, DATA)
    registry.create(definition, storage, DATA)
    points = []
    while (claim := claims.claim(storage, "grid", me, 60.0)) is not None:
        study = registry.open("grid", storage)
        assert len(study.trials) == 4
        points.append(optuna.Trial(study, claim.trial_id).suggest_float("dropout", 0.0, 0.3, step=0.1))
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
    assert points == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("furnished", [False, True])
def test_a_creation_that_was_killed_half_way_is_completed(storage: PatientStorage, furnished: bool) -> None:
    definition = parse(GRID)
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "grid")
    if furnished:
        attributes = {"data": DATA, "definition": definition.to_json()}
        assert claims.found(storage, "grid", attributes, definition.queue())
    assert registry.names(storage) == []
    assert registry.create(definition, storage, DATA)
    assert claims.counts(storage, study_id).waiting == 4
    fixed = [trial.system_attrs["fixed_params"] for trial in storage.get_all_trials(study_id)]
    assert fixed == definition.queue()
    assert claims.budget(storage, study_id) == claims.Budget(trials=4, hours=None)


def test_a_larger_budget_is_taken_and_one_that_is_spent_refused(
    storage: PatientStorage, study: str, trivial: Definition, me: Worker
) -> None:
    def with_trials(trials: int) -> Definition:
        return trivial.model_copy(update={"budget": trivial.budget.model_copy(update={"trials": trials})})

    for _ in range(3):
        claims.claim(storage, study, me, 60.0)
    with pytest.raises(StorageError, match="fewer than the 3 trials"):
        registry.create(with_trials(2), storage, DATA)
    assert registry.create(with_trials(9), storage, DATA)
    found = claims.budget(storage, registry.study_id(study, storage))
    assert found is not None
    assert (found.trials, found.hours) == (9, None)


def test_another_definition_under_the_same_name_is_refused(
    storage: PatientStorage, study: str, trivial: Definition
) -> None:
    other = trivial.model_copy(update={"fixed": {"depth": 5}})
    with pytest.raises(StudyError, match=r"fixed.depth = 3 there and 5 here.*--name"):
        registry.create(other, storage, DATA)
    assert registry.definition_of(study, storage) == trivial


def test_other_data_are_refused(storage: PatientStorage, study: str, trivial: Definition) -> None:
    with pytest.raises(StudyError, match=r"began with other images .*put the same data in place"):
        registry.create(trivial, storage, {"fingerprint": "1" * 16})


def test_a_study_of_somebody_s_own_is_left_alone(storage: PatientStorage, trivial: Definition) -> None:
    own = optuna.create_study(study_name="trivial", storage=storage)
    own.tell(own.ask(), 1.0)
    with pytest.raises(StudyError, match="not one of Trialyard's: choose another name"):
        registry.create(trivial, storage, DATA)
    assert registry.names(storage) == []
    with pytest.raises(StudyError, match="open it with plain Optuna"):
        registry.definition_of("trivial", storage)


def test_an_unknown_study_is_named_with_the_nearest(storage: PatientStorage, study: str) -> None:
    with pytest.raises(StudyError, match=r"no study 'trivail' .*did you mean 'trivial'\?"):
        registry.open("trivail", storage)


def test_open_gives_optuna_s_own_study(storage: PatientStorage, study: str) -> None:
    opened = registry.open(study, storage)
    assert type(opened) is optuna.Study
    assert opened.direction == StudyDirection.MAXIMIZE
    assert optuna.load_study(study_name=study, storage=storage).user_attrs == opened.user_attrs
