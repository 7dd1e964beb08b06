"""A study that exists gets more to do: points of a person's own, and its failed trials once more."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

import studies
from storage import claims, database, ledger, openings, promises, queue, transactions
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Definition, from_json, parse
from studies.errors import StudyError

DATA = {"fingerprint": "0" * 16}


def _claim(storage: PatientStorage, study: str, me: Owner) -> claims.Claim:
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    return claim


def _end(storage: PatientStorage, study: str, me: Owner, rate: float, *, fails: bool = False) -> None:
    claim = _claim(storage, study, me)
    claims.begin(storage, claim, {"dropout": (FloatDistribution(0.0, 0.7), rate)})
    if fails:
        claims.finish(storage, claim, TrialState.FAIL, None, {"failure": {"kind": "error", "message": "no luck"}})
    else:
        claims.finish(storage, claim, TrialState.COMPLETE, 0.9, {})


def _listed(storage: PatientStorage, study: str, number: int) -> Any:
    return registry.open(study, storage).trials[number].system_attrs["fixed_params"]


def test_a_point_is_tried_next_and_is_one_of_the_budget_s(storage: PatientStorage, study: str, me: Owner) -> None:
    _end(storage, study, me, 0.1)
    assert studies.enqueue(study, {"dropout": 0}, storage) == 1
    assert _listed(storage, study, 1) == {"dropout": 0.0}
    assert type(_listed(storage, study, 1)["dropout"]) is float
    assert ledger.find(storage, study).budget.trials == 5
    assert _claim(storage, study, me).number == 1


@pytest.mark.parametrize("late", [False, True])
def test_the_budget_grows_where_it_has_no_room(either_url: str, trivial: Definition, me: Owner, late: bool) -> None:
    storage = database.create(either_url)
    registry.create(trivial, storage, DATA)
    for trial in range(5):
        _end(storage, "trivial", me, trial / 10, fails=trial == 3)
    assert ledger.find(storage, "trivial").has_ended
    if late:
        assert studies.enqueue("trivial", {"dropout": 0.65}, storage) == 5
    assert studies.retry("trivial", storage) == [5 + late]
    found = ledger.find(storage, "trivial")
    assert (found.budget.trials, found.waiting, found.has_ended) == (6 + late, 1 + late, False)
    repeated = registry.open("trivial", storage).trials[-1]
    assert repeated.system_attrs["fixed_params"] == {"dropout": 0.3}
    assert repeated.user_attrs["retry_of"] == 3
    assert studies.retry("trivial", storage) == [], "each is repeated once"
    assert promises.check(storage) == []
    storage.engine.dispose()


def test_a_repeated_trial_that_fails_again_is_repeated_again(storage: PatientStorage, study: str, me: Owner) -> None:
    _end(storage, study, me, 0.2, fails=True)
    assert studies.retry(study, storage) == [1]
    _end(storage, study, me, 0.2, fails=True)
    assert studies.retry(study, storage) == [2]
    # The failed ones have spent their parts of it: 5 that did not fail are still to come.
    assert ledger.find(storage, study).budget.trials == 7


POINTS = """
name = "points"
dataset = "digits"
model = "convnet"
[space]
depth = { choices = [3, 5] }
dropout = { low = 0.0, high = 0.5, when = { depth = 3 } }
[sampler]
kind = "points"
[[points]]
depth = 5
"""


def test_a_point_that_differs_in_the_last_digit_is_the_same_one(storage: PatientStorage, study: str, me: Owner) -> None:
    """Optuna adds up the steps of a range, and a person writes the sum."""
    _end(storage, study, me, 0.1 + 0.2)
    with pytest.raises(StudyError, match="trial 0 of study 'trivial' has these hyperparameters already"):
        studies.enqueue(study, {"dropout": 0.3}, storage)


@pytest.mark.parametrize(
    ("name", "point", "words"),
    [
        ("nothing", {"dropout": 0.1}, "there is no study 'nothing'"),
        ("trivial", {}, "a point needs at least one of dropout"),
        ("trivial", {"dropuot": 0.1}, "study 'trivial': dropuot = 0.1: there is no 'dropuot' in [space]; did you mean"),
        ("trivial", {"dropout": 0.9}, "study 'trivial': dropout = 0.9 must be from 0 to 0.7, as space.dropout says"),
        ("trivial", {"dropout": "high"}, "study 'trivial': dropout = \"high\" must be a number"),
        ("trivial", {"dropout": [0.1]}, "study 'trivial': "),
        ("trivial", {"dropout": 0.25}, "trial 0 of study 'trivial' has these hyperparameters already"),
        ("points", {"depth": 5, "dropout": 0.1}, "study 'points': dropout = 0.1 does not apply, as space.dropout.when"),
        ("points", {"depth": 3}, "study 'points': the point has no 'dropout'"),
        ("points", {"depth": 5}, "trial 0 of study 'points' has these hyperparameters already"),
        ("stopped", {"dropout": 0.1}, "study 'stopped' is stopped: `trialyard resume stopped` first"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    storage: PatientStorage, study: str, trivial: Definition, me: Owner, name: str, point: Mapping[str, Any], words: str
) -> None:
    _end(storage, study, me, 0.25)
    registry.create(parse(POINTS), storage, DATA)
    registry.create(trivial.model_copy(update={"name": "stopped"}), storage, DATA)
    registry.stop("stopped", storage)
    before = [(each.name, each.budget, each.waiting) for each in ledger.studies(storage)]
    with pytest.raises(StudyError) as raised:
        studies.enqueue(name, point, storage)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)
    assert [(each.name, each.budget, each.waiting) for each in ledger.studies(storage)] == before


def test_the_commands_do_the_same(finished_study: str, start: Callable[..., Any]) -> None:
    from conftest import ended

    line = "trial 5 of trivial is in the queue; if no worker is waiting, run `trialyard work trivial`\n"
    assert ended(start("enqueue", finished_study, "dropout=0.55"))[0] == line
    assert ended(start("retry", finished_study))[0].startswith("trial 6 of trivial is in the queue; ")
    assert ended(start("retry", finished_study))[0] == f"no failed trial of {finished_study} is left to repeat\n"
    assert "write it as depth=5" in ended(start("enqueue", finished_study, "dropout"), 2)[1]
    assert "must be from 0 to 0.7" in ended(start("enqueue", finished_study, "dropout=7"), 1)[1]
    assert studies.status(finished_study).waiting == 2


def test_an_answer_that_was_lost_counts_nothing_twice(
    storage: PatientStorage, study: str, trivial: Definition, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks between the commit and its answer, and the same is written again."""

    def twice(storage: PatientStorage, study: str | None, work: Callable[[Any], Any]) -> Any:
        transactions.write(storage, study, work)
        return transactions.write(storage, study, work)

    monkeypatch.setattr(queue, "write", twice)
    monkeypatch.setattr(ledger, "write", twice)
    for number in (0, 1):
        assert studies.enqueue(study, {"dropout": number / 2}, storage) == number
    _end(storage, study, me, 0.5, fails=True)
    assert studies.retry(study, storage) == [2]
    found = ledger.find(storage, study)
    assert (found.finished, found.waiting) == (1, 2)
    for name in ("one", "other", "other"):  # the last one exists, and opens nothing again
        registry.create(trivial.model_copy(update={"name": name}), storage, DATA, opens_tests_of=study)
    assert openings.count(storage, DATA["fingerprint"]) == 2
    assert promises.check(storage) == []


