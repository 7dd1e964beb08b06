"""Samplers learn from trials that their hyperparameters made fail; everybody else sees that they failed."""

import math
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search.attempt import StudyHandle
from search.proposal import hyperparameters_of
from storage import claims, faults, ledger
from storage.owners import Owner
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import registry, results, sampling
from studies.definition import Definition, parse
from studies.lessons import WithEpochs, WithLessons
from studies.space import suggest

UNSTABLE = """
name = "unstable"
dataset = "digits"
model = "mine:build"

[budget]
trials = 40

[space]
learning_rate = { low = 1e-4, high = 1.0, log = true }
momentum = { low = 0.0, high = 0.99 }
"""
NAN = {"kind": "nan", "message": "the training loss became nan in epoch 1"}


def _failures_of_40(definition: Definition) -> int:
    """How many trials fail where the best accuracy is next to the learning rates that are too high."""
    storage = WithLessons(optuna.storages.InMemoryStorage(), definition.sampler.kind)
    study = optuna.create_study(storage=storage, direction="maximize")  # type: ignore[arg-type]
    failures = 0
    for number in range(40):
        study.sampler = sampling.sampler(definition, number)
        trial = study.ask()
        point = suggest(trial, definition.space)
        step = point["learning_rate"] / (1 - point["momentum"])
        if step > 0.5:
            failures += 1
            trial.set_user_attr("failure", NAN)
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, 0.99 - 0.02 * math.log10(step / 0.3) ** 2)
    return failures


def test_few_trials_go_to_hyperparameters_that_cannot_train() -> None:
    """Without the lesson TPE spends 27 of the 40 on them."""
    definition = parse(UNSTABLE)
    counts = [
        _failures_of_40(definition.model_copy(update={"sampler": definition.sampler.model_copy(update={"seed": seed})}))
        for seed in range(3)
    ]
    assert sum(counts) / len(counts) <= 10.5, counts


@pytest.mark.parametrize(
    ("kind", "seen"),
    [("tpe", (TrialState.PRUNED, None)), ("nsga2", (TrialState.COMPLETE, [0.4]))],
)
def test_only_the_sampler_sees_such_a_trial_as_a_bad_one(
    storage: PatientStorage, me: Owner, trivial: Definition, kind: Any, seen: Any
) -> None:
    definition = trivial.model_copy(update={"sampler": trivial.sampler.model_copy(update={"kind": kind})})
    registry.create(definition, storage, {"fingerprint": "0" * 16})
    study = ledger.find(storage, definition.name)
    cached = TrialCache(storage)
    handle = StudyHandle(study=study, definition=definition, storage=storage, cached=cached)
    error = {"kind": "error", "message": "ValueError: of the model"}
    ends: list[Callable[[claims.Claim], None]] = [
        lambda claim: claims.finish(storage, claim, TrialState.COMPLETE, 0.4, {}),
        lambda claim: claims.finish(storage, claim, TrialState.FAIL, None, {"failure": NAN}),
        lambda claim: claims.finish(storage, claim, TrialState.FAIL, None, {"failure": error}),
    ]
    for end in ends:
        claim = claims.claim(storage, study, me, 60.0)
        assert claim is not None
        hyperparameters_of(definition, storage, handle.opened(claim), claim)
        claims.record_epochs(storage, claim, {1: 0.99})
        end(claim)
    _, bad, other = handle.opened(claim).get_trials(deepcopy=False)
    assert (bad.state, bad.values) == seen
    assert bad.intermediate_values == {}, "a trial that went well for long would pass for a good one"
    assert other.state == TrialState.FAIL, "what is not the hyperparameters' fault teaches nothing"
    assert [trial.state for trial in registry.open(study.name, storage).trials[1:]] == [TrialState.FAIL] * 2
    assert cached.get_trial(bad._trial_id).intermediate_values == {1: 0.99}
    status = results.status(study.name, storage)
    assert (status.failed, status.pruned, status.best) == (2, 0, 0.4)
    assert status.failures[0] == "nan: the training loss became nan in epoch 1"


def test_the_kinds_that_samplers_learn_from() -> None:
    learned = {kind for kind, fault in faults.FAULTS.items() if fault.whose == "hyperparameters"}
    assert learned == {"nan", "memory", "timeout", "data", "model"}


def test_a_failure_whose_repetition_did_well_teaches_nothing() -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, direction="maximize")
    space = {"rate": optuna.distributions.FloatDistribution(0.0, 1.0)}
    memory = {"failure": {"kind": "memory", "message": "out of memory"}}
    for number, (rate, state, attributes) in enumerate(
        [
            (0.1, TrialState.FAIL, memory),
            (0.2, TrialState.FAIL, memory),
            (0.1, TrialState.COMPLETE, {"retry_of": 0}),
            (0.2, TrialState.FAIL, memory | {"retry_of": 1}),
        ]
    ):
        value = 0.98 if state == TrialState.COMPLETE else None
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=value, params={"rate": rate}, distributions=space, user_attrs=attributes
            )
        )
        assert study.trials[-1].number == number
    shown = WithLessons(storage, "tpe").get_all_trials(study._study_id)
    assert [(trial.number, trial.state) for trial in shown] == [
        (1, TrialState.PRUNED),
        (2, TrialState.COMPLETE),
        (3, TrialState.PRUNED),
    ]


@pytest.mark.parametrize("pruner", [optuna.pruners.MedianPruner(), optuna.pruners.WilcoxonPruner(n_startup_steps=0)])
def test_imported_trials_without_epochs_neither_prune_nor_keep_from_pruning(pruner: Any) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, direction="maximize", pruner=pruner)
    imported = optuna.trial.create_trial(value=0.99)
    study.add_trials([imported] * 6)

    def run(values: list[float]) -> bool:
        trial = study.ask()
        for step, value in enumerate(values, start=1):
            trial.report(value, step)
        shown = storage.get_trial(trial._trial_id)
        study._storage = WithEpochs(storage)  # type: ignore[assignment]
        pruned = study.pruner.prune(study, shown)
        study._storage = storage
        study.tell(trial, sum(values) / len(values))
        return pruned

    assert not run([0.9, 0.92, 0.91, 0.93, 0.9, 0.92])
    # One own trial is too little for the median, and what Wilcoxon compares with.
    assert run([0.1, 0.12, 0.11, 0.13, 0.1, 0.12]) == isinstance(pruner, optuna.pruners.WilcoxonPruner)
