"""The notebooks of `examples/` run from top to bottom in a real Jupyter kernel, and an interrupt loses nothing."""

import os
import queue
import re
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

import studies

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
CELL_SECONDS = 600
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "JUPYTER_PLATFORM_DIRS": "1"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_no_outputs_and_is_named_in_the_documentation(name: str) -> None:
    """Outputs would be of one machine, and each run would change the file."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []
    assert f"examples/{name}.ipynb" in (FOLDER.parent / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name: str, home: Path) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(home)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<table>" in page for page in pages), "a result or a leaderboard is drawn"
    assert all(state.ended and not state.failed for state in studies.statuses())


SEARCH = """
import keras
import numpy as np
import trialyard as ty

def build(hyperparameters, shape, classes):
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dropout(hyperparameters["rate"]),
                             keras.layers.Dense(classes, "softmax")])

data = np.zeros((200, 8, 8), "uint8"), np.arange(200) % 2
ty.search(build, data, space={"rate": (0.0, 0.5)}, trials=1, epochs=10_000)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_interrupted_cell_puts_its_trial_back(home: Path) -> None:
    manager, client = start_new_kernel(cwd=str(home), env=dict(os.environ))
    try:
        request = client.execute(SEARCH)
        error, deadline = None, time.monotonic() + CELL_SECONDS
        while error is None:
            assert time.monotonic() < deadline
            try:
                message = client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            content = message["content"]
            shown = content.get("text") or content.get("data", {}).get("text/plain", "")
            if re.search(r"\b(?![01]/)\d+/10000", shown):  # of the live table: the second epoch, or a later one
                manager.interrupt_kernel()
            if message["msg_type"] == "error" and message["parent_header"]["msg_id"] == request:
                error = content["ename"]
        assert error == "Interrupted"
        assert studies.status("build").waiting == 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
