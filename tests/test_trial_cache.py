"""The cache of trials that samplers and pruners use: right after every change, and as fast with many waiting trials."""

import random

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from storage import claims, ledger
from storage.claims import Claim
from storage.owners import Owner
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import registry


@pytest.mark.parametrize("seed", range(3))
def test_it_has_all_trials_but_those_that_wait(storage: PatientStorage, study: str, me: Owner, seed: int) -> None:
    found = ledger.raise_budget(storage, ledger.find(storage, study), ledger.Budget(trials=100, hours=None))
    assert found.trials == 100
    dice, cache, held = random.Random(seed), TrialCache(storage), list[Claim]()
    opened, study_id = registry.open(study, storage), ledger.find(storage, study).id
    for _ in range(60):
        change = dice.choice(["enqueue", "claim", "claim", "requeue", "finish"])
        if change == "enqueue":
            opened.enqueue_trial({"dropout": dice.random() / 2})
        elif change == "claim":
            claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
            held += [claim] if claim is not None else []
        elif held:
            claim = held.pop(dice.randrange(len(held)))
            if change == "requeue":
                claims.requeue(storage, claim, "interrupted", "told to stop")
            else:
                claims.finish(storage, claim, TrialState.COMPLETE, dice.random(), {})
        expected = [trial for trial in storage.get_all_trials(study_id) if trial.state != TrialState.WAITING]
        assert cache.get_all_trials(study_id) == expected


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
