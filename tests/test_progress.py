"""The progress display of a worker: a live table in a terminal."""

import dataclasses
import io
import time

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich.console import Console

from search import progress
from search.messages import Epoch
from search.progress import Lines, LiveTable, ending
from search.summary import progress_line, shown
from storage import claims, ledger
from storage.claims import Claim
from storage.owners import Owner
from studies import results

RECORD = Epoch(
    epoch=2, loss=0.5, accuracy=0.81, val_loss=0.4, val_accuracy=0.8725, seconds=2.0, images_per_second=1234.5
)


@pytest.fixture
def claim(storage: RDBStorage, study: str, me: Owner) -> Claim:
    """The running first trial of 5."""
    claimed = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claimed is not None
    return claimed


def test_the_live_table_shows_progress_and_each_slot(storage: RDBStorage, claim: Claim) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    table = LiveTable(console, [claim.study], ["cpu:0", "cpu:1"], lambda name: results.status(name, storage))
    table._refresh()

    def drawn() -> list[str]:
        with console.capture() as capture:
            console.print(table._drawn())
        return capture.get().splitlines()

    first, _, used, free = drawn()
    assert first.startswith("trivial: 0 of 5 trials, best none yet, time left unknown")
    assert used.split() == ["cpu:0", "-"]
    table.began(claim, {"dropout": 0.123456}, epochs=8)
    assert drawn()[2].split() == ["cpu:0", "0", "0/8", "starting", "dropout", "0.1235"]
    table.epoch(claim, RECORD)
    assert drawn()[2].split() == ["cpu:0", "0", "2/8", "0.8725", "1,234", "dropout", "0.1235"]
    assert free.split() == ["cpu:1", "-"]
    claims.finish(storage, claim, TrialState.COMPLETE, 0.8725, {})
    table.ended(claim, storage.get_trial(claim.trial_id))
    assert "trivial trial 0 complete: 0.8725" in console.file.getvalue()  # type: ignore[attr-defined]
    table._refresh()
    first, _, used, _ = drawn()
    assert first.startswith("trivial: 1 of 5 trials, best 0.8725 (trial 0), about")
    assert used.split() == ["cpu:0", "-"]


def test_an_error_of_one_look_does_not_end_the_display(
    storage: RDBStorage, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "STATUS_SECONDS", 0.0)
    looks: list[str] = []

    def ask(name: str) -> results.Status:
        looks.append(name)
        if len(looks) == 2:
            raise KeyError("No such study")  # as Optuna says it, where the row is gone
        return results.status(name, storage)

    console = Console(file=io.StringIO(), force_terminal=True)
    with LiveTable(console, [claim.study], ["cpu:0"], ask):
        deadline = time.monotonic() + 30
        while len(looks) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(looks) >= 3


def test_the_live_table_leaves_the_terminal_as_it_was_even_after_an_error(storage: RDBStorage, claim: Claim) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=110)

    def broken() -> None:
        with LiveTable(console, [claim.study], ["cpu:0"], lambda name: results.status(name, storage)):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        broken()
    assert output.getvalue().rfind("\x1b[?25h") > output.getvalue().rfind("\x1b[?25l")  # the cursor is shown again


def test_lines_are_whole_lines_whatever_their_length(storage: RDBStorage, claim: Claim) -> None:
    output = io.StringIO()
    lines = Lines(Console(file=output, width=40), lambda name: results.status(name, storage))
    lines.began(claim, {"dropout": 0.25, "note": "[bold]" + "x" * 60}, epochs=8)
    lines.epoch(claim, RECORD)
    claims.requeue(storage, claim, "interrupted", "")
    lines.ended(claim, storage.get_trial(claim.trial_id))
    lines.began(dataclasses.replace(claim, attempt=2), {}, epochs=8)
    assert output.getvalue().splitlines() == [
        f"trivial trial 0 begins: dropout 0.25, note [bold]{'x' * 60}",
        "trivial trial 0 epoch 2/8: accuracy 0.8100, validation 0.8725, 1,234 images/s",
        "trivial trial 0 is back in the queue; 0 of 5 done, best none yet",
        "trivial trial 0 begins (attempt 2): ",
    ]


def test_every_outcome_has_its_text() -> None:
    def trial(state: TrialState, **given: object) -> str:
        return ending(optuna.trial.create_trial(state=state, **given))  # type: ignore[arg-type]

    failure = {"failure": {"kind": "nan", "message": "the loss became nan"}}
    assert trial(TrialState.COMPLETE, value=0.98765) == "complete: 0.9877"
    assert trial(TrialState.PRUNED, intermediate_values={1: 0.1, 2: 0.2}) == "pruned after epoch 2"
    assert trial(TrialState.FAIL, user_attrs=failure) == "failed (nan): the loss became nan"
    assert trial(TrialState.FAIL) == "failed (unknown): no reason was stored"
    assert trial(TrialState.WAITING) == "is back in the queue"
    assert trial(TrialState.RUNNING) == "runs elsewhere"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "time left unknown"), (61.4, "about 61 s left"), (600, "about 10 min left"), (9000, "about 2.5 h left")],
)
def test_the_time_left_has_fitting_units(storage: RDBStorage, study: str, seconds: float | None, words: str) -> None:
    status = dataclasses.replace(results.status(study, storage), seconds_left=seconds)
    assert progress_line(status).endswith(words)


def test_pruned_trials_are_counted_and_a_confirmation_has_no_best(storage: RDBStorage, claim: Claim) -> None:
    claims.finish(storage, claim, TrialState.PRUNED, None, {})
    status = results.status(claim.study, storage)
    assert progress_line(status).startswith("trivial: 1 of 5 trials (1 pruned), best none yet, ")
    output = io.StringIO()
    lines = Lines(Console(file=output, width=200), lambda name: results.status(name, storage))
    lines.ended(claim, storage.get_trial(claim.trial_id))
    assert "; 1 of 5 done (1 pruned), best none yet" in output.getvalue()
    confirmation = dataclasses.replace(status, protocol="confirmation", pruned=0, complete=1, best=0.9, best_number=0)
    assert progress_line(confirmation).startswith("trivial: 1 of 5 trials, about")


def test_hyperparameters_are_short() -> None:
    assert shown({"depth": 3, "learning_rate": 0.000123456, "optimizer": "adam", "batch_norm": True}) == (
        "depth 3, learning_rate 0.0001235, optimizer adam, batch_norm True"
    )
