"""Every trial of a study can be seen: as a record, in the terminal, as CSV, and as a table of pandas."""

import csv
import dataclasses
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Call
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import insert

import studies
from search.sparkline import COLUMNS, sparkline
from storage import claims, database, ledger
from storage.artifacts import PREDICTIONS
from storage.owners import Owner
from storage.ranking import ranks
from storage.tables import TrialUserAttributeModel
from studies import registry, statistics, text, trial_report
from studies.definition import Candidate, Confirm, Definition
from studies.errors import StudyError
from studies.predictions import Predictions
from studies.trial_records import TrialRecord, flat


@pytest.fixture
def every_state(storage: RDBStorage, study: str, me: Owner) -> str:
    """The name of a study with a trial in each state: one that runs elsewhere and one that waits again are the last."""
    for state, value in [(TrialState.COMPLETE, 0.9), (TrialState.PRUNED, 0.5), (TrialState.FAIL, None)]:
        claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
        assert claim is not None
        storage.set_trial_param(claim.trial_id, "dropout", claim.number / 10, FloatDistribution(0.0, 0.7))
        if value is not None:
            claims.record_epochs(storage, claim, {1: value - 0.1, 2: value})
        failure = {"failure": {"kind": "nan", "message": "the loss became nan"}} if value is None else {}
        claims.finish(storage, claim, state, value, failure)
    runs, waits = (claims.claim(storage, ledger.find(storage, study), me, 60.0) for _ in range(2))
    assert runs is not None
    assert waits is not None
    claims.record_epochs(storage, runs, {1: 0.7}, epoch=1)
    claims.requeue(storage, waits, "interrupted", "the worker was asked to stop")
    imported = optuna.trial.create_trial(value=0.95, user_attrs={"imported": True})
    storage.create_new_trial(ledger.find(storage, study).id, imported)
    return study


def test_a_waiting_trial_has_the_hyperparameters_that_it_was_enqueued_with(storage: RDBStorage, study: str) -> None:
    studies.enqueue(study, {"dropout": 0.1}, storage)
    registry.open(study, storage).enqueue_trial({"dropout": 0.2})
    storage.set_trial_system_attr(registry.open(study, storage).trials[1]._trial_id, "fixed_params", 5)
    assert [trial.params for trial in studies.trials(study, storage)] == [{"dropout": 0.1}, {}]
    assert studies.trial(study, 0, storage).to_json()["params"] == {"dropout": 0.1}


def test_every_trial_has_a_record_whatever_became_of_it(storage: RDBStorage, every_state: str, me: Owner) -> None:
    records = studies.trials(every_state, storage)
    assert [(record.number, record.state, record.rank, record.score, record.reason) for record in records] == [
        (0, "complete", 2, 0.9, None),
        (1, "pruned", None, 0.5, "after epoch 2"),
        (2, "failed", None, None, "nan: the loss became nan"),
        (3, "running", None, 0.7, f"on cpu:0 of {me.host}"),
        (4, "waiting", None, None, "interrupted: the worker was asked to stop"),
        (5, "imported", 1, 0.95, None),
    ]
    assert [record.epochs for record in records] == [2, 2, None, 1, 0, None]
    assert [record.number for record in studies.trials(every_state, storage, limit=2)] == [4, 5]
    assert [record.number for record in studies.trials(every_state, storage, state="failed")] == [2]
    assert studies.trials(every_state, storage, state="failed", limit=9) == [records[2]]


def test_the_score_of_a_pruned_trial_with_repeats_is_their_mean(storage: RDBStorage, study: str) -> None:
    repeats = {"intermediate_values": {1: 0.8, 2: 0.4}, "user_attrs": {"repeats": [0.8, 0.4]}}
    pruned = optuna.trial.create_trial(state=TrialState.PRUNED, value=0.6, **repeats)
    registry.open(study, storage).add_trial(pruned)
    (record,) = studies.trials(study, storage)
    assert (record.score, record.reason) == (0.6, "after repeat 2")
    note = text.trial_note(pruned, registry.definition_of(study, storage), [])
    assert "Pruned after repeat 2, with a mean validation accuracy of 0.6000." in note


