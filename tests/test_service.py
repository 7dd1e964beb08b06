"""Python does what the command line does: real runs in plain Python sessions."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TRIVIAL, Command, ended, until

import search
import studies
from search import service, worker
from search.errors import WorkerError
from search.messages import Measured
from storage.errors import StorageError
from studies.definition import parse
from studies.errors import StudyError


@pytest.mark.long
@pytest.mark.usefixtures("home")
def test_two_lines_of_python_search_and_give_the_model(start: Command) -> None:
    text = (
        'import search, studies; print(search.run("digits", trials=2, epochs=1).state.name)\n'
        'print(studies.best_model("digits").output_shape)'
    )
    out, err = ended(start("-c", text, program=[sys.executable]))
    assert out.splitlines() == ["COMPLETE", "(None, 10)"]
    assert "digits trial 0 epoch 1/1: accuracy" in err


RUN = """
import search, sys
try:
    search.run("small.toml", workers=1)
except search.Interrupted as stop:
    print(f"requeued: {stop.requeued}")
"""


def test_ctrl_c_puts_the_trial_back_and_the_same_call_goes_on(
    home: Path, write_small: Callable[..., Path], start: Command
) -> None:
    write_small(trials=1, epochs=20)
    process = start("-c", RUN)
    until(process, "trial 0 epoch 2/20")
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == "requeued: True\n"
    assert studies.status("small").waiting == 1
    out, err = ended(start("-c", RUN))
    assert out == ""
    assert "begins (attempt 2)" in err
    assert studies.attempts("small", 0)[-1].resumed_after is not None


def test_a_database_that_was_removed_meanwhile_is_an_error(
    home: Path, write_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> bool:
        (home / "yard" / "studies.db").unlink()
        return True

    monkeypatch.setattr(worker, "work", work)
    with pytest.raises(StorageError, match="was removed or replaced while it was in use"):
        search.run(write_small(), listeners=[])


@pytest.mark.long
def test_what_runs_studies_says_in_an_exception_what_is_wrong(home: Path, write_small: Callable[..., Path]) -> None:
    file = write_small(trials=2, epochs=1)
    checked = search.check(file, trials=3)
    assert (checked.definition.trials, checked.data["train"]) == (3, 240)
    creation = search.create(checked.definition, name="other")
    assert (creation.changed, creation.study.name, creation.study.budget.trials) == (True, "other", 3)
    assert not search.create(file, name="other", trials=3).changed
    with pytest.raises(StudyError, match="there is no study 'smal'"):
        search.work("smal")
    with pytest.raises(WorkerError, match="name none"):
        search.work("other", forever=True)
    with pytest.raises(WorkerError, match="there is no worker on this machine"):
        search.alive()
    with pytest.raises(StorageError, match="there is no database"):
        search.check_storage(f"sqlite:///{home}/none.db")
    assert search.check_storage() == []
    assert search.backup_storage(home / "copy.db") == 0
    assert search.import_results("other", [{"dropout": 0.3, "accuracy": 0.5}]) == 1
    attributes = studies.open("other")._storage.get_study_system_attrs(studies.open("other")._study_id)
    assert any(key.startswith("dashboard:note_str") and "0.5" in value for key, value in attributes.items())
    assert search.work("other", workers=1, listeners=[]) == ["other"]
    assert studies.status("other").ended
    assert search.leftovers().files == []
    assert search.prune(search.leftovers()) == 0


@pytest.mark.parametrize(("slots", "repeats", "seconds"), [(1, 1, 5 * 7.0), (2, 1, 3 * 7.0), (8, 4, 4 * 7.0)])
def test_the_time_of_a_study_is_that_of_its_trainings(slots: int, repeats: int, seconds: float) -> None:
    """Five trials of two epochs."""
    definition = parse(TRIVIAL.replace("epochs = 2", f"epochs = 2\nrepeats = {repeats}"))
    measured = Measured(parameters=(1, 2), start_seconds=1.0, epoch_seconds=3.0)
    assert service._estimated_seconds(definition, measured, slots) == seconds