def test_what_is_added_to_a_grid_larger_than_its_budget_comes_next_and_costs_one_trial(
    storage: PatientStorage, trivial: Definition, me: Owner
) -> None:
    table = trivial.to_json() | {"name": "grid", "sampler": {"kind": "grid", "seed": 0}}
    table["space"] = {"dropout": {"type": "float", "low": 0.0, "high": 0.5, "step": 0.05}}
    registry.create(from_json(table | {"budget": {"trials": 2, "epochs": 1}}), storage, DATA)
    for number in (0, 1):
        claim = _claim(storage, "grid", me)
        assert claim.number == number
        rate = _listed(storage, "grid", number)["dropout"]
        claims.begin(storage, claim, {"dropout": (FloatDistribution(0.0, 0.5, step=0.05), rate)})
        failure = {"failure": {"kind": "error", "message": "no luck"}}
        claims.finish(storage, claim, (TrialState.FAIL, TrialState.COMPLETE)[number], (None, 0.9)[number], failure)
    assert studies.retry("grid", storage) == [11]
    found = ledger.find(storage, "grid")
    assert (found.budget.trials, found.waiting) == (3, 10)
    assert _claim(storage, "grid", me).number == 11
    assert claims.claim(storage, ledger.find(storage, "grid"), me, 60.0) is None


def test_a_point_has_what_its_conditions_need(storage: PatientStorage, trivial: Definition) -> None:
    table = trivial.to_json() | {"name": "conditional", "fixed": {}}
    table["space"] = {
        "depth": {"choices": [3, 5]},
        "dropout": {"type": "float", "low": 0.0, "high": 0.5, "when": {"depth": [3]}},
    }
    definition = from_json(table)
    registry.create(definition, storage, DATA)
    waiting = ledger.find(storage, "conditional").waiting
    with pytest.raises(StudyError, match="dropout applies only to some values of depth: give depth, too, or leave"):
        studies.enqueue("conditional", {"dropout": 0.1}, storage)
    studies.enqueue("conditional", {"dropout": 0.1, "depth": 3}, storage)
    assert ledger.find(storage, "conditional").waiting == waiting + 1
