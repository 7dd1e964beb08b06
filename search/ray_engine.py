"""Workers on a Ray cluster: starts one actor a slot, shows what they do, and stops them.

Ray chooses the nodes and GPUs, and starts an actor again whose process or node has died. Who owns a trial is decided in
the database, as for every worker, so nothing is lost when Ray loses an actor, a node or its head.
"""

import contextlib
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy

from search.errors import RayError
from search.limits import Limits
from search.open_studies import RETRY_SECONDS
from search.progress import Listener, display_of
from search.ray_cluster import (
    Remote,
    connected,
    for_nodes,
    gpus_of_slot,
    installed,
    living_nodes,
    lost_head,
    lost_slot,
    memory_of_slot,
    shared_marker,
    survey,
    where_of,
)
from search.ray_slot import End, Event, Plan
from search.worker import EXIT_SECONDS, stopping_signals
from storage.claims import Claim
from storage.errors import error_text, many
from storage.ledger import Study
from storage.settings import Settings
from storage.transactions import PatientStorage

log = logging.getLogger(__name__)

HEAD_SECONDS = 40.0  # that the head may be away; after 60 Ray ends this process without a word of ours
TICK_SECONDS = 0.2
EVENTS_SECONDS = 2.0  # how long a slot waits for something to happen before it says that nothing did
# Since the last answer of a slot that is taken for one that Ray cannot place at the moment, or not again.
UNPLACED_SECONDS = 30.0
SILENT_SECONDS = 10.0
FAILING_SECONDS = 120.0  # a loop that goes on for longer has imported Keras, and may train


def work(
    studies: Sequence[Study] | None,
    storage: PatientStorage,
    settings: Settings,
    listeners: Sequence[Listener] | None,
    *,
    address: str,
    workers: int | None,
    gpus: float | None,
    share: bool,
    limits: Limits | None = None,
) -> bool:
    """Runs trials of `studies` on the Ray cluster at `address`, as `search.worker.work` does on this machine.

    `address` is "auto" for the cluster of this machine, or the head's as in "10.0.0.1:6379". There are `workers` slots,
    by default as many as the cluster has room for. Each has one core and `gpus` of one GPU: 1, a share such as 0.5, or
    0 to train on the processor; None is 1 where a node has a GPU, else 0. With `limits` each slot ends by itself, and
    gives its place back to Ray; the minutes count from the start of the command.

    Returns False if a signal ended the work; `storage.shutting_down` is set if not all trials are back in the queue.
    Raises RayError before anything starts if the cluster does not answer, has another version, or cannot run these
    slots; and the error of the slots if none of them can train.
    """
    if gpus is not None and not 0 <= gpus <= 1:
        raise RayError(
            f"--gpus {gpus:g}: a trial trains on one GPU or a share of one: give at most 1, such as 0.5 for two slots "
            "on each GPU"
        )
    ray = installed()
    with connected(ray, address), shared_marker(settings) as marker:
        nodes = living_nodes(ray)
        wanted = gpus_of_slot(ray, nodes, gpus)
        places = [node for node in nodes if node.room(wanted)]
        own = ray.get_runtime_context().get_node_id()
        is_sqlite = sqlalchemy.make_url(settings.url).get_backend_name() == "sqlite"
        if is_sqlite and {node.id for node in places} - {own}:
            raise RayError(
                f"the database is a SQLite file, which only one machine can use, and Ray would place slots on "
                f"{many(len(places), 'node')}: use PostgreSQL (TRIALYARD_STORAGE), or a cluster of this machine alone"
            )
        remote = Remote(ray, os.getcwd())
        survey(ray, remote, places, marker, settings)
        count = workers or sum(node.room(wanted) for node in places)
        if not count:
            raise RayError("the Ray cluster has no room for a slot now: give --workers, and it starts them when it has")
        plan = Plan(
            names=None if studies is None else tuple(study.name for study in studies),
            share=share,
            settings=for_nodes(settings),
            folder=os.getcwd(),
            marker=marker,
            gpus=wanted,
            limits=limits,
        )
        names = [f"ray:{number}" for number in range(count)]
        shown = (
            display_of(_lines(studies, address, count, wanted), studies, storage, names, share=share)
            if listeners is None
            else listeners
        )
        node, memory = own if is_sqlite else None, memory_of_slot(places, wanted)
        slots = [_Slot(number, remote.actor(plan, number, node, memory)) for number in range(count)]
        driver = _Driver(ray, slots, storage, settings, shown, plan)
        try:
            return driver.run()
        except ray.exceptions.RayError as error:
            why = error_text(error)
            raise RayError(lost_slot(why) if driver.head_answers() else lost_head(why)) from error
        finally:
            for slot in slots:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(slot.handle, no_restart=True)


