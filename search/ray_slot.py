"""One slot that Ray has placed on some node: the worker's own loop, in the process of a Ray actor.

`search.ray_engine` starts the actors and watches them. Ray itself is not imported here.
"""

import copy
import logging
import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from search import devices, open_studies, worker
from search.devices import Slot
from search.errors import DeviceError, MachineError
from search.limits import Limits
from search.messages import Batches, Epoch
from search.progress import Listener
from storage import database, ledger
from storage import settings as settings_of_node
from storage.claims import Claim
from storage.errors import TrialyardError
from storage.settings import Settings

KEPT_EVENTS = 10_000  # that wait for the driver; the oldest are dropped, which only the display notices


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the driver tells each of its slots."""

    names: tuple[str, ...] | None  # as for `worker.work`
    share: bool
    settings: dict[str, Any]  # the fields of the driver's `Settings`, with absolute paths and the database's URL
    folder: str  # the driver's current folder
    # A file in the artifacts folder: a node that does not see it has another folder. None with an object store.
    marker: str | None
    gpus: float  # of this slot: 0, a share of one GPU, or 1
    limits: Limits | None = None

    @property
    def sharing(self) -> int:
        """How many slots may share one GPU."""
        return max(1, int(round(1 / self.gpus, 6))) if self.gpus else 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a slot: a call of its listener, or a line of its log."""

    kind: Literal["placed", "log", "began", "batches", "epoch", "ended", "deleted"]
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class End:
    """How a slot's loop ended."""

    # left: by its own limits, whether or not there is more to do; cut off: its trial is not back in the queue yet
    kind: Literal["done", "left", "stopped", "cut off", "failed"]
    error: TrialyardError | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node says of itself before anything starts."""

    host: str
    version: str  # of Trialyard
    sees_artifacts: bool


def this_node(marker: str | None) -> Node:
    """This process's node. `marker` is a file that the driver wrote into the artifacts folder; None for a store."""
    from importlib.metadata import version

    return Node(
        host=socket.gethostname(),
        version=version("trialyard"),
        # False as well if this user may not look into the folder.
        sees_artifacts=marker is None or os.path.exists(marker),
    )


def not_shared(host: str, folder: Path) -> str:
    """What to say of a node that has another artifacts folder than the driver."""
    return (
        f"the node {host} does not see the files in {folder}: let TRIALYARD_ARTIFACTS name a folder on a disk that all "
        "nodes share"
    )


class RaySlot:
    """One slot. Ray calls `run` in one thread and the other methods in others."""

    def __init__(self, plan: Plan, number: int, gpu_ids: list[str]) -> None:
        self._plan, self._number, self._gpu_ids = plan, number, gpu_ids
        self._stop = threading.Event()
        self._relay = _Relay()

    def stop(self) -> None:
        """Has the running trial write a checkpoint and go back to the queue; `run` returns then."""
        self._stop.set()

    def events(self, seconds: float) -> list[Event]:
        """What has happened since the last call; waits so many seconds for something to happen."""
        return self._relay.take(seconds)

    def run(self) -> End:
        """Runs trials until nothing is left or `stop` is called. A process that Ray started again begins here, too."""
        _log_to(self._relay)
        try:
            return self._run()
        except TrialyardError as error:
            return End(kind="failed", error=error)

    def _run(self) -> End:
        plan = self._plan
        _set_variables(plan.settings)
        if os.path.isdir(plan.folder):
            os.chdir(plan.folder)  # a study's files may be relative to it
        if not this_node(plan.marker).sees_artifacts:  # a node that came later
            raise MachineError(not_shared(socket.gethostname(), plan.settings["artifacts"]))
        slot = _slot(plan, self._number, self._gpu_ids)
        self._relay.add("placed", socket.gethostname(), slot.name, slot.device.name)
        # A node may have the data in folders of its own.
        settings = Settings(**plan.settings | {"data": (*plan.settings["data"], *settings_of_node.load().data)})
        opened = database.connect_with_retries(settings.url, settings.patience_seconds)
        # The driver's own check says nothing of this node: it may lack the package, the credentials or the way there.
        settings.artifact_store.check(settings.patience_seconds)
        if not plan.share:
            for study in ledger.studies(opened):
                if study.name in (plan.names or ()) and not study.has_ended:
                    open_studies.check_fit(study, opened, settings)
        is_done = worker.work(
            plan.names,
            opened,
            settings,
            [slot],
            [self._relay],
            share=plan.share,
            stop=self._stop,
            limits=copy.copy(plan.limits),  # idle from now on: this may be the slot's second loop
        )
        if is_done:
            return End(kind="done" if plan.limits is None else "left")
        return End(kind="cut off" if opened.shutting_down.is_set() else "stopped")


def _set_variables(settings: dict[str, Any]) -> None:
    """Gives the trainer of this slot the settings that it reads itself, in place of those that Ray was started with."""
    values = {"HOME": settings["home"], "ARTIFACTS": settings["artifacts"]}
    os.environ |= {f"TRIALYARD_{name}": str(value) for name, value in values.items()}
    os.environ["TRIALYARD_NETWORK_SQLITE"] = "1" if settings["network_sqlite"] else "0"


def _slot(plan: Plan, number: int, gpu_ids: list[str]) -> Slot:
    """The slot on the device that Ray has chosen: its index is unique among all slots of the command."""
    if not plan.gpus:
        return Slot(device=devices.cpu(), index=number, threads=1)
    visible = ",".join(gpu_ids)
    # Ray has set it already, unless the node was started with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES.
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    found = devices.gpus()
    if len(found) != 1:
        raise DeviceError(
            f"Ray gives this slot the GPU {visible}, and the driver of {socket.gethostname()} has "
            f"{len(found) or 'no'} devices of that name: start Ray there with the number of its GPUs, or with "
            "CUDA_VISIBLE_DEVICES if they are divided"
        )
    return Slot(device=found[0], index=number, sharing=plan.sharing)


class _Relay(Listener):
    """Keeps what happens until the driver asks for it."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._changed = threading.Condition()  # the slot's thread writes, the driver's call reads

    def add(self, kind: Any, *values: Any) -> None:
        """Keeps one event. Of the batches of an epoch only the last are kept."""
        with self._changed:
            if kind == "batches" and self._events and self._events[-1].kind == kind:
                self._events.pop()
            self._events.append(Event(kind=kind, values=values))
            self._changed.notify()

    def take(self, seconds: float) -> list[Event]:
        """All events, after at most so many seconds."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._events and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            events = list(self._events)
            self._events.clear()
        return events

    def began(self, claim: Claim, point: dict[str, Any], epochs: int) -> None:
        """Keeps it for the driver."""
        self.add("began", claim, point, epochs)

    def batches(self, claim: Claim, batches: Batches) -> None:
        """Keeps it for the driver."""
        self.add("batches", claim, batches)

    def epoch(self, claim: Claim, record: Epoch) -> None:
        """Keeps it for the driver."""
        self.add("epoch", claim, record)

    def ended(self, claim: Claim, trial: FrozenTrial) -> None:
        """Keeps it for the driver."""
        self.add("ended", claim, trial)

    def deleted(self, claim: Claim) -> None:
        """Keeps it for the driver."""
        self.add("deleted", claim)


class _Handler(logging.Handler):
    """Gives lines of the log to the driver: what an actor prints is only in Ray's own log files."""

    def __init__(self, relay: _Relay) -> None:
        super().__init__(logging.WARNING)
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the line for the driver."""
        self._relay.add("log", record.levelno, record.getMessage())


def _log_to(relay: _Relay) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    root = logging.getLogger()
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        root.addHandler(_Handler(relay))
