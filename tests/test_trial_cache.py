"""The cache of trials that samplers and pruners use: right after every change, and as fast with many waiting trials."""

import random
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from storage import claims, ledger, trial_cache
from storage.claims import Claim
from storage.owners import Owner
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import registry


@pytest.mark.parametrize("seed", range(3))
def test_it_has_all_trials_but_those_that_wait(storage: PatientStorage, study: str, me: Owner, seed: int) -> None:
    cache, study_id = TrialCache(storage), ledger.find(storage, study).id
    for _ in _changes(storage, study, me, seed):
        expected = [trial for trial in storage.get_all_trials(study_id) if trial.state != TrialState.WAITING]
        assert cache.get_all_trials(study_id) == expected


@pytest.mark.parametrize("seed", range(3))
def test_beside_many_running_trials_it_has_all_that_have_ended_and_one_that_was_just_claimed(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(trial_cache, "FEW", 0)
    monkeypatch.setattr(trial_cache, "SECONDS_EACH", 1e6)
    cache, study_id = TrialCache(storage), ledger.find(storage, study).id
    old = 0
    for claim in _changes(storage, study, me, seed):
        if claim is not None:
            cache.has_begun(study_id, claim.trial_id)
        stored, found = storage.get_all_trials(study_id), cache.get_all_trials(study_id)
        assert [trial for trial in found if trial.state.is_finished()] == [
            trial for trial in stored if trial.state.is_finished()
        ]
        assert claim is None or claim.trial_id in {trial._trial_id for trial in found}
        old += found != [trial for trial in stored if trial.state != TrialState.WAITING]
    assert old, "every look has read the trials that run"


@pytest.mark.parametrize("seed", range(3))
def test_many_running_trials_have_what_samplers_and_pruners_ask_for(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(trial_cache, "FEW", 0)
    monkeypatch.setattr(trial_cache, "SECONDS_EACH", 0.0)
    cache, study_id = TrialCache(storage), ledger.find(storage, study).id
    distribution, compared = FloatDistribution(0.0, 1.0), 0
    for claim in _changes(storage, study, me, seed):
        if claim is not None:
            claims.begin(storage, claim, {"dropout": (distribution, 0.5)})
            storage.set_trial_system_attr(claim.trial_id, "completed_rung_0", 0.25)
        stored = [trial for trial in storage.get_all_trials(study_id) if trial.state != TrialState.WAITING]
        for trial in stored:
            if trial.state == TrialState.RUNNING:
                trial.intermediate_values, trial.user_attrs, trial.datetime_start = {}, {}, None
                compared += 1
        assert cache.get_all_trials(study_id) == stored
    assert compared


def test_a_trial_that_is_claimed_and_ends_during_a_look_is_seen(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cache = ledger.find(storage, study), TrialCache(storage)
    claim = claims.claim(storage, found, me, 60.0)
    assert claim is not None
    assert len(cache.get_all_trials(found.id)) == 1
    claims.requeue(storage, claim, "interrupted", "asked to stop")
    unfinished = trial_cache._unfinished

    def then_it_ends(*arguments: Any) -> Any:
        seen = unfinished(*arguments)
        monkeypatch.setattr(trial_cache, "_unfinished", unfinished)
        again = claims.claim(storage, found, me, 60.0)
        assert again is not None
        claims.finish(storage, again, TrialState.COMPLETE, 0.5, {})
        return seen

    monkeypatch.setattr(trial_cache, "_unfinished", then_it_ends)
    cache.get_all_trials(found.id)
    assert [trial.values for trial in cache.get_all_trials(found.id)] == [[0.5]]


def test_a_trial_that_went_back_to_the_queue_is_still_there(storage: PatientStorage, study: str, me: Owner) -> None:
    found, cache = ledger.find(storage, study), TrialCache(storage)
    claim = claims.claim(storage, found, me, 60.0)
    assert claim is not None
    cache.has_begun(found.id, claim.trial_id)
    claims.requeue(storage, claim, "interrupted", "asked to stop")
    assert cache.get_all_trials(found.id) == []
    assert cache.get_trial(claim.trial_id).state == TrialState.WAITING


def _changes(storage: PatientStorage, study: str, me: Owner, seed: int) -> Iterator[Claim | None]:
    """Changes of trials as they come, in any order; after each the claim, if it was one."""
    found = ledger.raise_budget(storage, ledger.find(storage, study), ledger.Budget(trials=100, hours=None))
    assert found.trials == 100
    dice, held, opened = random.Random(seed), list[Claim](), registry.open(study, storage)
    for _ in range(80):
        change = dice.choice(["enqueue", "claim", "claim", "epoch", "requeue", "finish"])
        claim: Claim | None = None
        if change == "enqueue":
            opened.enqueue_trial({"dropout": dice.random() / 2})
        elif change == "claim":
            claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
            held += [claim] if claim is not None else []
        elif held:
            ending = held.pop(dice.randrange(len(held)))
            if change == "epoch":
                claims.record_epochs(storage, ending, {dice.randint(1, 9): dice.random()})
                held.append(ending)
            elif change == "requeue":
                claims.requeue(storage, ending, "interrupted", "asked to stop")
            else:
                claims.finish(storage, ending, TrialState.COMPLETE, dice.random(), {})
        yield claim


def test_a_look_reads_no_waiting_trial(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = registry.open(study, storage)
    for _ in range(20):
        opened.enqueue_trial({"dropout": 0.1})
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    cache, built = TrialCache(storage), list[int]()
    build = PatientStorage._build_frozen_trial_from_trial_model

    def counted(self: PatientStorage, trial: optuna.storages._rdb.models.TrialModel) -> FrozenTrial:
        built.append(trial.trial_id)
        return build(self, trial)

    monkeypatch.setattr(PatientStorage, "_build_frozen_trial_from_trial_model", counted)
    for _ in range(2):
        (trial,) = cache.get_all_trials(claim.study_id)
        assert trial.number == claim.number
    assert built == [claim.trial_id] * 2
