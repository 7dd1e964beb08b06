"""What people see while a worker works: a live table in a terminal, plain lines elsewhere, or nothing."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.devices import Slot, common_precision, precision_for
from search.messages import Batches, Epoch
from search.notebook_display import NotebookLive
from search.pace import Mark, Running, study_seconds_left
from search.standard_error import StandardError
from search.summary import clock, duration, progress_line, shown, so_far
from storage import attributes
from storage.claims import Claim
from storage.errors import StudyUnreadable
from storage.ledger import Study
from storage.metric import epochs_judged_on
from storage.transactions import PatientStorage
from studies.definition import from_json
from studies.errors import DefinitionError, StudyError
from studies.results import Status, status

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
LEAVE_SECONDS = 2.0
STATUS_SECONDS = 2.0  # how often the live table asks the database
BAR_COLUMNS = 10  # of the bar inside an epoch
# So wide must a terminal be for the speed, the hyperparameters and the bar. Else the others would be cut off.
SPEED_FROM, POINT_FROM, BAR_FROM = 100, 75, 60


class Listener:
    """Learns of everything that happens to the trials of a worker; this one does nothing. To be subclassed.

    The methods are called by the threads of the slots, several at a time, and a slot waits until its call returns. An
    exception ends the worker.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def began(self, claim: Claim, point: dict[str, Any], epochs: int) -> None:
        """The claimed trial starts, or starts again, with the hyperparameters `point`, for `epochs` in all."""

    def batches(self, claim: Claim, batches: Batches) -> None:
        """The running epoch of the claimed trial has `batches.done` of `batches.total`; at most once a second."""

    def epoch(self, claim: Claim, record: Epoch) -> None:
        """An epoch of the claimed trial has ended; or it continues after this epoch, from a checkpoint."""

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """The attempt at the claimed trial is over; `trial.state` says whether the trial has ended or waits again."""

    def deleted(self, claim: Claim) -> None:
        """The study of the claimed trial was deleted, and the trial with it."""


class Lines(Listener):
    """A plain line an event, for logs and pipes."""

    def __init__(self, console: Console, status: Callable[[str], Status]) -> None:
        self._console, self._status = console, status
        self._epochs: dict[tuple[str, int], int] = {}
        self._judged_on: dict[str, str] = {}  # which images, by the study's incarnation

    def began(self, claim: Claim, point: dict[str, Any], epochs: int) -> None:
        """Prints the trial's hyperparameters."""
        if claim.incarnation not in self._judged_on:
            self._judged_on[claim.incarnation] = self._epochs_judged_on(claim.study)
        self._epochs[claim.study, claim.number] = epochs
        again = f" (attempt {claim.attempt})" if claim.attempt > 1 else ""
        self._print(f"{claim.study} trial {claim.number} begins{again}: {shown(point)}")

    def epoch(self, claim: Claim, record: Epoch) -> None:
        """Prints the epoch's accuracies and speed."""
        self._print(
            f"{claim.study} trial {claim.number} epoch {record.epoch}/{self._epochs[claim.study, claim.number]}: "
            f"accuracy {record.accuracy:.4f}, {self._judged_on[claim.incarnation]} {record.val_accuracy:.4f}, "
            f"{record.images_per_second:,.0f} images/s"
        )

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """Prints how it ended, and how far the study is."""
        try:
            status = self._status(claim.study)
        except StudyError:  # it was deleted a moment ago
            self.deleted(claim)
            return
        except StudyUnreadable as error:  # other studies go on
            self._print(f"{claim.study} trial {claim.number} {ending(trial)}; {error}")
            return
        progress = f"{status.finished} of {status.budget} done{so_far(status)}"
        self._print(f"{claim.study} trial {claim.number} {ending(trial)}; {progress}")

    def deleted(self, claim: Claim) -> None:
        """Prints it."""
        self._print(f"study {claim.study} was deleted, and its trial {claim.number} with it")

    def _epochs_judged_on(self, study: str) -> str:
        try:
            return epochs_judged_on(self._status(study).protocol)
        except (StudyError, StudyUnreadable):  # deleted or damaged a moment ago: the trial will end
            return "validation"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Slot:
    claim: Claim
    point: dict[str, Any]
    running: Running
    began: float  # by the monotonic clock
    record: Epoch | None = None  # of the last whole epoch
    batches: Batches | None = None  # of the epoch that runs; None between two epochs

    def moved(self, position: float) -> None:
        """Notes where the training is, in epochs."""
        self.running = self.running.moved(Mark(moment=time.monotonic(), position=position))

    def cells(self, width: int) -> list[RenderableType]:
        """What the table has in the slot's row after its name, as far as a terminal of this `width` has room."""
        now, record, batches = time.monotonic(), self.record, self.batches
        seconds_left = self.running.seconds_left(now)
        bar = ProgressBar(total=batches.total, completed=batches.done, width=BAR_COLUMNS) if batches else ""
        speed = f"{record.images_per_second:,.0f}" if record else ""
        return [
            str(self.claim.number),
            f"{self._epoch()}/{self.running.epochs}",
            *([bar] if width >= BAR_FROM else []),
            f"{record.val_accuracy:.4f}" if record else "" if batches else "starting",
            *([speed] if width >= SPEED_FROM else []),
            clock(now - self.began),
            "" if seconds_left is None else clock(seconds_left),
            *([shown(self.point)] if width >= POINT_FROM else []),
        ]

    def _epoch(self) -> str:
        if self.batches is not None:
            return str(self.batches.epoch)
        if self.record is not None:
            return str(self.record.epoch)
        return "0" if self.claim.attempt == 1 else "?"  # it may go on from a checkpoint


