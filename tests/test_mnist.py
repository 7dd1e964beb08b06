"""The catalog's main study on the real MNIST, as a user runs it and as plain Optuna and its dashboard see it."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import optuna_dashboard
import pytest
from optuna.trial import TrialState

from search import data
from studies.definition import Data

pytestmark = [pytest.mark.mnist, pytest.mark.long]


def _run(folder: Path, data_folders: list[Path], *arguments: str) -> tuple[str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "search.cli", *arguments],
        cwd=folder,
        env=os.environ | {"TRIALYARD_DATA": os.pathsep.join(map(str, data_folders))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_mnist_is_split_by_class_and_its_test_images_stay_out(mnist_folders: list[Path]) -> None:
    dataset = data.load("mnist", Data(validation=0.1), mnist_folders)
    assert (len(dataset.y_train), len(dataset.y_validation), dataset.image_shape) == (54_000, 6_000, (28, 28, 1))
    notebook = data.load("mnist", Data(validation="test"), mnist_folders)
    assert (len(notebook.y_train), len(notebook.y_validation)) == (60_000, 10_000)


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""


def _dashboard(url: str, path: str) -> object:
    """What plain optuna-dashboard answers."""
    server = make_server("127.0.0.1", 0, optuna_dashboard.wsgi(url), handler_class=_Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=30) as answer:
            return json.load(answer)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.timeout(900)
def test_dropout_and_depth_are_searched_on_mnist(home: Path, mnist_folders: list[Path]) -> None:
    command = ("run", "dropout-depth", "--trials", "6", "--epochs", "2", "--limit", "4000")
    out, err = _run(home, mnist_folders, *command)
    assert err.count("begins") == 6

    best = json.loads(_run(home, mnist_folders, "best", "dropout-depth", "--json")[0])
    assert best["study"] == "dropout-depth"
    assert best["value"] >= 0.95
    assert set(best["params"]) == {"depth", "dropout", "learning_rate"}
    assert best["user_attrs"]["protocol"] == "validation"
    assert Path(best["model"]).is_file()
    status = json.loads(_run(home, mnist_folders, "status", "dropout-depth", "--json")[0])
    counted = {key: status[key] for key in ("complete", "pruned", "failed", "running", "waiting", "budget")}
    assert counted == {"complete": 6, "pruned": 0, "failed": 0, "running": 0, "waiting": 0, "budget": 6}

    again, err = _run(home, mnist_folders, *command)
    assert again == out
    assert "begins" not in err

    url = f"sqlite:///{home}/yard/studies.db"
    study = optuna.load_study(study_name="dropout-depth", storage=url)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6
    assert study.best_trial.number == best["number"]
    assert study.best_value == best["value"]
    (listed,) = _dashboard(url, "/api/studies")["study_summaries"]  # type: ignore[index]
    assert listed["study_name"] == "dropout-depth"
    detail = _dashboard(url, f"/api/studies/{listed['study_id']}")
    assert [trial["state"] for trial in detail["trials"]] == ["Complete"] * 6  # type: ignore[index]
    assert [len(trial["intermediate_values"]) for trial in detail["trials"]] == [2] * 6  # type: ignore[index]