def _lines(studies: Sequence[Study] | None, address: str, count: int, gpus: float) -> list[str]:
    device = "one GPU" if gpus == 1 else f"{gpus:g} of a GPU" if gpus else "one core"
    where = f"on {many(count, 'slot')} of the Ray cluster {where_of(address)}, {device} each"
    return [f"waiting for studies, {where}"] if studies is None else [f"{study.name}: {where}" for study in studies]


# --- the slots --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Slot:
    """A slot as the driver knows it."""

    number: int
    handle: Any  # Ray's, of the actor
    calls: dict[str, Any] = field(default_factory=dict)  # "run" and "events": Ray's references of what they will return
    where: str | None = None  # the last place that it reported
    end: End | None = None  # how its loop ended; None while it goes on
    is_reported: bool = False  # whether the error of its end was said
    again_at: float = float("inf")  # when a loop that failed is started again
    began: float = field(default_factory=time.monotonic)  # when its loop was started last
    has_failed: bool = False  # whether its last loop did, and nothing was trained since
    answered: float = field(default_factory=time.monotonic)
    claim: Claim | None = None  # the trial that it reported last

    @property
    def name(self) -> str:
        """The name in the display: which GPU of which node it is, Ray may change."""
        return f"ray:{self.number}"

    @property
    def is_present(self) -> bool:
        """Whether it answers, or has ended: Ray may have no room for it, or not again after its node died."""
        patience = UNPLACED_SECONDS if self.where is None else SILENT_SECONDS
        return self.end is not None or time.monotonic() - self.answered < patience

    @property
    def can_train(self) -> bool:
        """Whether its loop goes on, after a failure for longer than it takes to fail again; as far as is known."""
        if self.end is not None:
            return self.end.error is None
        return not self.has_failed or time.monotonic() - self.began > FAILING_SECONDS

    @property
    def has_left(self) -> bool:
        """Whether it has ended by its own limits, and will not begin again."""
        return self.end is not None and self.end.kind == "left"

    def call(self, name: str, *values: Any) -> None:
        """Calls a method of the actor; its result is to be looked for in `calls`."""
        method = getattr(self.handle, name)
        if name == "run":
            self.began = time.monotonic()
        # Ray repeats `run` in the process that it starts in place of one that died. Events died with their process.
        self.calls[name] = (
            method.remote(*values) if name == "run" else method.options(max_task_retries=0).remote(*values)
        )


