"""A database and an artifacts folder of Trialyard 0.1 are brought over with nothing lost, and its trials go on.

`recorded/yard-0.1.zip` was made by version 0.1 itself: a study whose worker was killed by SIGKILL in the middle of a
trial, and one with batch normalisation whose worker was stopped by SIGINT.
"""

import json
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, ended

import studies
from storage import database, ledger

pytestmark = pytest.mark.long

RECORDED = Path(__file__).parent / "recorded" / "yard-0.1.zip"


@pytest.fixture
def yard(home: Path) -> Path:
    """The recorded home, unpacked into the current folder."""
    with zipfile.ZipFile(RECORDED) as archive:
        archive.extractall(home)
    return home / "yard"


def _rows(yard: Path, *queries: str) -> list[list[tuple[Any, ...]]]:
    with sqlite3.connect(yard / "studies.db") as connection:
        return [sorted(connection.execute(query).fetchall()) for query in queries]


KEPT = (
    "SELECT trial_id, number, study_id, state FROM trials",
    "SELECT trial_id, value FROM trial_values",
    "SELECT trial_id, step, intermediate_value FROM trial_intermediate_values",
    "SELECT trial_id, param_name, param_value, distribution_json FROM trial_params",
    "SELECT trial_id, key, value_json FROM trial_user_attributes WHERE key != 'attempts'",
    "SELECT trial_id, key, value_json FROM trial_system_attributes",
    "SELECT study_id, key, value_json FROM study_system_attributes WHERE key != 'study:metric_names'",
)
NAMED = "SELECT study_id, value_json FROM study_system_attributes WHERE key = 'study:metric_names'"


def test_a_yard_of_version_0_1_is_brought_over_whole_and_its_trials_go_on(yard: Path, start: Command) -> None:
    def trialyard(*arguments: str, code: int = 0) -> str:
        return "".join(ended(start(*arguments), code))

    assert "run `trialyard storage upgrade`" in trialyard("status", code=1)
    assert "6 trials are in copy.db" in trialyard("storage", "backup", "copy.db")
    before = _rows(yard, *KEPT)
    files = {path: path.read_bytes() for path in (yard / "artifacts").rglob("*") if path.is_file()}
    said = trialyard("storage", "upgrade")
    assert "study normed: brought over from an older Trialyard" in said
    assert "study small: brought over from an older Trialyard" in said
    assert _rows(yard, *KEPT) == before
    assert _rows(yard, NAMED) == [[(1, '["validation accuracy"]'), (2, '["validation accuracy"]')]]
    assert {path: path.read_bytes() for path in files} == files
    assert "has no problems, and 2 studies" in trialyard("storage", "check")
    url = f"sqlite:///{yard}/studies.db"
    assert database.upgrade(url)[1] == []
    assert [attempt.outcome for attempt in studies.attempts("small", 3, url)] == [None]
    assert [attempt.outcome for attempt in studies.attempts("normed", 1, url)] == ["interrupted"]
    assert studies.best_trial("small", url).number == 2
    assert studies.best_model("small", url).count_params() == studies.best_trial("small", url).user_attrs["parameters"]

    curves = {(name, number): _values(url, name, number) for name, number in (("small", 3), ("normed", 1))}
    said = trialyard("work", "--devices", "cpu", "--workers", "1")
    for (name, number), values in curves.items():
        assert f"{name} trial {number} begins (attempt 2)" in said
        last = studies.attempts(name, number, url)[-1]
        assert last.outcome == "finished"
        assert last.resumed_after == len(values) > 0, "it started again at its first epoch"
        assert _values(url, name, number)[: len(values)] == values
        assert len(_values(url, name, number)) == 12
    for study in ledger.studies(database.connect(url)):
        assert study.has_ended
    assert list((yard / "artifacts").rglob("checkpoint.npz")) == []
    assert trialyard("storage", "prune", "--yes").startswith("0 B were freed")
    best = json.loads(trialyard("best", "small", "--json"))
    assert Path(best["model"]).is_file()


def _values(url: str, name: str, number: int) -> list[float]:
    trial = studies.open(name, url).trials[number]
    return [value for _, value in sorted(trial.intermediate_values.items())]
