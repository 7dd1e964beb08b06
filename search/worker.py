"""A worker machine: for each slot, claim -> attempt -> outcome, until the studies are done or a signal comes."""

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

from search import interruption
from search.attempt import Attempt
from search.devices import Slot
from search.errors import AcceleratorError, DeviceError, MachineError
from search.heartbeat import Heartbeat
from search.idle import FIRST_SECONDS, Looks
from search.interruption import INTERRUPTED, STOPPING_SIGNALS
from search.limits import Limits
from search.open_studies import RETRY_SECONDS, OpenStudies
from search.progress import Listener
from search.publisher import Publisher
from search.trainer import Trainer
from storage import claims
from storage.claims import Claim
from storage.errors import DiskError, StudyGone, StudyUnreadable
from storage.settings import Settings
from storage.slots import present
from storage.transactions import PatientStorage, read

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
SILENT_SECONDS = 60.0  # since the last heartbeat of a worker that is taken for living
EXIT_SECONDS = 5.0  # beyond the trainers' own time: for the last words to the database, and once more to end


def work(
    names: Sequence[str] | None,
    storage: PatientStorage,
    settings: Settings,
    slots: Sequence[Slot],
    listeners: Sequence[Listener] = (),
    *,
    share: bool = False,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> bool:
    """Fills `slots` with trials of the studies `names`, the first study first; None: of all studies, for ever.

    Where `share` is true or `names` is None, nobody named the studies: they share the slots (`OpenStudies._share`). A
    study that this machine cannot train is then left to other workers with a warning, and checked again every
    RETRY_SECONDS. Otherwise it ends the work: the caller has called `check_fit` before.

    A slot that cannot train, because its device fails or the disk is full, is closed and tried again after
    RETRY_SECONDS, while the others go on. Raises its error (DeviceError, DiskError) once all slots are closed, unless
    `names` is None.

    Returns True when all of them have ended or are paused, or the `limits` are reached: then the trials that run are
    put back into the queue with a checkpoint. Returns False when a signal ended the work: the first of the
    STOPPING_SIGNALS has the trainers write a checkpoint and puts their trials back into the queue; a second SIGINT or
    SIGTERM leaves at once. `stop` does the same as the first: whoever gives it also chose the GPUs of all slots.
    """
    interrupted = stop or threading.Event()
    errors: list[BaseException] = []
    looks, limits = Looks(), limits or Limits()
    open_studies = OpenStudies(
        names,
        storage,
        settings,
        slots,
        share=share or names is None,
        interrupted=interrupted,
        around_check=limits.looking,
        found_something=looks.found_something,
    )
    heartbeat = Heartbeat(storage, settings.beat_seconds, slots)
    closed_slots = _ClosedSlots(heartbeat, open_studies, limits, len(slots), forever=names is None)
    all_listeners = [Publisher(storage, settings.artifact_store), *listeners]

    def fill(slot: Slot, trainer: Trainer) -> None:
        try:
            _fill(open_studies, settings, trainer, heartbeat, all_listeners, interrupted, closed_slots, looks, limits)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            if not storage.shutting_down.is_set():  # then every call to the database ends in an error
                errors.append(error)
            interrupted.set()

    if stop is None:
        _warn_of_shared_gpus(storage, slots)
    with ExitStack() as stack:
        trainers = [stack.enter_context(_trainer(slot, settings)) for slot in slots]
        threads = [
            threading.Thread(target=fill, args=pair, name=pair[0].name, daemon=True)
            for pair in zip(slots, trainers, strict=True)
        ]
        received = stack.enter_context(stopping_signals(interrupted))
        for listener in all_listeners:
            stack.enter_context(listener)
        stack.enter_context(heartbeat)
        limits.start_idle()
        for thread in threads:
            thread.start()
        exit_at, over_limit = float("inf"), False
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(TICK_SECONDS)
            reason = None if interrupted.is_set() else limits.over(storage.last_away)
            if reason is not None:
                log.warning("%s: this worker ends", reason)
                over_limit = True
                interrupted.set()
            if interrupted.is_set() and exit_at == float("inf"):
                exit_at = time.monotonic() + settings.stop_seconds + EXIT_SECONDS
                for number in received:
                    name = signal.Signals(number).name
                    log.warning("%s: finishing the running batches; interrupt again to exit at once", name)
                # From here: a slot's own thread may be waiting for a database that is away.
                for trainer in trainers:
                    trainer.stop("keep")
            if len(received) > 1:
                exit_at = float("-inf")
            if time.monotonic() > exit_at:
                # Their trials stay RUNNING: they are taken back as those of a process that ended, and go on from
                # their checkpoints.
                storage.shutting_down.set()
                break
        end_by = time.monotonic() + EXIT_SECONDS
        for thread in threads:
            thread.join(max(0.0, end_by - time.monotonic()))
    if errors:
        raise errors[0]
    return not interrupted.is_set() or (over_limit and not received)


def _warn_of_shared_gpus(storage: PatientStorage, slots: Sequence[Slot]) -> None:
    """Warns if a living process of this machine has slots on the same GPUs: each may take the memory of a whole one."""
    ours = {slot.gpu for slot in slots if slot.device.kind == "gpu"}
    for other in read(storage, present):
        near = other.host == socket.gethostname() and other.silent_seconds <= SILENT_SECONDS
        gpu = re.match(r"gpu:\d+(\.mig\d+)?", other.slot)
        if near and other.pid != os.getpid() and gpu is not None and gpu[0] in ours:
            log.warning(
                "process %d of this machine has the slot %s on the same GPU: give each worker GPUs of its own with "
                "--devices, or start one worker with --per-device",
                *(other.pid, other.slot),
            )


def _trainer(slot: Slot, settings: Settings) -> Trainer:
    return Trainer(slot, settings.trainer_log(slot.name, os.getpid()), settings.memory_growth)


def _fill(
    open_studies: OpenStudies,
    settings: Settings,
    trainer: Trainer,
    heartbeat: Heartbeat,
    listeners: Sequence[Listener],
    interrupted: threading.Event,
    closed_slots: "_ClosedSlots",
    looks: Looks,
    limits: Limits,
) -> None:
    """One slot's loop."""
    owner = heartbeat.owner(trainer.slot)
    while not interrupted.is_set():
        if not looks.mine():
            interrupted.wait(TICK_SECONDS)
            continue
        with limits.looking():
            found = open_studies.now()
            in_time = [handle for handle in found if limits.has_time_for(handle)]
        for handle in in_time:
            try:
                with limits.looking():
                    claim = claims.claim(
                        handle.storage, handle.study, owner, settings.grace_seconds, settings.beat_seconds
                    )
            except (StudyGone, StudyUnreadable):
                continue  # deleted or overwritten a moment ago; the next look will not find it
            if claim is not None:
                looks.found_something()
                try:
                    with limits.busy(), heartbeat.of(claim) as pulse:
                        open_studies.served(handle.study)
                        Attempt(
                            handle,
                            claim,
                            trainer,
                            settings,
                            pulse=pulse,
                            listeners=listeners,
                            interrupted=interrupted,
                        ).run()
                except MachineError as error:
                    open_studies.pass_over(handle.study, error)
                except (DeviceError, DiskError) as error:
                    looks.found_something()  # the trial waits again, for the slots that are open
                    closed_slots.close(trainer.slot, claim, error, interrupted)
                else:
                    open_studies.trained(handle.study)
                    closed_slots.forget_suspicion(trainer.slot)
                looks.found_something()  # the trial may wait again
                break
        else:
            # Not while another slot holds a trial: its study may only be paused for a moment, and then needs all slots.
            if open_studies.done() and not limits.is_busy:
                looks.found_something()  # the other slots end, too
                return
            if found and not in_time and open_studies.all_checked():
                looks.found_something()
                return
            # Others run what is left. They may die, and then it is ours.
            looks.found_nothing()


class _ClosedSlots:
    """The slots of this worker that cannot train at the moment."""

    def __init__(
        self, heartbeat: Heartbeat, open_studies: OpenStudies, limits: Limits, slots: int, *, forever: bool
    ) -> None:
        self._heartbeat, self._open_studies, self._limits = heartbeat, open_studies, limits
        self._slots, self._forever = slots, forever
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._suspects: dict[str, int] = {}  # by slot, the trial in which its accelerator failed last

    def close(self, slot: Slot, claim: Claim, error: DeviceError | DiskError, interrupted: threading.Event) -> None:
        """Closes `slot` for RETRY_SECONDS, or until nothing is left to do. Raises `error` if no other slot is open.

        If the trial may be to blame, the last open slot stays open until another trial ends so, too.
        """
        with self._lock:
            is_last = len(self._names) == self._slots - 1
            if is_last and isinstance(error, AcceleratorError):
                suspect = self._suspects.setdefault(slot.name, claim.trial_id)
                if suspect == claim.trial_id:
                    return
            if is_last and not self._forever:
                raise error
            self._names.add(slot.name)
        log.warning("slot %s is closed, and tried again in %.0f s: %s", slot.name, RETRY_SECONDS, error)
        self._heartbeat.close(slot, str(error))
        until = time.monotonic() + RETRY_SECONDS
        while time.monotonic() < until and not interrupted.is_set():
            if not self._open_studies.now() and self._open_studies.done() and not self._limits.is_busy:
                break
            interrupted.wait(FIRST_SECONDS)
        self._heartbeat.reopen(slot)
        with self._lock:
            self._names.remove(slot.name)
            self._suspects.pop(slot.name, None)

    def forget_suspicion(self, slot: Slot) -> None:
        """A trial has ended well on `slot`, or was interrupted: its device works."""
        with self._lock:
            self._suspects.pop(slot.name, None)


@contextmanager
def stopping_signals(interrupted: threading.Event) -> Iterator[list[int]]:
    """Turns the first of the STOPPING_SIGNALS into `interrupted`; yields the list of those that came.

    A second SIGINT or SIGTERM ends the process of a command. In a notebook or a script the process is not ours to end:
    who works there looks at the list, and ends at once by itself.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python gives signals to the main thread alone: somebody else handles them
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            if number in (signal.SIGHUP, signal.SIGUSR1):
                return  # a terminal that is closed sends it twice, and a scheduler to every process
            if interruption.is_command:
                os._exit(INTERRUPTED)  # the trainers notice and end; the next claim takes the trials back
        # It logs nothing: the signal may come in the middle of a line of the log.
        received.append(number)
        interrupted.set()

    # `nohup` has SIGHUP ignored, so that a worker outlives its terminal.
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in STOPPING_SIGNALS if number != signal.SIGHUP or not outlives]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
