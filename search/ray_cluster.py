"""A Ray cluster: the connection to it, what its nodes have, and our code on them."""

import importlib
import importlib.metadata
import logging
import os
import pickle
import re
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from search.devices import MEMORY_PER_SLOT
from search.errors import RayError
from search.ray_slot import Node, Plan, not_shared
from storage.artifact_store import FolderStore
from storage.errors import error_text
from storage.settings import Settings

ANSWER_SECONDS = 5.0  # for a connection to the head
CONNECT_SECONDS = 20.0  # for all that Ray does to connect
SURVEY_SECONDS = 60.0  # for the first answer of all nodes


@dataclass(frozen=True, kw_only=True)
class ClusterNode:
    """A living node of the cluster."""

    id: str
    host: str
    cpus: float
    gpus: float
    memory: float  # bytes

    def room(self, gpus: float) -> int:
        """How many slots it can hold: each takes one core, and a GPU or a share of one; without a GPU also memory."""
        if not gpus:
            return min(int(self.cpus), max(1, int(self.memory // MEMORY_PER_SLOT)))
        # Two halves of different cards are not a whole one.
        per_gpu = max(1, int(round(1 / gpus, 6)))
        return min(int(self.cpus), int(self.gpus) * per_gpu)


def installed() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RayError(
            f"--ray needs Ray, which cannot be imported ({error}): `pip install '.[ray]'` in Trialyard's folder "
            "installs it; the version must be the cluster's"
        ) from None


@contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
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


def where_of(address: str) -> str:
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
            f"the Ray cluster {where_of(address)} asks for a token: set RAY_AUTH_MODE=token, and have the cluster's "
            "token in ~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on its head prints it)"
        )
    if "ersion mismatch" in text:
        versions = re.findall(r"(Ray|Python): (\S+)", text)
        cluster, ours = (" and ".join(" ".join(version) for version in part) for part in (versions[:2], versions[2:4]))
        return f"the Ray cluster {where_of(address)} has {cluster}, and this process has {ours}: install the same here"
    return _no_answer(address, error_text(error))


def lost_head(why: str) -> str:
    return (
        f"the head of the Ray cluster is lost ({why}): start Ray again, and run the same command to continue; the "
        "next worker takes its trials back"
    )


def lost_slot(why: str) -> str:
    return f"Ray cannot run this slot ({why}): `ray status` and the log files of Ray on its node show more"


def living_nodes(ray: Any) -> list[ClusterNode]:
    return [
        ClusterNode(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory=node["Resources"].get("memory", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def gpus_of_slot(ray: Any, nodes: Sequence[ClusterNode], wanted: float | None) -> float:
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


def memory_of_slot(nodes: Sequence[ClusterNode], gpus: float) -> int:
    """The bytes of memory that each slot asks Ray for: a trainer on a GPU needs little of the machine's.

    0 where a node has less than that: it trains one trial, as a worker on such a machine does.
    """
    least = min((node.memory for node in nodes), default=0.0)
    return MEMORY_PER_SLOT if not gpus and least >= MEMORY_PER_SLOT else 0


def survey(ray: Any, remote: "Remote", nodes: Sequence[ClusterNode], marker: str | None, settings: Settings) -> None:
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
            found = error_text(error)
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
def shared_marker(settings: Settings) -> Iterator[str | None]:
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


def for_nodes(settings: Settings) -> dict[str, Any]:
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


class Remote:
    """Starts our code on the nodes.

    What Ray sends there by name it imports with the driver's folder first on the path, where a user's own search.py
    would hide ours. So it gets functions without names, which import ours first, and data as bytes.
    """

    def __init__(self, ray: Any, folder: str) -> None:
        self._ray = ray

        own = importlib.metadata.version("trialyard")

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

        def problem() -> str | None:
            import importlib.metadata

            try:
                found = importlib.metadata.version("trialyard")
                slot_module()
            except ImportError as error:
                return f"cannot run Trialyard ({error}): install it there, for the Python that Ray runs in"
            return (
                None if found == own else f"has Trialyard {found}, and the command has {own}: install the same version"
            )

        class TrialyardSlot:
            # Ours is imported in `run`: an error here would be taken for Ray's, and the node may be a later one.
            def __init__(self, plan: bytes, number: int) -> None:
                import ray

                self.given = plan, number, [str(gpu) for gpu in ray.get_gpu_ids()]
                self.slot: Any = None
                self.is_stopped = False

            def run(self) -> bytes:
                import pickle
                import socket

                if (reason := problem()) is not None:
                    return pickle.dumps(f"the node {socket.gethostname()} {reason}")
                if self.slot is None:
                    plan, number, gpu_ids = self.given
                    self.slot = slot_module().RaySlot(pickle.loads(plan), number, gpu_ids)
                if self.is_stopped:
                    self.slot.stop()
                return pickle.dumps(self.slot.run())

            def events(self, seconds: float) -> bytes:
                import pickle
                import time

                if self.slot is None:
                    time.sleep(seconds)
                return pickle.dumps([] if self.slot is None else self.slot.events(seconds))

            def stop(self) -> None:
                self.is_stopped = True  # first: `run` makes the slot, and looks then
                if self.slot is not None:
                    self.slot.stop()

        self._look = ray.remote(num_cpus=0)(look)
        self._actor = ray.remote(TrialyardSlot)

    def look(self, node: str, marker: str | None) -> Any:
        """Asks a node what it is: the call's result is a `Node`, or why it is not one, as bytes."""
        return self._look.options(scheduling_strategy=self._only_on(node), max_retries=0).remote(marker)

    def actor(self, plan: Plan, number: int, node: str | None, memory: float) -> Any:
        """Asks Ray for a slot with so many bytes of memory, on that node if one is given.

        Ray starts it again whenever its process or node dies.
        """
        return self._actor.options(
            name=f"trialyard ray:{number} {uuid.uuid4().hex[:8]}",  # a name may be given once in a namespace
            num_cpus=1,
            num_gpus=plan.gpus,
            memory=memory,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4,  # run, events, stop
            scheduling_strategy="DEFAULT" if node is None else self._only_on(node),
        ).remote(pickle.dumps(plan), number)

    def _only_on(self, node: str) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)