def test_the_mean_of_several_repeats_has_no_sampling_error(storage: RDBStorage, trivial: Definition) -> None:
    registry.create(trivial, storage, {"fingerprint": "0" * 16, "validation": 100})
    opened = registry.open(trivial.name, storage)
    for attributes in ({}, {"repeats": [0.88, 0.92]}, {"repeats": [0.9]}):
        opened.add_trial(optuna.trial.create_trial(value=0.9, user_attrs=attributes))
    texts = [record.score_text for record in studies.trials(trivial.name, storage)]
    assert texts == ["0.900 ± 0.060", "0.9000", "0.900 ± 0.060"]


def test_the_error_of_a_confirmation_s_running_trial_is_that_of_its_validation_images(
    storage: RDBStorage, trivial: Definition, me: Owner
) -> None:
    """The test images judge it, but only after its last epoch."""
    candidate = Candidate(trial=0, epochs=2, hyperparameters={"dropout": 0.1})
    confirm = Confirm(study="searched", incarnation="a" * 32, candidates=(candidate,))
    data = {"fingerprint": "0" * 16, "validation": 100, "test": 10_000}
    registry.create(trivial.model_copy(update={"confirm": confirm}), storage, data)
    done, runs = (claims.claim(storage, ledger.find(storage, trivial.name), me, 60.0) for _ in range(2))
    assert done is not None
    assert runs is not None
    claims.finish(storage, done, TrialState.COMPLETE, 0.9, {})
    claims.record_epochs(storage, runs, {1: 0.9}, epoch=1)
    errors = [record.error for record in studies.trials(trivial.name, storage, limit=2)]
    assert errors == [statistics.sampling_error(0.9, 10_000), statistics.sampling_error(0.9, 100)]


@pytest.mark.parametrize(
    ("score", "images", "text"),
    [
        (0.98611, 288, "0.986 ± 0.015"),
        (0.9950, 10_000, "0.9950 ± 0.0014"),
        (0.9, 20, "0.90 ± 0.14"),
        (0.9, None, "0.9000"),
    ],
)
def test_a_score_has_the_digits_that_the_images_support(score: float, images: int | None, text: str) -> None:
    error = None if images is None else statistics.sampling_error(score, images)
    record = TrialRecord(
        number=0, state="complete", rank=1, score=score, error=error, epochs=1, seconds=1.0, params={}, reason=None
    )
    assert record.score_text == text
    if images is not None and error is not None:
        interval = statistics.wilson(round(score * images), images)
        assert error == pytest.approx((interval.high - interval.low) / 2, rel=0.02)


def test_equal_scores_share_a_rank(storage: RDBStorage, study: str) -> None:
    assert ranks([0.9, 0.9, 0.8, 0.8, 0.7]) == [1, 1, 3, 3, 5]
    opened = registry.open(study, storage)
    for value in (0.8, 0.9, 0.9, 0.7):
        opened.add_trial(optuna.trial.create_trial(value=value))
    rows = studies.leaderboard(study, storage)
    assert [(row.rank, row.number) for row in rows] == [(1, 1), (1, 2), (3, 0), (4, 3)]
    assert [row.rank for row in studies.leaderboard(study, storage, top=2)] == [1, 1]


def test_the_report_of_a_confirmation_s_running_trial_names_the_images_of_its_epochs(
    storage: RDBStorage, every_state: str
) -> None:
    """The test images judge it, but only after its last epoch."""
    candidate = Candidate(trial=0, epochs=2, hyperparameters={"dropout": 0.1})
    confirm = Confirm(study="searched", incarnation="a" * 32, candidates=(candidate,))
    for number, state, images in ((0, "complete", "test"), (3, "running", "validation")):
        content = trial_report.collect(every_state, number, storage)
        assert content.details.record.state == state
        definition = content.definition.model_copy(update={"confirm": confirm})
        report = trial_report.report(dataclasses.replace(content, definition=definition))
        assert f"; {images} accuracy **0." in report
        assert "| epoch | validation accuracy |" in report


def test_the_curve_of_a_running_trial_is_titled_as_that_of_one_trial(storage: RDBStorage, every_state: str) -> None:
    page = studies.report(every_state, storage, trial=3)
    assert "Accuracy by epoch (the losses are not on this machine)" in page


