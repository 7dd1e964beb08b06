"""Workers on a Ray cluster: starts one actor a slot, shows what they do, and stops them.

Ray chooses the nodes and GPUs, and starts an actor again whose process or node has died. Who owns a trial is decided in
the database, as for every worker, so nothing is lost when Ray loses an actor, a node or its head.
"""

import contextlib
import importlib
import logging
import os
import pickle
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy

from search.errors import RayError
from search.progress import Listener, display_of
from search.ray_slot import End, Event, Node, Plan, not_shared
from search.worker import LEAVE_SECONDS, LEFT_SECONDS, stopping_signals
from storage.artifact_store import FolderStore
from storage.claims import Claim
from storage.errors import many
from storage.ledger import Study
from storage.settings import Settings
from storage.transactions import PatientStorage

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # for a connection to the head
CONNECT_SECONDS = 20.0  # for all that Ray does to connect
SURVEY_SECONDS = 60.0  # for the first answer of all nodes
HEAD_SECONDS = 40.0  # that the head may be away; after 60 Ray ends this process without a word of ours
TICK_SECONDS = 0.2
EVENTS_SECONDS = 2.0  # how long a slot waits for something to happen before it says that nothing did
# Since the last answer of a slot that is taken for one that Ray cannot place at the moment, or not again.
UNPLACED_SECONDS = 30.0
SILENT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A living node of the cluster."""

    id: str
    host: str
    cpus: float
    gpus: float

    def room(self, gpus: float) -> int:
        """How many slots it can hold: each takes one core, and a GPU or a share of one."""
        if not gpus:
            return int(self.cpus)
        # Two halves of different cards are not a whole one.
        per_gpu = max(1, int(round(1 / gpus, 6)))
        return min(int(self.cpus), int(self.gpus) * per_gpu)


def work(
    studies: Sequence[Study] | None,
    storage: PatientStorage,
    settings: Settings,
    listeners: Sequence[Listener] | None,
    *,
    address: str,
    workers: int | None,
    gpus: float | None,
    leave: bool,
) -> bool:
    """Runs trials of `studies` on the Ray cluster at `address`, as `search.worker.work` does on this machine.

    `address` is "auto" for the cluster of this machine, or the head's as in "10.0.0.1:6379". There are `workers` slots,
    by default as many as the cluster has room for. Each has one core and `gpus` of one GPU: 1, a share such as 0.5, or
    0 to train on the processor; None is 1 where a node has a GPU, else 0.

    Returns False if a signal ended the work; `storage.shutting_down` is set if not all trials are back in the queue.
    Raises RayError before anything starts if the cluster does not answer, has another version, or cannot run these
    slots; and the error of the slots if none of them can train.
    """
    if gpus is not None and not 0 <= gpus <= 1:
        raise RayError(
            f"--gpus {gpus:g}: a trial trains on one GPU or a share of one: give at most 1, such as 0.5 for two slots "
            "on each GPU"
        )
    ray = _installed()
    with _connected(ray, address), _marker(settings) as marker:
        nodes = _nodes(ray)
        wanted = _gpus(ray, nodes, gpus)
        places = [node for node in nodes if node.room(wanted)]
        own = ray.get_runtime_context().get_node_id()
        is_sqlite = sqlalchemy.make_url(settings.url).get_backend_name() == "sqlite"
        if is_sqlite and {node.id for node in places} - {own}:
            raise RayError(
                f"the database is a SQLite file, which only one machine can use, and Ray would place slots on "
                f"{many(len(places), 'node')}: use PostgreSQL (TRIALYARD_STORAGE), or a cluster of this machine alone"
            )
        remote = _Remote(ray, os.getcwd())
        _survey(ray, remote, places, marker, settings)
        count = workers or sum(node.room(wanted) for node in places)
        if not count:
            raise RayError("the Ray cluster has no room for a slot now: give --workers, and it starts them when it has")
        plan = Plan(
            names=None if studies is None else tuple(study.name for study in studies),
            leave=leave,
            settings=_for_nodes(settings),
            folder=os.getcwd(),
            marker=marker,
            gpus=wanted,
        )
        names = [f"ray:{number}" for number in range(count)]
        shown = (
            display_of(_lines(studies, address, count, wanted), studies, storage, names)
            if listeners is None
            else listeners
        )
        slots = [_Slot(number, remote.actor(plan, number, own if is_sqlite else None)) for number in range(count)]
        try:
            return _Driver(ray, slots, storage, settings, shown, leave=leave, forever=studies is None).run()
        except ray.exceptions.RayError as error:
            raise RayError(_lost(_in_one_line(error))) from error
        finally:
            for slot in slots:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(slot.handle, no_restart=True)


def _lines(studies: Sequence[Study] | None, address: str, count: int, gpus: float) -> list[str]:
    device = "one GPU" if gpus == 1 else f"{gpus:g} of a GPU" if gpus else "one core"
    where = f"on {many(count, 'slot')} of the Ray cluster {_where(address)}, {device} each"
    return [f"waiting for studies, {where}"] if studies is None else [f"{study.name}: {where}" for study in studies]


# --- the cluster ------------------------------------------------------------------------------------------


def _installed() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RayError(
            f"--ray needs Ray, which cannot be imported ({error}): `pip install '.[ray]'` in Trialyard's folder "
            "installs it; the version must be the cluster's"
        ) from None


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connects to the cluster, unless this process is connected already, and leaves it at the end. Raises RayError."""
    if ray.is_initialized():
        yield
        return
    explicit = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if explicit != "auto":
        _require_answer(explicit)
    logging.getLogger("ray").setLevel(logging.ERROR)
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            _greet(address, explicit)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except BaseException as error:  # noqa: BLE001 - explained in the other thread
            errors.append(error)

    # In a thread: Ray waits for minutes for some addresses, and would take over SIGTERM in the main thread.
    thread = threading.Thread(target=connect, name="ray", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if thread.is_alive():
        raise RayError(_no_answer(address, f"nothing within {CONNECT_SECONDS:.0f} s"))
    if errors:
        raise RayError(_explanation(address, errors[0])) from errors[0]
    try:
        yield
    finally:
        ray.shutdown()


def _greet(address: str, explicit: str) -> None:
    """Asks the head for its cluster's id, and raises an error at once if it wants a token: `ray.init` asks for ever.

    These functions are not public; `ray.init` calls them, too.
    """
    head = importlib.import_module("ray._private.services").canonicalize_bootstrap_address(explicit, None)
    if address == "auto":
        # For this machine's own cluster Ray takes the user's token by itself, if there is one.
        setup = importlib.import_module("ray._private.authentication.authentication_token_setup")
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    importlib.import_module("ray._raylet").GcsClient(address=head)


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise RayError(
            f"--ray {address}: expected auto, or the address of the cluster's head such as 10.0.0.1:6379, given on one "
            "of its nodes"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RayError(_no_answer(address, getattr(error, "strerror", None) or str(error))) from None


def _where(address: str) -> str:
    return "of this machine" if address == "auto" else f"at {address}"


def _no_answer(address: str, why: str) -> str:
    where = "on this machine" if address == "auto" else f"at {address}"
    return (
        f"no Ray cluster answers {where} ({why}): `ray start --head` starts one, and `ray status` shows whether it runs"
    )


def _explanation(address: str, error: BaseException) -> str:
    """Why Ray could not connect, in one sentence."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = " ".join(str(each) for each in chain)
    if any(type(each).__name__ == "AuthenticationError" for each in chain) or "nauthenticated" in text:
        return (
            f"the Ray cluster {_where(address)} asks for a token: set RAY_AUTH_MODE=token, and have the cluster's "
            "token in ~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on its head prints it)"
        )
    if "ersion mismatch" in text:
        versions = re.findall(r"(Ray|Python): (\S+)", text)
        cluster, ours = (" and ".join(" ".join(version) for version in part) for part in (versions[:2], versions[2:4]))
        return f"the Ray cluster {_where(address)} has {cluster}, and this process has {ours}: install the same here"
    return _no_answer(address, _in_one_line(error))


def _lost(why: str) -> str:
    return (
        f"the head of the Ray cluster is lost ({why}): start Ray again; its trials are taken back by the next worker, "
        "and the same command goes on where it stopped"
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _nodes(ray: Any) -> list[_Node]:
    return [
        _Node(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _gpus(ray: Any, nodes: Sequence[_Node], wanted: float | None) -> float:
    """How much of a GPU each slot gets. Raises RayError if no node has so much."""
    most = max((node.gpus for node in nodes), default=0.0)
    if wanted is None:
        return 1.0 if most >= 1 else 0.0
    # Nodes that an autoscaler may start; Ray has no public function that says it.
    to_come = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    if wanted > max(most, to_come.get("GPU", 0.0)):
        most_text = f"no node has more than {most:g}" if most else "no node has one"
        raise RayError(
            f"--gpus {wanted:g}: each slot needs that much of a GPU, and {most_text}: `ray start --num-gpus N` says "
            "how many a node has, and --gpus 0 trains on the processor"
        )
    return wanted


def _survey(ray: Any, remote: "_Remote", nodes: Sequence[_Node], marker: str | None, settings: Settings) -> None:
    """Raises RayError unless all `nodes` have this version of Trialyard, and the same artifacts folder."""
    from importlib.metadata import version

    own = version("trialyard")
    asked = {remote.look(node.id, marker): node for node in nodes}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=SURVEY_SECONDS) if asked else ([], [])
    for call in late:
        raise RayError(f"the node {asked[call].host} does not answer within {SURVEY_SECONDS:.0f} s: see `ray status`")
    for call in ready:
        host = asked[call].host
        try:
            found: Node | str = pickle.loads(ray.get(call))
        except ray.exceptions.RayError as error:
            found = _in_one_line(error)
        if isinstance(found, str):
            raise RayError(
                f"the node {host} cannot run Trialyard ({found}): install it there, for the Python that Ray runs in"
            )
        if found.version != own:
            raise RayError(
                f"the node {host} has Trialyard {found.version}, and this machine has {own}: install the same version"
            )
        if not found.sees_artifacts:
            raise RayError(not_shared(host, settings.artifact_folder))


@contextmanager
def _marker(settings: Settings) -> Iterator[str | None]:
    """A file in the artifacts folder, by which other machines see whether theirs is the same. None for a store."""
    if not isinstance(settings.artifact_store, FolderStore):
        yield None
        return
    try:
        settings.artifact_folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=settings.artifact_folder, prefix=".ray-")  # noqa: SIM115 - see below
    except OSError as error:
        raise RayError(
            f"the artifacts folder {settings.artifact_folder} cannot be written ({error.strerror}): let "
            "TRIALYARD_ARTIFACTS name a folder on a disk that all nodes share"
        ) from None
    with file:
        yield file.name


def _for_nodes(settings: Settings) -> dict[str, Any]:
    """The settings for other machines: absolute paths, and the URL in place of the files that it was read from."""
    without = ("storage_file", "storage_password_file", "dashboard_password", "dashboard_password_file")
    return (
        settings.model_dump()
        | dict.fromkeys(without)
        | {
            "home": settings.home.absolute(),
            "artifacts": settings.artifacts if isinstance(settings.artifacts, str) else settings.artifact_folder,
            "data": tuple(folder.absolute() for folder in settings.data),
            "storage": settings.url,
        }
    )


class _Remote:
    """Starts our code on the nodes.

    What Ray sends there by name it imports with the driver's folder first on the path, where a user's own search.py
    would hide ours. So it gets functions without names, which import ours first, and data as bytes.
    """

    def __init__(self, ray: Any, folder: str) -> None:
        self._ray = ray

        def slot_module() -> Any:
            import importlib
            import sys

            if folder in sys.path:
                sys.path.remove(folder)
                sys.path.append(folder)
            return importlib.import_module("search.ray_slot")

        def look(marker: str | None) -> bytes:
            import pickle

            try:
                return pickle.dumps(slot_module().this_node(marker))
            except ImportError as error:
                return pickle.dumps(str(error))

        class TrialyardSlot:
            def __init__(self, plan: bytes, number: int) -> None:
                import pickle

                import ray

                module = slot_module()
                gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
                self.slot = module.RaySlot(pickle.loads(plan), number, gpu_ids)

            def run(self) -> bytes:
                import pickle

                return pickle.dumps(self.slot.run())

            def events(self, seconds: float) -> bytes:
                import pickle

                return pickle.dumps(self.slot.events(seconds))

            def stop(self) -> None:
                self.slot.stop()

        self._look = ray.remote(num_cpus=0)(look)
        self._actor = ray.remote(TrialyardSlot)

    def look(self, node: str, marker: str | None) -> Any:
        """Asks a node what it is: the call's result is a `Node`, or why it is not one, as bytes."""
        return self._look.options(scheduling_strategy=self._only_on(node), max_retries=0).remote(marker)

    def actor(self, plan: Plan, number: int, node: str | None) -> Any:
        """Asks Ray for a slot, on that node if one is given; Ray starts it again whenever its process or node dies."""
        return self._actor.options(
            name=f"trialyard ray:{number}",
            num_cpus=1,
            num_gpus=plan.gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4,  # run, events, stop
            scheduling_strategy="DEFAULT" if node is None else self._only_on(node),
        ).remote(pickle.dumps(plan), number)

    def _only_on(self, node: str) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)


# --- the slots --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Slot:
    """A slot as the driver knows it."""

    number: int
    handle: Any  # Ray's, of the actor
    calls: dict[str, Any] = field(default_factory=dict)  # "run" and "events": Ray's references of what they will return
    where: str | None = None  # the last place that it told
    end: End | None = None  # how its loop ended; None while it goes on
    is_reported: bool = False  # whether the error of its end was said
    again_at: float = float("inf")  # when a loop that failed is started again
    answered: float = field(default_factory=time.monotonic)
    claim: Claim | None = None  # the trial that it told last

    @property
    def name(self) -> str:
        """The name in the display: which GPU of which node it is, Ray may change."""
        return f"ray:{self.number}"

    @property
    def is_present(self) -> bool:
        """Whether it answers, or has ended: Ray may have no room for it, or not again after its node died."""
        patience = UNPLACED_SECONDS if self.where is None else SILENT_SECONDS
        return self.end is not None or time.monotonic() - self.answered < patience

    def call(self, name: str, *values: Any) -> None:
        """Calls a method of the actor; its result is to be looked for in `calls`."""
        method = getattr(self.handle, name)
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
        *,
        leave: bool,
        forever: bool,
    ) -> None:
        self._ray, self._slots, self._storage, self._settings = ray, slots, storage, settings
        self._listeners, self._leave, self._forever = listeners, leave, forever
        self._interrupted = threading.Event()
        self._stop_by = float("inf")  # once the slots were told to stop
        self._has_warned = False
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host, int(port))
        self._head_asked = self._head_answered = time.monotonic()

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
                        log.warning("%s: ending the running batches; once more to leave at once", name)
                    self._stop()
        if not self._interrupted.is_set():
            return True
        if any(slot.where and (slot.end is None or slot.end.kind == "cut off") for slot in self._slots):
            self._storage.shutting_down.set()
        return False

    def _stop(self) -> None:
        self._stop_by = time.monotonic() + self._settings.stop_seconds + 2 * LEAVE_SECONDS
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
        is_done = [slot.end is not None and slot.end.kind == "done" for slot in present]
        if any(is_done) and not self._leave:
            self._stop()  # the named studies have ended or are paused, so no slot has anything to do
            return False
        return any(is_done) and all(slot.end for slot in present)

    def _ask_head(self) -> None:
        """Raises RayError if the head has been away for long. Ray may start it again before that."""
        now = time.monotonic()
        if now - self._head_asked < EVENTS_SECONDS:
            return
        self._head_asked = now
        try:
            socket.create_connection(self._head, timeout=EVENTS_SECONDS).close()
            self._head_answered = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._head_answered > HEAD_SECONDS:
                raise RayError(_lost(error.strerror or str(error))) from None

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
            value = pickle.dumps(End(kind="failed", error=RayError(_in_one_line(error))) if name == "run" else [])
        except self._ray.exceptions.RayActorError:
            if name == "run":
                raise
            slot.call(name, *([EVENTS_SECONDS] if name == "events" else []))  # Ray is starting its process again
            return
        slot.answered = time.monotonic()
        if name == "events":
            for event in pickle.loads(value):
                self._happened(slot, event)
            slot.call("events", EVENTS_SECONDS)
        elif name == "run":
            slot.end = pickle.loads(value)
            if slot.end is not None and slot.end.error is not None:
                slot.again_at = time.monotonic() + LEFT_SECONDS

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
            if event.kind == "began":
                slot.claim = claim
            if slot.claim == claim:  # else its begin was lost
                shown = replace(claim, owner=replace(claim.owner, slot=slot.name))
                for listener in self._listeners:
                    getattr(listener, event.kind)(shown, *values)


def _on(where: str | None) -> str:
    return "" if where is None else f" on {where}"