class LiveTable(Listener):
    """A table that is drawn over itself: the studies' progress, and what each slot is at."""

    def __init__(
        self,
        console: Console,
        studies: list[str] | None,
        slots: Sequence[str],
        status: Callable[[str], Status],
        *,
        share: bool = False,
    ) -> None:
        # Where studies are waited for, those are shown that a slot is at.
        self._console, self._studies, self._status, self._shares = console, studies, status, share
        self._slots: dict[str, _Slot | None] = dict.fromkeys(slots)
        self._statuses: dict[str, Status] = {}
        self._asked = 0.0
        self._lock = threading.Lock()  # the slots' threads write, the drawing thread reads
        self._live: Live | NotebookLive
        if console.is_jupyter:
            self._live = NotebookLive(self._drawn)
        else:
            self._live = Live(get_renderable=self._drawn, console=console, refresh_per_second=4, transient=True)
        self._done = threading.Event()
        # A thread of its own: it may have to wait for the database.
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Self:
        self._refresh()
        self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(LEAVE_SECONDS)
        self._live.stop()

    def began(self, claim: Claim, point: dict[str, Any], epochs: int) -> None:
        """Shows the trial in its slot's row."""
        with self._lock:
            self._slots[claim.owner.slot] = _Slot(claim, point, Running(epochs=epochs), time.monotonic())

    def batches(self, claim: Claim, batches: Batches) -> None:
        """Moves the bar in its slot's row."""
        with self._lock:
            slot = self._slots[claim.owner.slot]
            if slot is not None:
                slot.batches = batches
                slot.moved(batches.epoch - 1 + batches.done / batches.total)

    def epoch(self, claim: Claim, record: Epoch) -> None:
        """Shows the epoch in its slot's row."""
        with self._lock:
            slot = self._slots[claim.owner.slot]
            if slot is not None:
                slot.record, slot.batches = record, None
                if slot.running.first is not None:  # else it goes on from a checkpoint
                    slot.moved(record.epoch)

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """Leaves a line above the table, and empties the slot's row."""
        with self._lock:
            self._slots[claim.owner.slot] = None
            self._asked = 0.0
        line = f"{claim.study} trial {claim.number} {ending(trial)}  {shown(trial.params)}"
        self._console.print(line, markup=False, highlight=False)

    def deleted(self, claim: Claim) -> None:
        """Leaves a line above the table, and empties the slot's row."""
        with self._lock:
            self._slots[claim.owner.slot] = None
            self._asked = 0.0
        line = f"study {claim.study} was deleted, and its trial {claim.number} with it"
        self._console.print(line, markup=False, highlight=False)

    def _run(self) -> None:
        while not self._done.wait(TICK_SECONDS):
            if time.monotonic() - self._asked >= STATUS_SECONDS:
                self._try_refresh()
        if isinstance(self._live, NotebookLive):  # its last picture stays in the cell
            self._try_refresh()

    def _try_refresh(self) -> None:
        try:
            self._refresh()
        except Exception as error:
            # Whatever failed: the next look may succeed, and nothing else depends on the display.
            log.warning("the display waits for the database: %s", error)
            log.debug("the whole error", exc_info=error)

    def _refresh(self) -> None:
        """Asks the database how far the studies are."""
        with self._lock:
            at_work = [slot.claim.study for slot in self._slots.values() if slot is not None]
        studies = self._studies if self._studies is not None else list(dict.fromkeys(at_work))
        statuses = {}
        for study in studies:
            with contextlib.suppress(StudyError):  # it was deleted
                statuses[study] = self._status(study)
        with self._lock:
            self._statuses, self._asked = statuses, time.monotonic()

    def _drawn(self) -> Group:
        width = self._console.width
        bar, speed = [""] if width >= BAR_FROM else [], ["images/s"] if width >= SPEED_FROM else []
        titles = ["slot", "trial", "epoch", *bar, self._judged_on(), *speed, "time", "left"]
        with self._lock:
            lines = [Text(self._progress(status), style="bold") for status in self._statuses.values()]
            table = Table(box=None, padding=(0, 2 if width >= BAR_FROM else 1, 0, 0))
            for title in titles:
                table.add_column(title, header_style="dim", no_wrap=True)
            if width >= POINT_FROM:
                table.add_column("hyperparameters", header_style="dim")
            for name, slot in self._slots.items():
                cells = ["-"] if slot is None else slot.cells(width)
                # Not as Rich's markup: a choice may be "[relu]", which would vanish.
                table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (name, *cells)))
        return Group(*lines, table)

    def _judged_on(self) -> str:
        """The title of the accuracies: which images they are of, if they are the same kind in all studies."""
        kinds = {epochs_judged_on(status.protocol) for status in self._statuses.values()}
        return "validation" if not kinds else kinds.pop() if len(kinds) == 1 else "accuracy"

    def _progress(self, status: Status) -> str:
        """One line for a study. Where several share the slots, each is taken to have an equal part of them."""
        own = [slot.running for slot in self._slots.values() if slot is not None and slot.claim.study == status.study]
        # Other machines may work on the study, too.
        others = sum(not other.ended and other.state == "open" for other in self._statuses.values())
        slots = max(len(self._slots) // max(1, others if self._shares else 1), status.running)
        return progress_line(status, study_seconds_left(status, own, slots, time.monotonic()))


def ending(trial: FrozenTrial) -> str:
    """How a trial ended, in a few words."""
    if trial.state == TrialState.COMPLETE:
        return f"complete: {trial.values[0]:.4f}"
    if trial.state == TrialState.PRUNED:
        value = attributes.mean_of_repeats(trial)
        if value is None and trial.last_step is not None:
            value = trial.intermediate_values[trial.last_step]
        return f"pruned after {attributes.last_step_text(trial)}{'' if value is None else f': {value:.4f}'}"
    if trial.state == TrialState.FAIL:
        failure = attributes.failure(trial.user_attrs.get("failure"))
        return f"failed ({failure['kind']}): {failure['message']}"
    return "is back in the queue" if trial.state == TrialState.WAITING else "runs elsewhere"


def display(
    studies: Sequence[Study] | None,
    storage: PatientStorage,
    slots: Sequence[Slot],
    console: Console | None = None,
    *,
    share: bool = False,
) -> list[Listener]:
    """The usual display, on standard error unless another `console` is given; None: of studies that are to come.

    `share` says that the studies share the slots, and are not taken one after the other.

    Says first in which precision each study trains here, and why; and how long it takes, where that is known.
    """
    threads = f" of {slots[0].threads} threads" if slots[0].threads > 1 else ""
    where = f"on {', '.join(slot.name for slot in slots)}{threads}"
    lines = [f"waiting for studies, {where}"] if studies is None else []
    for study in studies or ():
        with contextlib.suppress(DefinitionError):  # of a later version: the worker says why it leaves this study
            definition = from_json(study.definition)
            wanted, own_model = definition.precision, definition.has_own_model
            began = study.precision or common_precision(slots, wanted, own_model=own_model)
            precision, reason = precision_for(slots[0].device, wanted, began, own_model=own_model)
            lines.append(f"{study.name}: {where} in {precision}: {reason}")

    return display_of(lines, studies, storage, [slot.name for slot in slots], console, share=share)


def display_of(
    lines: Sequence[str],
    studies: Sequence[Study] | None,
    storage: PatientStorage,
    slots: Sequence[str],
    console: Console | None = None,
    *,
    share: bool = False,
) -> list[Listener]:
    """As `display`, for slots of which only the names are known; `lines` are what is said first."""
    shown = console or StandardError()

    def ask(name: str) -> Status:
        return status(name, storage)

    estimates = [line for study in studies or () for line in _estimate(ask(study.name), len(slots))]
    for line in (*lines, *estimates):
        shown.print(line, markup=False, highlight=False, soft_wrap=True)

    if not _can_redraw(shown):
        return [Lines(shown, ask)]
    names = None if studies is None else [study.name for study in studies]
    return [LiveTable(shown, names, slots, ask, share=share)]


def _can_redraw(console: Console) -> bool:
    """Whether a live display works there: in a terminal with a cursor, and in Jupyter."""
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


def _estimate(status: Status, slots: int) -> list[str]:
    """How long a study still takes, in one line; none before one of its trials has finished."""
    seconds = study_seconds_left(status, (), slots, time.monotonic())
    if seconds is None or status.ended:
        return []
    where = "this slot" if slots == 1 else f"these {slots} slots"
    left = status.budget - status.finished
    most = "" if status.hours_left is None else "at most "  # the hours may be over before
    trials = f"{most}{left} more trial{'' if left == 1 else 's'}"
    return [f"{status.study}: about {duration(seconds)} on {where}, for {trials}"]