def test_the_report_of_a_trial_with_repeats_lists_these_where_it_has_no_history(
    storage: RDBStorage, every_state: str
) -> None:
    content = trial_report.collect(every_state, 0, storage)
    definition = content.definition
    repeated = definition.model_copy(update={"budget": definition.budget.model_copy(update={"repeats": 2})})
    for of, titles in ((definition, "| epoch | validation"), (repeated, "| repeat | validation")):
        assert titles in trial_report.report(dataclasses.replace(content, definition=of))
    curve = dataclasses.replace(content.details.curve, val_loss=(0.5, 0.4))
    details = dataclasses.replace(content.details, curve=curve)
    history = dataclasses.replace(content, definition=repeated, details=details)
    assert "| epoch | validation" in trial_report.report(history)


def test_trials_in_the_terminal(finished_study: str, trialyard: Call) -> None:
    code, out, err = trialyard("trials", finished_study)
    assert (code, err) == (0, "")
    titles, *rows = (line.split() for line in out.splitlines())
    assert titles == ["trial", "state", "score", "epochs", "dropout", "reason"]
    assert rows[1] == ["1", "complete", "0.9000", "2", "0.1"]
    assert rows[2] == ["2", "pruned", "0.4500", "2", "0.2", "after", "epoch", "2"]
    assert rows[3] == ["3", "failed", "0.3", "nan:", "the", "loss", "became", "nan"]
    _, out, _ = trialyard("trials", finished_study, "--json", "--state", "failed")
    assert [(record["number"], record["score"]) for record in json.loads(out)] == [(3, None)]
    _, out, _ = trialyard("trials", finished_study, "--csv", "--limit", "2")
    table = list(csv.DictReader(io.StringIO(out)))
    assert [(row["number"], row["score"], row["params_dropout"]) for row in table] == [
        ("3", "", "0.3"),
        ("4", "0.9", "0.4"),
    ]
    head = "number,state,rank,score,error,epochs,seconds,reason\n"
    assert trialyard("trials", finished_study, "--csv", "--state", "running") == (0, head, "")
    assert trialyard("trials", finished_study, "--state", "running") == (0, "no trial is running\n", "")


def test_a_leaderboard_says_which_trials_it_does_not_show(finished_study: str, trialyard: Call) -> None:
    _, out, err = trialyard("leaderboard", finished_study)
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["1", "1"], ["1", "4"], ["3", "0"]]
    assert err == f"not shown: 1 pruned, 1 failed; `trialyard trials {finished_study}` has every trial\n"
    _, _, err = trialyard("leaderboard", finished_study, "--top", "1")
    assert err.startswith("not shown: 2 complete, 1 pruned, 1 failed; ")


def test_a_trial_in_the_terminal(finished_study: str, trialyard: Call, home: Path) -> None:
    attempt = studies.trial(finished_study, 0).attempts[0]
    log = home / "yard" / "logs" / f"trainer-cpu-0-{attempt.owner.pid}.log"
    log.parent.mkdir()
    log.write_text(
        "t trivial trial 0 attempt 1 begins in float32\n"
        + "".join(f"t trivial trial 0 attempt 1 epoch {number}\n" for number in range(1, 15))
        + "t other trial 0 attempt 1 begins in float32\nthe next one\n",
        encoding="utf-8",
    )
    code, out, err = trialyard("show", finished_study, "0")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "trial 0 of trivial: complete, score 0.8000"
    assert lines[1].split() == ["hyperparameters", "dropout", "0"]
    assert lines[2].split(maxsplit=2)[1:] == ["▁█", "0.7000 to 0.7500, the best 0.7500 in epoch 2"]
    assert f"cpu:0 of {attempt.owner.host}, from " in lines[3]
    assert " finished at " in lines[3]
    assert "model.keras, 9 B" in lines[4]
    assert len(lines[5:]) == 10
    assert lines[-1].endswith("epoch 14")
    shown = json.loads(trialyard("show", finished_study, "0", "--json")[1])
    assert (shown["number"], shown["curve"]["val_accuracy"]) == (0, pytest.approx([0.7, 0.75]))
    assert shown["attempts"][0]["outcome"] == "finished"
    failed = trialyard("show", finished_study, "3")[1]
    assert failed.startswith("trial 3 of trivial: failed (nan: the loss became nan)\n")
    code, out, err = trialyard("show", finished_study, "5")
    assert (code, out) == (1, "")
    assert err == f"error: study '{finished_study}' has no trial 5: its 5 trials are numbered from 0\n"


