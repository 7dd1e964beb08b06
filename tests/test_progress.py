"""The progress display of a worker: a live table in a terminal."""

import contextlib
import dataclasses
import errno
import io
import itertools
import logging
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import COMMAND, SMALL, Clock, Command
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from sklearn.datasets import load_digits

from search import notebook_display, progress
from search.devices import Slot, cpu
from search.messages import Batches, Epoch
from search.pace import Mark, Running, study_seconds_left
from search.progress import Lines, LiveTable, ending
from search.standard_error import StandardError
from search.summary import progress_line, shown
from storage import claims, ledger
from storage.claims import Claim
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import registry, results
from studies.definition import Definition

RECORD = Epoch(
    epoch=2, loss=0.5, accuracy=0.81, val_loss=0.4, val_accuracy=0.8725, seconds=2.0, images_per_second=1234.5
)


def _running(half: float) -> Running:
    """A trial that is at its half at 1000 s, and needs `half` seconds for the other one."""
    return Running(epochs=8).moved(Mark(moment=1000.0 - half, position=0)).moved(Mark(moment=1000.0, position=4))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the display."""
    moved = Clock()
    monkeypatch.setattr(progress, "time", moved)
    return moved


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
    assert drawn()[2].split() == ["cpu:0", "0", "0/8", "starting", "0:00", "dropout", "0.1235"]
    table.epoch(claim, RECORD)
    assert drawn()[2].split() == ["cpu:0", "0", "2/8", "0.8725", "1,234", "0:00", "dropout", "0.1235"]
    assert free.split() == ["cpu:1", "-"]
    claims.finish(storage, claim, TrialState.COMPLETE, 0.8725, {})
    table.ended(claim, storage.get_trial(claim.trial_id))
    assert "trivial trial 0 complete: 0.8725" in console.file.getvalue()  # type: ignore[attr-defined]
    table._refresh()
    first, _, used, _ = drawn()
    assert first.startswith("trivial: 1 of 5 trials, best 0.8725 (trial 0), about")
    assert used.split() == ["cpu:0", "-"]


def test_the_live_table_shows_how_far_the_epoch_is_and_how_long_the_rest_takes(
    storage: RDBStorage, claim: Claim, clock: Clock
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    table = LiveTable(console, [claim.study], ["cpu:0"], lambda name: results.status(name, storage))
    table._refresh()

    def drawn() -> tuple[str, list[str]]:
        with console.capture() as capture:
            console.print(table._drawn())
        first, _, row = capture.get().splitlines()
        return first, row.split()

    table.began(claim, {"dropout": 0.25}, epochs=8)
    clock.now += 20.0  # to start, which is no part of its pace
    table.batches(claim, Batches(epoch=1, done=0, total=10))
    assert drawn()[0].endswith("time left unknown")
    clock.now += 3.0
    table.batches(claim, Batches(epoch=1, done=5, total=10))  # so an epoch takes 6 s
    first, row = drawn()
    assert first.endswith("about 4 min left")  # 45 s of this trial, and 4 more of 48 s
    assert row == ["cpu:0", "0", "1/8", "━━━━━", "0:23", "0:45", "dropout", "0.25"]
    clock.now += 2.0
    assert drawn()[1][4:6] == ["0:25", "0:43"]


def test_a_choice_with_brackets_is_shown_as_it_is(storage: RDBStorage, claim: Claim) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    table = LiveTable(console, [claim.study], ["cpu:0"], lambda name: results.status(name, storage))
    table.began(claim, {"block": "[bold]", "end": "[/x]"}, epochs=8)
    with console.capture() as capture:
        console.print(table._drawn())
    assert "block [bold], end [/x]" in capture.get()


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (100, ["slot", "trial", "epoch", "validation", "images/s", "time", "left", "hyperparameters"]),
        (75, ["slot", "trial", "epoch", "validation", "time", "left", "hyperparameters"]),
        (60, ["slot", "trial", "epoch", "validation", "time", "left"]),
        (40, ["slot", "trial", "epoch", "validation", "time", "left"]),
    ],
)
def test_a_narrow_terminal_has_what_it_has_room_for(
    storage: RDBStorage, claim: Claim, clock: Clock, width: int, titles: list[str]
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    table = LiveTable(console, None, ["gpu:10"], lambda name: results.status(name, storage))
    claim = dataclasses.replace(claim, owner=dataclasses.replace(claim.owner, slot="gpu:10"))
    table.began(claim, {"depth": 3}, epochs=10)
    table.epoch(claim, RECORD)
    clock.now += 90.0
    with console.capture() as capture:
        console.print(table._drawn())
    head, row = capture.get().splitlines()
    assert head.split() == titles
    assert row.split()[:4] == ["gpu:10", "0", "2/10", "0.8725"]
    assert "1:30" in row


def test_a_trial_that_goes_on_starts_where_it_is(storage: RDBStorage, claim: Claim, clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    table = LiveTable(console, [claim.study], ["cpu:0"], lambda name: results.status(name, storage))
    again = dataclasses.replace(claim, attempt=2)

    def row() -> list[str]:
        with console.capture() as capture:
            console.print(table._drawn())
        return capture.get().splitlines()[1].split()

    table.began(again, {}, epochs=8)
    assert row()[:4] == ["cpu:0", "0", "?/8", "starting"]
    table.epoch(again, dataclasses.replace(RECORD, epoch=4))
    assert row()[:4] == ["cpu:0", "0", "4/8", "0.8725"]
    table.batches(again, Batches(epoch=5, done=0, total=10))
    clock.now += 4.0
    table.epoch(again, dataclasses.replace(RECORD, epoch=5))
    assert row()[-1] == "0:12"  # three more of 4 s: the first four were another attempt's


@pytest.mark.parametrize(
    ("trial_seconds", "running", "slots", "expected"),
    [
        (None, [], 2, None),
        (None, [Running(epochs=8)], 2, None),  # nothing is measured
        (100.0, [], 2, 400.0),  # 8 trials in 2 slots
        (100.0, [], 16, 100.0),  # more slots than trials
        (100.0, [Running(epochs=8)] * 2, 2, 400.0),
        (100.0, [_running(half=20.0)] * 2, 2, 320.0),  # 20 s of each of the two, 6 more of 100 s
        (None, [_running(half=50.0)], 1, 750.0),
        (10.0, [_running(half=500.0)], 8, 500.0),  # the longest one decides
    ],
)
def test_the_time_left_follows_from_the_pace(
    storage: RDBStorage,
    study: str,
    trial_seconds: float | None,
    running: list[Running],
    slots: int,
    expected: float | None,
) -> None:
    status = dataclasses.replace(results.status(study, storage), budget=10, complete=2, trial_seconds=trial_seconds)
    assert study_seconds_left(status, running, slots, now=1000.0) == expected
    assert study_seconds_left(dataclasses.replace(status, budget=2), running, slots, now=1000.0) == 0.0


@pytest.mark.parametrize(
    ("hours", "running", "expected"),
    [
        (1.0, [], 400.0),  # 8 trials in 2 slots
        (0.05, [], 280.0),  # 180 s, and the trials that start until then
        (0.05, [_running(half=500.0)], 500.0),  # it runs to its end
        (0.0, [_running(half=20.0)], 20.0),
        (0.0, [], 0.0),
    ],
)
def test_the_time_left_ends_with_the_hours_of_the_budget(
    storage: RDBStorage, study: str, hours: float, running: list[Running], expected: float
) -> None:
    status = results.status(study, storage)
    status = dataclasses.replace(status, budget=10, complete=2, trial_seconds=100.0, hours_left=hours)
    assert study_seconds_left(status, running, slots=2, now=1000.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"force_terminal": True, "_environ": {"TERM": "xterm"}}, LiveTable),
        ({"force_terminal": True, "_environ": {"TERM": "dumb"}}, Lines),  # it cannot move its cursor
        ({"force_terminal": False}, Lines),
    ],
)
def test_who_cannot_redraw_a_table_gets_lines(
    storage: RDBStorage, options: dict[str, Any], kind: type[progress.Listener]
) -> None:
    console = Console(file=io.StringIO(), **options)
    (listener,) = progress.display(None, storage, [Slot(device=cpu())], console)
    assert type(listener) is kind


def test_a_notebook_draws_the_table_over_itself(
    storage: RDBStorage, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    class Handle:
        def update(self, picture: Any) -> None:
            drawn.append(picture._repr_mimebundle_((), ())["text/plain"])

    def display(picture: Any, display_id: bool) -> Handle:
        assert display_id
        return Handle()

    # Tests have no Jupyter: this stands for its only function that is used.
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))  # type: ignore[arg-type]
    monkeypatch.setattr(notebook_display, "SECONDS", 0.02)
    console = Console(force_jupyter=True, file=io.StringIO())
    monkeypatch.setattr(console, "print", lambda *given, **more: None)
    with LiveTable(console, [claim.study], ["cpu:0"], lambda name: results.status(name, storage)) as table:
        table.began(claim, {}, epochs=8)
        deadline = time.monotonic() + 30
        while not any("starting" in text for text in drawn) and time.monotonic() < deadline:
            time.sleep(0.02)
        monkeypatch.setattr(progress, "STATUS_SECONDS", 60.0)  # nobody asks until the end
        claims.finish(storage, claim, TrialState.COMPLETE, 0.75, {})
        table.ended(claim, storage.get_trial(claim.trial_id))
    assert any("starting" in text for text in drawn)
    assert "starting" not in drawn[-1]
    assert "1 of 5 trials, best 0.7500" in drawn[-1], "the last picture stays in the cell"


def test_an_estimate_comes_first_where_earlier_trials_give_one(storage: RDBStorage, claim: Claim) -> None:
    status = dataclasses.replace(results.status(claim.study, storage), trial_seconds=3900.0)
    assert progress._estimate(status, 2) == ["trivial: about 2 h 42 min on these 2 slots, for 5 more trials"]
    assert progress._estimate(dataclasses.replace(status, trial_seconds=None), 2) == []


ROW = re.compile(r"cpu:0 .*")
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


def _until_silent(terminal: int) -> Iterator[tuple[float, str]]:
    """What comes from the terminal, with the moment, until nobody writes to it any more."""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 65536):
            yield time.monotonic(), chunk.decode(errors="replace")


@pytest.mark.long
def test_something_moves_at_least_every_two_seconds_while_a_trial_trains(
    start: Command, write_small: Callable[..., Path], write_npz: Callable[..., Path]
) -> None:
    images, labels = load_digits(return_X_y=True)
    images = np.tile(images.reshape(-1, 8, 8).astype(np.uint8) * 15, (20, 1, 1))
    text = SMALL.replace("batch_size = 20", "batch_size = 2")  # an epoch of more than 10 s
    file = write_small(1, 1, text)
    write_npz(x_train=images, y_train=np.tile(labels, 20))
    shown = os.environ | {"TERM": "xterm-256color", "COLUMNS": "110"}
    process = start("run", str(file), "--devices", "cpu", variables=shown, terminal=True)
    rows: list[tuple[float, str]] = []
    bars_since = None
    for moment, chunk in _until_silent(process.stderr.fileno()):
        for row in ROW.findall(CONTROL.sub("", chunk)):
            if " 1/1 " not in row:
                continue
            bars_since = bars_since or moment
            if not rows or rows[-1][1] != row:
                rows.append((moment, row))
        if bars_since is not None and moment > bars_since + 6.0:
            process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.wait(60) == 130
    moments = [moment for moment, _ in rows if moment <= rows[0][0] + 6.0]
    assert moments[-1] - moments[0] > 4.0, rows
    assert max(later - earlier for earlier, later in itertools.pairwise(moments)) <= 2.0, rows


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


@pytest.mark.parametrize(
    ("protocol", "images"), [("validation", "validation"), ("test", "test"), ("confirmation", "validation")]
)
def test_an_epoch_s_accuracy_is_named_after_its_images(
    storage: RDBStorage, claim: Claim, protocol: str, images: str
) -> None:
    def status(name: str) -> results.Status:
        return dataclasses.replace(results.status(name, storage), protocol=protocol)

    output = io.StringIO()
    lines = Lines(Console(file=output, width=200), status)
    lines.began(claim, {}, epochs=8)
    lines.epoch(claim, RECORD)
    assert f"accuracy 0.8100, {images} 0.8725" in output.getvalue()
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    table = LiveTable(console, [claim.study], ["cpu:0"], status)
    table._refresh()
    with console.capture() as capture:
        console.print(table._drawn())
    titles = capture.get().splitlines()[1]
    assert titles.split() == ["slot", "trial", "epoch", images, "images/s", "time", "left", "hyperparameters"]


def test_a_search_goes_on_when_its_output_is_closed(
    home: Path, write_small: Callable[..., Path], start: Command
) -> None:
    """As in ``trialyard run small.toml 2>&1 | head -1``."""
    search = start("run", str(write_small(trials=2, epochs=2)), program=COMMAND)
    assert search.stderr is not None
    assert "small" in search.stderr.readline()
    search.stderr.close()
    assert search.wait(240) == 0
    found = results.status("small", f"sqlite:///{home}/yard/studies.db")
    assert (found.ended, found.finished) == (True, 2)


def test_a_search_goes_on_when_the_disk_of_its_log_is_full(
    home: Path, write_small: Callable[..., Path], start: Command
) -> None:
    """As in ``trialyard run small.toml 2> work.log``."""
    definition = str(write_small(trials=2, epochs=2))
    full = ["sh", "-c", 'exec "$@" 2> /dev/full', "sh", *COMMAND]
    assert start("run", definition, program=full).wait(240) == 0
    found = results.status("small", f"sqlite:///{home}/yard/studies.db")
    assert (found.ended, found.finished) == (True, 2)


@pytest.mark.parametrize("kind", [Lines, LiveTable])
def test_the_display_goes_on_when_its_terminal_is_gone(
    storage: PatientStorage, claim: Claim, kind: type[progress.Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``disown``, when the window is closed."""
    monkeypatch.setenv("TERM", "xterm" if kind is LiveTable else "dumb")
    ours, its = os.openpty()
    terminal = os.fdopen(its, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        log_handlers = [logging.StreamHandler(), RichHandler(console=StandardError())]
        (listener,) = progress.display(None, storage, [Slot(device=cpu(), index=0)])
        assert type(listener) is kind
        with listener:
            os.close(ours)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(its, b"x")
            for _ in range(2):
                listener.began(claim, {"dropout": 0.25}, epochs=8)
                listener.epoch(claim, RECORD)
                listener.ended(claim, storage.get_trial(claim.trial_id))
                listener.deleted(claim)
            for handler in log_handlers:
                handler.handle(logging.makeLogRecord({"msg": "a line of the log"}))
            if isinstance(listener, LiveTable):
                assert isinstance(listener._live, Live)
                listener._live.refresh()
                print("a line of somebody else's", file=sys.stderr)
                thread = listener._live._refresh_thread
                assert thread is not None
                thread.join(1.0)
                assert thread.is_alive(), "Rich's own thread goes on as well"
    with contextlib.suppress(OSError):
        terminal.close()


def test_what_cannot_be_written_is_not_kept_and_later_lines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(io.StringIO):
        is_full = True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk = Disk()
    monkeypatch.setattr(sys, "stderr", disk)
    console = StandardError()
    console.print("lost")
    disk.is_full = False
    console.print("written")
    assert disk.getvalue() == "written\n"


def test_lines_go_on_when_somebody_broke_the_study_s_attributes(storage: RDBStorage, claim: Claim) -> None:
    output = io.StringIO()
    lines = Lines(Console(file=output, width=200), lambda name: results.status(name, storage))
    storage.set_study_user_attr(claim.study_id, "trialyard:state", 4)
    lines.ended(claim, storage.get_trial(claim.trial_id))
    assert output.getvalue().startswith("trivial trial 0 runs elsewhere; study 'trivial'")
    assert "trialyard:state" in output.getvalue()


def test_every_outcome_has_its_text() -> None:
    def trial(state: TrialState, **given: object) -> str:
        return ending(optuna.trial.create_trial(state=state, **given))  # type: ignore[arg-type]

    failure = {"failure": {"kind": "nan", "message": "the loss became nan"}}
    assert trial(TrialState.COMPLETE, value=0.98765) == "complete: 0.9877"
    assert trial(TrialState.PRUNED, intermediate_values={1: 0.1, 2: 0.2}) == "pruned after epoch 2: 0.2000"
    repeated = {"value": 0.6, "intermediate_values": {1: 0.8, 2: 0.4}, "user_attrs": {"repeats": [0.8, 0.4]}}
    assert trial(TrialState.PRUNED, **repeated) == "pruned after repeat 2: 0.6000"
    assert trial(TrialState.FAIL, user_attrs=failure) == "failed (nan): the loss became nan"
    assert trial(TrialState.FAIL) == "failed (unknown): no reason was stored"
    assert trial(TrialState.WAITING) == "is back in the queue"
    assert trial(TrialState.RUNNING) == "runs elsewhere"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "time left unknown"),
        (61.4, "about 61 s left"),
        (600, "about 10 min left"),
        (7800, "about 2 h 10 min left"),
        (260_000, "about 3 days left"),
    ],
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


def test_studies_that_share_the_slots_have_a_part_of_them_each(
    storage: PatientStorage, claim: Claim, trivial: Definition
) -> None:
    registry.create(trivial.model_copy(update={"name": "other"}), storage, {"fingerprint": "0" * 16})
    claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})

    def taking_a_minute(name: str) -> results.Status:
        return dataclasses.replace(results.status(name, storage), trial_seconds=60.0)

    def left(*names: str) -> str:
        table = LiveTable(Console(file=io.StringIO()), list(names), ["cpu:0", "cpu:1"], taking_a_minute, share=True)
        table._refresh()
        return table._progress(table._statuses[claim.study])

    assert left(claim.study).endswith("about 2 min left"), "four trials of a minute on two slots"
    assert left(claim.study, "other").endswith("about 4 min left")
    registry.pause("other", storage)
    assert left(claim.study, "other").endswith("about 2 min left")