class _Driver:
    """Watches the slots until nothing is left, or a signal comes."""

    def __init__(
        self,
        ray: Any,
        slots: Sequence[_Slot],
        storage: PatientStorage,
        settings: Settings,
        listeners: Sequence[Listener],
        plan: Plan,
    ) -> None:
        self._ray, self._slots, self._storage, self._settings = ray, slots, storage, settings
        self._listeners, self._shares, self._forever = listeners, plan.share, plan.names is None
        self._limits = plan.limits or Limits()
        self._interrupted = threading.Event()
        self._stop_by = float("inf")  # once the slots were asked to stop
        self._has_warned = False
        self._could_train = time.monotonic()  # when a slot could, last
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host, int(port))
        self._head_asked = self._head_answered = time.monotonic()
        self._head_error = ""

    def run(self) -> bool:
        """Returns False if a signal ended the work."""
        with ExitStack() as stack:
            received = stack.enter_context(stopping_signals(self._interrupted))
            for listener in self._listeners:
                stack.enter_context(listener)
            for slot in self._slots:
                slot.call("run")
                slot.call("events", EVENTS_SECONDS)
            while not self._is_over():
                self._look()
                if self._interrupted.is_set() and self._stop_by == float("inf"):
                    for number in received:
                        name = signal.Signals(number).name
                        log.warning("%s: finishing the running batches; interrupt again to exit at once", name)
                    self._stop()
                if len(received) > 1:
                    self._stop_by = float("-inf")
        if not self._interrupted.is_set():
            return True
        if any(slot.where and (slot.end is None or slot.end.kind == "cut off") for slot in self._slots):
            self._storage.shutting_down.set()
        return False

    def _stop(self) -> None:
        self._stop_by = time.monotonic() + self._settings.stop_seconds + 2 * EXIT_SECONDS
        for slot in self._slots:
            slot.call("stop")

    def _is_over(self) -> bool:
        """Whether nothing more is to be waited for. Raises the error of the slots if none of them can train."""
        present = [slot for slot in self._slots if slot.is_present]
        if self._stop_by != float("inf"):
            return time.monotonic() > self._stop_by or all(slot.end or slot.where is None for slot in present)
        failed = [slot.end.error for slot in present if slot.end and slot.end.error]
        if failed and len(failed) == len(present) and not self._forever:
            raise failed[0]
        for slot in present:
            if slot.end and slot.end.error and not slot.is_reported:
                slot.is_reported = True
                log.warning("slot %s%s: %s", slot.name, _on(slot.where), slot.end.error)
        if self._limits.minutes_are_over():
            return all(slot.end or slot.where is None for slot in present)
        if not present or any(slot.can_train for slot in present):
            self._could_train = time.monotonic()
        elif time.monotonic() - self._could_train > self._limits.idle_seconds:
            minutes = self._limits.idle_seconds / 60
            log.warning("no slot could train for the %g minutes of --idle-minutes: this command ends", minutes)
            self._stop()
            return False
        ends = {slot.end.kind for slot in present if slot.end}
        if "done" in ends and not self._shares:
            self._stop()  # the named studies have ended or are paused, so no slot has anything to do
            return False
        return bool(ends & {"done", "left"}) and all(slot.end for slot in present)

    def head_answers(self) -> bool:
        """Whether the head takes connections now."""
        try:
            socket.create_connection(self._head, timeout=EVENTS_SECONDS).close()
        except OSError as error:
            self._head_error = error.strerror or str(error)
            return False
        return True

    def _ask_head(self) -> None:
        """Raises RayError if the head has been away for long. Ray may start it again before that."""
        now = time.monotonic()
        if now - self._head_asked < EVENTS_SECONDS:
            return
        self._head_asked = now
        if self.head_answers():
            self._head_answered = time.monotonic()
        elif time.monotonic() - self._head_answered > HEAD_SECONDS:
            raise RayError(lost_head(self._head_error))

    def _look(self) -> None:
        self._ask_head()
        calls = {call: (slot, name) for slot in self._slots for name, call in slot.calls.items()}
        ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=TICK_SECONDS)
        for call in ready:
            slot, name = calls[call]
            del slot.calls[name]
            self._returned(slot, name, call)
        now = time.monotonic()
        for slot in self._slots:
            if now > slot.again_at:
                slot.end, slot.is_reported, slot.again_at = None, False, float("inf")
                slot.call("run")
        waiting = sum(not slot.is_present for slot in self._slots)
        if waiting and not self._has_warned:
            self._has_warned = True
            log.warning("%d of %d slots wait for room: `ray status` shows the cluster's", waiting, len(self._slots))

    def _returned(self, slot: _Slot, name: str, call: Any) -> None:
        try:
            value = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            value = pickle.dumps(End(kind="failed", error=RayError(error_text(error))) if name == "run" else [])
        except self._ray.exceptions.RayActorError as error:
            if name != "run":
                if not slot.has_left:  # Ray is starting its process again
                    slot.call(name, *([EVENTS_SECONDS] if name == "events" else []))
                return
            if not self.head_answers():
                raise
            value = pickle.dumps(End(kind="failed", error=RayError(lost_slot(error_text(error)))))  # the others go on
        slot.answered = time.monotonic()
        if name == "events":
            events = pickle.loads(value)
            for event in events:
                self._happened(slot, event)
            if slot.has_left and not events:  # nothing more is to come: Ray may give its place to others
                self._ray.kill(slot.handle, no_restart=True)
            else:
                slot.call("events", EVENTS_SECONDS)
        elif name == "run":
            end = pickle.loads(value)
            if isinstance(end, str):  # why its node cannot run it; nor could another slot, so it keeps its place
                end = End(kind="failed", error=RayError(end))
            elif end.error is not None:
                # While its process lives, nobody on that machine takes back a trial that it held.
                self._ray.kill(slot.handle, no_restart=False)
            slot.end, slot.has_failed = end, end.error is not None
            if slot.has_failed:
                slot.again_at = time.monotonic() + RETRY_SECONDS

    def _happened(self, slot: _Slot, event: Event) -> None:
        if event.kind == "log":
            level, text = event.values
            log.log(level, "slot %s: %s", slot.name, text)
        elif event.kind == "placed":
            host, name, device = event.values
            if slot.where is not None:
                log.warning("slot %s begins again: it was%s", slot.name, _on(slot.where))
            slot.where, slot.claim = f"{name} of {host} ({device})", None
            log.info("slot %s is%s", slot.name, _on(slot.where))
        else:
            claim, *values = event.values
            if event.kind in ("batches", "epoch"):
                slot.has_failed = False
            if event.kind == "began":
                slot.claim = claim
            if slot.claim == claim:  # else its begin was lost
                shown = replace(claim, owner=replace(claim.owner, slot=slot.name))
                for listener in self._listeners:
                    getattr(listener, event.kind)(shown, *values)


def _on(where: str | None) -> str:
    return "" if where is None else f" on {where}"