def test_the_report_of_a_trial_has_all_that_is_known_of_it(finished_study: str, trialyard: Call, home: Path) -> None:
    folder = home / "yard" / "artifacts" / "of-another-machine"
    folder.mkdir()
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    Predictions.of(
        judged_on="validation",
        images=np.zeros((4, 2, 2, 1), np.uint8),
        labels=labels,
        predicted=predicted,
        probability=np.full(4, 0.75, np.float32),
        classes=2,
    ).write(folder / PREDICTIONS)
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    relative = str((folder / PREDICTIONS).relative_to(home / "yard" / "artifacts"))
    best = studies.best_trial(finished_study)
    with storage.engine.begin() as connection:
        row = {"trial_id": best._trial_id, "key": "predictions", "value_json": json.dumps(relative)}
        connection.execute(insert(TrialUserAttributeModel).values(row))
    text = studies.report(finished_study, format="markdown", trial=1)
    assert text.startswith("# Trial 1 of trivial\n\n**complete**, rank 1; validation accuracy **0.9000**")
    for line in (
        "| dropout | 0.1 |",
        "| 1 | 0.8000 |",
        "| 0 | 2 | 1 | 0.5000 | 1 \\(1\\) |",
        "| 1 | 0 | 1 | 0.75 |",
        "## Attempts",
    ):
        assert line.replace("\\", "") in text.replace("\\", ""), text
    assert "model.keras" in studies.report(finished_study, format="markdown", trial=0)
    page = studies.report(finished_study, trial=1)
    assert "<h1>Trial 1 of trivial</h1>" in page
    assert all(f'<figure id="{kind}">' in page for kind in ("learning-curves", "confusion", "classes", "mistakes"))
    assert '<figure id="progress">' not in page
    code, out, err = trialyard("report", finished_study, "--trial", "3")
    assert (code, out, err) == (0, "the report of trial 3 of trivial is in trivial-trial-3.html\n", "")
    failed = (home / "trivial-trial-3.html").read_text(encoding="utf-8")
    assert "<strong>failed</strong> (nan: the loss became nan)" in failed
    assert "# Trial 2" not in trialyard("report", finished_study, "--trial", "2", "--format", "table")[1]
    assert trialyard("report", finished_study, "--trial", "5")[0] == 1
    assert not (home / "trivial-trial-5.html").exists()


def test_a_table_of_no_trials_has_its_columns(storage: RDBStorage, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    pandas = types.SimpleNamespace(DataFrame=lambda rows, columns: made.append((rows, columns)))
    monkeypatch.setitem(sys.modules, "pandas", pandas)  # type: ignore[arg-type]
    studies.dataframe(study, storage)
    assert made == [([], ["number", "state", "rank", "score", "error", "epochs", "seconds", "reason"])]


def test_all_trials_as_a_table_of_pandas(
    storage: RDBStorage, every_state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = flat(studies.trials(every_state, storage))
    assert all(row.keys() == rows[0].keys() for row in rows)
    # pandas is no dependency, so a stand-in takes the rows.
    pandas = types.SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", pandas)  # type: ignore[arg-type]
    assert studies.dataframe(every_state, storage) == (rows, list(rows[0]))  # type: ignore[comparison-overlap]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(StudyError, match="needs pandas, which is not installed: `pip install pandas`"):
        studies.dataframe(every_state, storage)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([0.5], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, float("nan"), 1.0], "▁ █"), ([0.0, 0.5, 1.0], "▁▅█")],
)
def test_a_sparkline_has_a_character_for_each_number(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn
    assert len(sparkline(values * 100)) == min(len(values) * 100, COLUMNS)
    assert sparkline(values, "ascii").isascii()
