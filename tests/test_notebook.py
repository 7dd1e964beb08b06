"""The notebook's 21 results are exact and become a study; results are imported completely or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from storage import claims, ledger, promises
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import definition as definitions
from studies import imported, notebook, registry, results
from studies.errors import StudyError

# Typed from the notebook's output, apart from the program's own table.
CONCLUSION = [0.9938, 0.9928, 0.9934, 0.9810, 0.9919]
SWEEP_3 = [0.99410, 0.99360, 0.99400, 0.99290, 0.99330, 0.99320, 0.99340, 0.99340]
SWEEP_7 = [0.99200, 0.99160, 0.99290, 0.99240, 0.99130, 0.99090, 0.99080, 0.99270]


# --- the notebook -----------------------------------------------------------------------------------------


def test_the_results_are_the_notebook_s_at_the_rates_that_it_ran_with() -> None:
    assert [result.accuracy for result in notebook.RESULTS] == CONCLUSION + SWEEP_3 + SWEEP_7
    assert [result.dense_dropout for result in notebook.SWEEP_3] == pytest.approx([i * 0.01 for i in range(8)])
    assert [result.conv_dropout for result in notebook.SWEEP_7] == pytest.approx([i * 0.01 for i in range(8)])
    assert notebook.SWEEP_3[7].label == notebook.SWEEP_7[7].label == "Dropout=0.7"


def test_it_becomes_a_study_of_finished_trials_only_once(storage: PatientStorage) -> None:
    assert notebook.create(storage)
    assert not notebook.create(storage)
    status = results.status("notebook", storage)
    assert (status.complete, status.budget, status.ended, status.protocol) == (21, 21, True, "test")
    assert promises.check(storage) == []
    study = optuna.load_study(study_name="notebook", storage=storage)
    assert [trial.values[0] for trial in study.trials] == CONCLUSION + SWEEP_3 + SWEEP_7
    assert all(trial.state == TrialState.COMPLETE and trial.user_attrs["protocol"] == "test" for trial in study.trials)
    last = study.trials[-1]
    assert last.params == {"depth": 7, "dropout_layers": True, "conv_dropout": 0.07}
    assert last.user_attrs["label"] == "Dropout=0.7"
    assert study.trials[0].user_attrs["loss"] == 0.02887
    assert "train_accuracy" not in study.trials[3].user_attrs


def test_no_worker_ever_runs_the_notebook_s_study(storage: PatientStorage, me: Owner) -> None:
    notebook.create(storage)
    assert claims.claim(storage, ledger.find(storage, "notebook"), me, 60.0) is None


def test_an_interrupted_creation_leaves_nothing(storage: PatientStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "set_larger_budget", interrupted)  # the last statement of the transaction
        with pytest.raises(KeyboardInterrupt):
            notebook.create(storage)
    assert storage.get_all_studies() == []
    assert notebook.create(storage)
    assert results.status("notebook", storage).complete == 21


def test_another_study_of_that_name_is_not_changed(storage: PatientStorage) -> None:
    registry.create(definitions.load("digits", name="notebook"), storage, {"fingerprint": "0"})
    with pytest.raises(StudyError, match="another study is named 'notebook' already"):
        notebook.create(storage)
    assert results.status("notebook", storage).complete == 0


# --- anybody's --------------------------------------------------------------------------------------------


@pytest.fixture
def digits(storage: PatientStorage) -> str:
    """A study that searches depth and dropout, with 3 points in its queue and a budget of 12."""
    registry.create(definitions.load("digits"), storage, {"fingerprint": "0"})
    return "digits"


def test_rows_become_complete_trials_that_can_win(storage: PatientStorage, digits: str) -> None:
    rows = [
        {"depth": 3, "dropout": 0, "accuracy": 0.91, "label": "first", "seconds": 12},
        {"depth": np.int64(7), "dropout": np.float64(0.5), "accuracy": 0.97, "parameters": 1000, "batch_size": 64},
    ]
    assert imported.import_trials(digits, rows, storage) == 2
    best = results.best_trial(digits, storage)
    assert (best.values, best.params) == ([0.97], {"depth": 7, "dropout": 0.5})
    assert best.user_attrs["imported"] is True
    assert (best.user_attrs["protocol"], best.user_attrs["parameters"]) == ("validation", 1000)
    assert best.duration is not None
    second = results.leaderboard(digits, storage)[1]
    assert (second.params, second.seconds) == ({"depth": 3, "dropout": 0.0}, 12.0)
    assert registry.open(digits, storage).best_value == 0.97


def test_the_budget_grows_with_imported_trials(storage: PatientStorage, digits: str, me: Owner) -> None:
    rows = [{"depth": 3, "dropout": 0.1 * n, "accuracy": 0.9} for n in range(4)]
    imported.import_trials(digits, rows, storage)
    status = results.status(digits, storage)
    assert (status.budget, status.complete, status.waiting, status.seconds_left) == (16, 4, 3, None)
    ran = 0
    while (claim := claims.claim(storage, ledger.find(storage, digits), me, 60.0)) is not None:
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
        ran += 1
    assert ran == 12
    assert results.status(digits, storage).ended
    assert promises.check(storage) == []
    # The same definition again changes nothing, and a larger budget is more of our own.
    assert not registry.create(definitions.load("digits"), storage, {"fingerprint": "0"}).changed
    assert registry.create(definitions.load("digits", trials=13), storage, {"fingerprint": "0"}).changed
    assert results.status(digits, storage).budget == 17


def test_the_same_rows_again_add_nothing_but_two_alike_are_two(storage: PatientStorage, digits: str) -> None:
    row = {"depth": 3, "dropout": 0.1, "accuracy": 0.9}
    assert imported.import_trials(digits, [row, row], storage) == 2
    assert imported.import_trials(digits, [row, row], storage) == 0
    assert imported.import_trials(digits, [row, row, row | {"accuracy": 0.8}], storage) == 1


def test_the_time_left_is_estimated_without_imported_trials(storage: PatientStorage, digits: str, me: Owner) -> None:
    imported.import_trials(digits, [{"depth": 3, "dropout": 0.1, "accuracy": 0.9}] * 50, storage)
    claim = claims.claim(storage, ledger.find(storage, digits), me, 60.0)
    assert claim is not None
    claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
    (attempt,) = results.attempts(digits, claim.number, storage)
    assert attempt.ended is not None
    left = results.status(digits, storage).seconds_left
    assert left == pytest.approx((attempt.ended - attempt.began).total_seconds() * 11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropuot": 0.1}, r"row 2: study 'digits' has no column 'dropuot'; did you mean 'dropout'\?"),
        ({"colour": "red"}, r"row 2: study 'digits' has no column 'colour'; known are depth, dropout, "),
        ({"dropout": 0.8}, r"row 2: dropout = 0\.8 must be from 0 to 0\.7, as space\.dropout says"),
        ({"dropout": "nan"}, r"row 2: dropout = 'nan' must be from 0 to 0\.7"),
        ({"depth": 4}, r"row 2: depth = 4 must be one of 3, 5, 7"),
        ({"depth": True}, r"row 2: depth = True must be one of 3, 5, 7"),
        ({"dropout": None}, r"row 2 has no 'dropout', which the study searches"),
        ({"accuracy": None}, r"row 2 has no accuracy"),
        ({"accuracy": "good"}, r"row 2: accuracy = 'good' must be a number"),
        ({"accuracy": float("nan")}, r"row 2 has no accuracy"),  # an empty cell in pandas
        ({"seconds": float("inf")}, r"row 2: seconds = inf must be a finite number"),
        ({"accuracy": 99.3}, r"row 2: accuracy = 99\.3 must be at least 0 and at most 1: 99\.3 % is 0\.993"),
        ({"seconds": -1}, r"row 2: seconds = -1 must be at least 0"),
        ({"protocol": "test"}, r"row 2: protocol = 'test', and study 'digits' judges its trials on validation images"),
        ({"protocol": "train"}, r"row 2: protocol = 'train' must be one of validation, test"),
        ({"batch_size": 32}, r"row 2: batch_size = 32, and study 'digits' fixes it at 64"),
    ],
)
def test_with_one_wrong_row_nothing_is_written(
    storage: PatientStorage, digits: str, change: dict[str, Any], message: str
) -> None:
    good = {"depth": 3, "dropout": 0.1, "accuracy": 0.9}
    with pytest.raises(StudyError, match=message):
        imported.import_trials(digits, [good, good | change], storage)
    assert results.status(digits, storage).complete == 0
    assert results.status(digits, storage).budget == 12


def test_a_hyperparameter_that_does_not_apply_is_left_out(storage: PatientStorage) -> None:
    registry.create(notebook.definition(), storage, {"fingerprint": "0"})
    row = {"depth": 7, "dropout_layers": True, "conv_dropout": 0.1, "accuracy": 0.9}
    with pytest.raises(StudyError, match=r"dense_dropout = 0\.2 does not apply, as space\.dense_dropout\.when says"):
        imported.import_trials("notebook", [row | {"dense_dropout": 0.2}], storage)
    assert imported.import_trials("notebook", [row | {"dense_dropout": ""}], storage) == 1


def test_a_csv_file_says_the_same_as_records(storage: PatientStorage, tmp_path: Path) -> None:
    registry.create(notebook.definition(), storage, {"fingerprint": "0"})
    file = tmp_path / "results.csv"
    file.write_text(
        "\ufeffdepth, dropout_layers, conv_dropout, dense_dropout, accuracy, label\n"
        "3,true,0.0,0.5,0.99,by hand\n"
        "5,false,,,9.8e-1,\n",
        encoding="utf-8",
    )
    assert imported.import_trials("notebook", file, storage) == 2
    records: list[dict[str, Any]] = [
        {
            "depth": 3,
            "dropout_layers": True,
            "conv_dropout": 0.0,
            "dense_dropout": 0.5,
            "accuracy": 0.99,
            "label": "by hand",
        },
        {"depth": 5, "dropout_layers": False, "accuracy": 0.98},
    ]
    assert imported.import_trials("notebook", records, storage) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"depth,dropout,accuracy\n3,0.1,0.9\n3,0.9,0.9\n", r"results\.csv, line 3: dropout = '0\.9' must be"),
        (b"depth,dropout,accuracy\n3,0.1,0.9,7\n", r"line 2: .* has no column '\(beyond the last column\)'"),
        (b"depth,depth,accuracy\n3,3,0.9\n", r"has the column 'depth' twice"),
        (b"depth,dropout,accuracy\n", r"there is no row to import"),
        (b"", r"there is no row to import"),
        (b"\xff\xfe\x00", r"is not a CSV file in UTF-8"),
        (b'depth,dropout,accuracy\n"3,0.1,0.9\n', r"is not a CSV file in UTF-8"),
    ],
)
def test_a_csv_file_that_is_wrong_says_where(
    storage: PatientStorage, digits: str, tmp_path: Path, text: bytes, message: str
) -> None:
    file = tmp_path / "results.csv"
    file.write_bytes(text)
    with pytest.raises(StudyError, match=message):
        imported.import_trials(digits, file, storage)
    assert results.status(digits, storage).complete == 0


def test_a_missing_file_or_study_is_a_sentence(storage: PatientStorage, digits: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.csv cannot be read \(No such file or directory\)"):
        imported.import_trials(digits, tmp_path / "none.csv", storage)
    with pytest.raises(StudyError, match="there is no study 'digist'"):
        imported.import_trials("digist", [], storage)
