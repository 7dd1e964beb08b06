"""A study that cannot succeed pauses with the reason, and keeps its budget."""

from collections.abc import Iterator
from typing import Any

import pytest
from optuna.trial import TrialState

from search.terminal import print_status
from storage import claims, database, ledger
from storage.faults import BAD_POINTS, CRASHES, FAULTS
from storage.ledger import Study
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import additions, registry, results
from studies.definition import Definition
from studies.errors import StudyError
from studies.imported import import_trials

NAME = "trivial"


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


@pytest.fixture(autouse=True)
def study(storage: PatientStorage, trivial: Definition) -> str:
    """The name of a study of 20 trials."""
    budget = trivial.budget.model_copy(update={"trials": 20})
    registry.create(trivial.model_copy(update={"budget": budget}), storage, {"fingerprint": "0" * 16})
    return NAME


def _now(storage: PatientStorage) -> Study:
    return ledger.find(storage, NAME)


def _end(storage: PatientStorage, me: Owner, state: TrialState, value: float | None = None, **attributes: Any) -> None:
    claim = claims.claim(storage, _now(storage), me, 60.0)
    assert claim is not None
    claims.finish(storage, claim, state, value, attributes)


def _fail(storage: PatientStorage, me: Owner, kind: str = "error", message: str = "ValueError: no") -> None:
    _end(storage, me, TrialState.FAIL, failure={"kind": kind, "message": message})


def _trials_until_pause(storage: PatientStorage, me: Owner, kind: str) -> int:
    for count in range(1, 20):
        _fail(storage, me, kind, f"{kind} at {count}e-05 with {{'optimizer': 'adam{count}'}}")
        if _now(storage).state == "paused":
            return count
    return 20


def test_a_study_whose_first_trials_all_fail_alike_pauses_with_the_reason(
    storage: PatientStorage, me: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _trials_until_pause(storage, me, "error") == 3
    reason = (
        "the last 3 trials failed alike, and none has ended well: error: error at 3e-05 with {'optimizer': 'adam3'}"
    )
    status = results.status(NAME, storage)
    assert (status.state, status.pause_reason) == ("paused", reason)
    assert claims.claim(storage, _now(storage), me, 60.0) is None, "its budget is kept"
    print_status(status, None)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"paused because {reason}; once that is corrected, `trialyard resume trivial` lets it go on" in printed
    with pytest.raises(StudyError, match="is paused and has no complete trial yet: correct what made its trials fail"):
        results.best_trial(NAME, storage)

    registry.resume(NAME, storage)
    assert (_now(storage).state, _now(storage).pause_reason) == ("open", None)
    assert additions.retry(NAME, storage) == [], "these trials had no hyperparameters yet"
    assert _trials_until_pause(storage, me, "error") == 3, "the budget is safe again"
    registry.pause(NAME, storage)
    assert _now(storage).pause_reason is None, "a person paused it"


@pytest.mark.parametrize("kind", [kind for kind, fault in FAULTS.items() if not fault.waits])
def test_how_many_failures_pause_a_study_depends_on_whose_fault_they_are(
    storage: PatientStorage, me: Owner, kind: str
) -> None:
    expected = {"nan": BAD_POINTS, "memory": BAD_POINTS, "timeout": BAD_POINTS, "exhausted": 20, "metric": 1}
    assert _trials_until_pause(storage, me, kind) == expected.get(kind, 3)


def test_failures_that_differ_pause_no_study(storage: PatientStorage, me: Owner) -> None:
    for number in range(6):
        _fail(storage, me, message=f"ValueError: {'abcdef'[number]}")
    for kind in ("error", "model", "error", "model"):
        _fail(storage, me, kind)
    assert _now(storage).state == "open"


@pytest.mark.parametrize(("state", "value"), [(TrialState.COMPLETE, 0.9), (TrialState.PRUNED, 0.5)])
def test_a_study_in_which_a_trial_has_ended_well_goes_on(
    storage: PatientStorage, me: Owner, state: TrialState, value: float
) -> None:
    _end(storage, me, state, value)
    assert _trials_until_pause(storage, me, "model") == 20


def test_results_from_elsewhere_do_not_show_that_trials_can_succeed_here(storage: PatientStorage, me: Owner) -> None:
    import_trials(NAME, [{"dropout": 0.5, "accuracy": 0.9}], storage)
    assert _trials_until_pause(storage, me, "model") == 3


def test_trials_that_crash_for_good_pause_a_study_too(storage: PatientStorage, me: Owner) -> None:
    for process in range(3 * (CRASHES + 1)):
        claim = claims.claim(storage, _now(storage), me, 60.0)
        assert claim is not None
        claims.requeue(storage, claim, "crashed", f"the trainer process {process} ended by signal SIGSEGV")
    assert str(_now(storage).pause_reason).startswith(
        "the last 3 trials failed alike, and none has ended well: crashed"
    )


def test_a_study_that_has_spent_its_budget_ends_and_is_not_paused(
    storage: PatientStorage, me: Owner, trivial: Definition
) -> None:
    for number in range(17):
        _fail(storage, me, message=f"ValueError: {chr(97 + number)}")
    for _ in range(3):
        _fail(storage, me)
    assert (_now(storage).state, _now(storage).has_ended) == ("open", True)
