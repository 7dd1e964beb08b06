"""Two studies side by side, and the notebook's rows beside their replays, measured as the notebook measured them."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from conftest import TRIVIAL
from optuna.trial import TrialState

from storage import attempt_table, claims, ledger, owners
from storage.hits import Hits
from storage.transactions import PatientStorage
from studies import comparison, notebook, notebook_figures, registry, statistics, text
from studies import definition as definitions
from studies.definition import Definition, parse
from studies.errors import StudyError
from studies.imported import import_trials

DATA = {"fingerprint": "f" * 16, "train": 60_000, "validation": 200, "test": 10_000}


def _run(
    storage: PatientStorage,
    study: ledger.Study,
    params: Mapping[str, Any],
    epochs: list[float],
    hits: Hits | None = None,
    **attributes: Any,
) -> int:
    """The next trial of the study, which ends with these accuracies by epoch; returns its number."""
    claim = claims.claim(storage, study, owners.this_slot("cpu:0"), 60.0)
    assert claim is not None
    space = definitions.from_json(study.definition).space
    claims.begin(storage, claim, {name: (space[name].distribution(), value) for name, value in params.items()})
    claims.record_epochs(storage, claim, dict(enumerate(epochs, start=1)))
    claims.finish(storage, claim, TrialState.COMPLETE, max(epochs), {"seconds": 2.5} | attributes, hits=hits)
    return claim.number


def _created(storage: PatientStorage, definition: Definition, **data: Any) -> ledger.Study:
    return registry.create(definition, storage, DATA | data).study


def _named(name: str) -> Definition:
    return parse(TRIVIAL, name=name)


def test_two_studies_are_compared_image_by_image(storage: PatientStorage) -> None:
    generator = np.random.default_rng(0)
    right = [generator.random(200) < share for share in (0.95, 0.85)]
    for name, own in zip(("first", "second"), right, strict=True):
        study = _created(storage, _named(name))
        _run(storage, study, {"dropout": 0.1}, [0.5, 0.6], Hits.of(right[1], "validation", "other trial"))
        _run(storage, study, {"dropout": 0.2}, [0.7, float(own.mean())], Hits.of(own, "validation", "same images"))
    found = comparison.compare("first", "second", storage)
    means = [float(own.mean()) for own in right]
    assert found.difference == pytest.approx(means[0] - means[1])
    assert found.p == pytest.approx(statistics.mcnemar_p(*right))
    assert found.interval == statistics.difference_of_models(*right)
    side = found.first
    assert (side.trial, side.params, side.judged_on, side.images) == (1, {"dropout": 0.2}, "validation", 200)
    assert (side.finished, side.epochs, side.seconds) == (2, 4, 5.0)
    assert side.interval == statistics.wilson(int(right[0].sum()), 200)
    shown = text.compared(found)
    assert f"p {found.p:.3g}" in shown
    assert "95 % sampling error" in shown, "no interval of the chosen one's accuracy"
    assert "interval" not in shown
    assert "not comparable" not in shown


def test_the_mean_of_several_repeats_has_no_sampling_error_of_one_accuracy(storage: PatientStorage) -> None:
    first, second = (_created(storage, _named(name), validation=200) for name in ("first", "second"))
    _run(storage, first, {"dropout": 0.1}, [0.9], repeats=[0.88, 0.92])
    _run(storage, second, {"dropout": 0.1}, [0.9])
    found = comparison.compare("first", "second", storage)
    assert (found.first.interval, found.first.images, found.interval) == (None, 200, None)
    assert found.second.interval == statistics.wilson(180, 200)


def test_a_failed_trial_is_counted_with_what_all_of_its_attempts_took(storage: PatientStorage) -> None:
    """It has no record of its training. With repeats its steps are not epochs."""
    study, other = (_created(storage, _named(name)) for name in ("first", "second"))
    _run(storage, study, {"dropout": 0.1}, [0.5, 0.6])
    _run(storage, other, {"dropout": 0.1}, [0.5, 0.6])
    began = datetime(2026, 1, 2)
    for attempt, epoch, seconds in ((1, 4, 7.0), (2, 6, 5.5)):
        claim = claims.claim(storage, study, owners.this_slot("cpu:0"), 60.0)
        assert claim is not None
        assert (claim.number, claim.attempt) == (1, attempt)
        claims.record_epochs(storage, claim, {attempt: 0.5}, epoch=epoch)
        if attempt == 1:
            claims.requeue(storage, claim, "crashed", "a test")
        else:
            claims.finish(storage, claim, TrialState.FAIL, None, {"failure": {"kind": "nan", "message": "a test"}})
        with storage.engine.begin() as connection:
            ended = began + timedelta(seconds=seconds)
            attempt_table.change(connection, claim.trial_id, attempt, began=began, ended=ended)
    side = comparison.compare("first", "second", storage).first
    assert (side.finished, side.epochs, side.seconds) == (2, 2 + 6, 2.5 + 12.5)


def test_other_splits_are_not_paired_and_other_images_are_refused(storage: PatientStorage) -> None:
    for name, fingerprint in (("first", "split a"), ("second", "split b")):
        study = _created(storage, _named(name))
        hits = Hits.of(np.ones(200, dtype=bool), "validation", fingerprint)
        _run(storage, study, {"dropout": 0.1}, [0.9], hits)
    found = comparison.compare("first", "second", storage)
    assert (found.p, found.difference) == (None, 0.0)
    assert found.interval is not None
    _created(storage, _named("elsewhere"), fingerprint="other")
    with pytest.raises(StudyError, match="have different images"):
        comparison.compare("first", "elsewhere", storage)
    _created(storage, _named("empty"))
    with pytest.raises(StudyError, match="'empty' has no complete trial yet"):
        comparison.compare("first", "empty", storage)
    with pytest.raises(StudyError, match="there is no study 'none'"):
        comparison.compare("none", "first", storage)


def test_conclusions_are_compared_after_the_last_epoch_and_sweeps_at_the_best(storage: PatientStorage) -> None:
    conclusion = _created(storage, definitions.load("notebook-conclusion"))
    for point in definitions.load("notebook-conclusion").points[:3]:
        _run(storage, conclusion, point, [0.5] * 18 + [0.9941, 0.9921])
    rows = comparison.compare_notebook("notebook-conclusion", storage)
    assert [row.notebook for row in rows] == [result.accuracy for result in notebook.CONCLUSION]
    assert [row.ours for row in rows] == [0.9921, 0.9921, 0.9921, None, None]
    assert [row.rate for row in rows] == [None, 0.0, None, 0.0, 0.2]
    first, second = rows[:2]
    assert (first.trial, first.epochs, first.agrees) == (0, 20, True)
    assert first.difference == pytest.approx(-0.0017)
    assert first.interval == statistics.difference_of_two(0.9921, 0.9938, 10_000, 10_000)
    assert second.difference == pytest.approx(-0.0007)
    assert (rows[3].difference, rows[3].agrees) == (None, None)
    shown = text.compared_with_notebook(rows)
    assert "after the last epoch" in shown
    assert "not run yet" in shown
    assert "epochs: the notebook" not in shown
    assert "60,000" not in shown

    trials = storage.get_all_trials(conclusion.id)
    figure = notebook_figures.notebook_comparison(trials, definitions.load("notebook-conclusion"))
    assert figure is not None
    assert list(figure.data[1].y) == [0.9921] * 3

    sweep = _created(storage, definitions.load("notebook-dropout-7", epochs=3, limit=6000))
    _run(storage, sweep, {"conv_dropout": 0.0}, [0.9, 0.98, 0.97])
    rows = comparison.compare_notebook("notebook-dropout-7", storage)
    assert [row.rate for row in rows] == pytest.approx([index / 100 for index in range(8)])
    assert (rows[0].ours, rows[0].agrees, rows[1].ours) == (0.98, False, None)
    shown = text.compared_with_notebook(rows)
    assert "of the best epoch" in shown
    assert "Trials with 3 epochs: the notebook trained for 20." in shown
    assert "The study trains with 6,000 images: the notebook trained with 60,000." in shown


@pytest.mark.parametrize("name", ["trivial", "notebook-dropout-7-labelled", "notebook"])
def test_a_study_that_repeats_nothing_is_refused(storage: PatientStorage, trivial: Definition, name: str) -> None:
    if name == "notebook":
        notebook.create(storage)
    else:
        _created(storage, trivial if name == "trivial" else definitions.load(name))
    with pytest.raises(StudyError, match="repeats no results of the notebook as they ran"):
        comparison.compare_notebook(name, storage)


def test_a_study_that_trains_each_configuration_several_times_is_not_compared_with_the_notebook(
    storage: PatientStorage,
) -> None:
    """The notebook trained each once, and the steps of such a trial are not epochs."""
    stored = definitions.load("notebook-dropout-7").to_json()
    definition = definitions.from_json(stored | {"budget": stored["budget"] | {"repeats": 3}})
    _run(storage, _created(storage, definition), {"conv_dropout": 0.0}, [0.98, 0.97, 0.99])
    sentence = (
        r"study 'notebook-dropout-7' trains each configuration 3 times \(budget.repeats\), and the notebook trained "
        "each once: compare a study without repeats"
    )
    with pytest.raises(StudyError, match=rf"\A{sentence}\Z"):
        comparison.compare_notebook("notebook-dropout-7", storage)
    assert notebook.reference_results(definition) == []


def test_an_imported_result_never_replaces_a_trial_beside_the_notebook_s(storage: PatientStorage) -> None:
    """It does not say at which epoch it was measured. Of several trials of our own the first one counts."""
    definition = definitions.load("notebook-dropout-7")
    sweep = _created(storage, definition)
    for accuracies in ([0.98, 0.97], [0.96, 0.99]):
        _run(storage, sweep, {"conv_dropout": 0.0}, accuracies)
    imported = [{"conv_dropout": rate, "accuracy": 0.5} for rate in (0.0, 0.01)]
    assert import_trials("notebook-dropout-7", imported, storage) == 2
    rows = comparison.compare_notebook("notebook-dropout-7", storage)
    assert [(row.trial, row.ours) for row in rows[:2]] == [(0, 0.98), (None, None)]
    figure = notebook_figures.notebook_comparison(storage.get_all_trials(sweep.id), definition)
    assert figure is not None
    assert sorted(figure.data[1].y) == [0.98, 0.99]
    notebook.create(storage)
    (replay,) = notebook.replays(notebook.definition(), storage)
    assert [trial.number for _, trial in replay.trials] == [0, 1]
