"""The slots of a Ray cluster and the command that watches them, without Ray.

A slot's own loop is the real one. Where the command is tested, actors are pretended: each answers at once, and a look
of the command at all of them takes a second of a clock.
"""

import logging
import os
import pickle
import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import SMALL, Clock
from containers import free_port
from optuna.trial import TrialState

from search import data, interruption, ray_engine
from search.devices import MEMORY_PER_SLOT
from search.errors import DeviceError
from search.limits import Limits
from search.open_studies import RETRY_SECONDS
from search.ray_cluster import ClusterNode, Remote, for_nodes, living_nodes, memory_of_slot
from search.ray_engine import _Driver, _Slot
from search.ray_slot import End, Event, Plan, RaySlot
from storage import database
from storage import settings as settings_module
from storage.errors import ObjectStoreError, TrialyardError
from storage.settings import Settings
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import parse
from trialyard import functions

GIB = 1 << 30


@pytest.fixture
def plan(home: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A slot on the processor that has no study to work on, so that its loop ends at once."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers])  # the slot adds one
    for name in ("HOME", "ARTIFACTS", "NETWORK_SQLITE"):  # the slot sets them
        monkeypatch.setenv(f"TRIALYARD_{name}", "")
    settings = Settings(home=home, storage=sqlite_url, artifacts="s3://bucket/trialyard", patience_seconds=0)
    return Plan(names=(), share=False, settings=for_nodes(settings), folder=os.getcwd(), marker=None, gpus=0)


def _error(plan: Plan) -> TrialyardError:
    end = RaySlot(plan, 0, []).run()
    assert end.kind == "failed"
    assert end.error is not None
    return end.error


# --- a slot -----------------------------------------------------------------------------------------------


def test_a_slot_whose_node_cannot_use_the_object_store_takes_no_trial(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may be able to: a node has an environment and packages of its own."""
    for name, value in {"ACCESS_KEY_ID": "a-user", "SECRET_ACCESS_KEY": "the-secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    error = _error(plan)
    assert isinstance(error, ObjectStoreError)
    assert str(error).startswith("s3://bucket/trialyard cannot be reached")


@pytest.mark.parametrize(
    "given",
    [
        {"artifacts": "s3://bucket/trialyard"},
        {"artifacts": "shared", "network_sqlite": True},
        {"home": "of the command"},
    ],
    ids=["an object store", "a folder", "a home"],
)
def test_the_trainer_of_a_slot_has_the_settings_of_the_command(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """It has the environment of its slot, which sets them in place of those that Ray was started with."""
    settings = Settings(**given)
    own = {"HOME": "/of/the/node", "ARTIFACTS": "/of/the/node", "NETWORK_SQLITE": str(not settings.network_sqlite)}
    for name, value in own.items():
        monkeypatch.setenv(f"TRIALYARD_{name}", value)
    _error(replace(plan, settings=for_nodes(settings), marker="/nowhere"))
    monkeypatch.chdir("/")
    found = settings_module.load()
    assert found.home == tmp_path / settings.home
    assert found.network_sqlite == settings.network_sqlite
    assert found.artifacts == (settings.artifacts if "s3" in str(settings.artifacts) else settings.artifact_folder)


@pytest.mark.long
@pytest.mark.usefixtures("new_trainers")
def test_a_function_of_a_notebook_trains_where_only_the_command_has_its_artifacts_folder(
    plan: Plan, home: Path, sqlite_url: str, write_npz: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(hyperparameters: dict[str, float], image_shape: tuple[int, ...], classes: int) -> Any:
        import keras

        dropout, head = keras.layers.Dropout(hyperparameters["dropout"]), keras.layers.Dense(classes, "softmax")
        return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten(), dropout, head])

    write_npz()
    with monkeypatch.context() as of_the_command:
        of_the_command.setenv("TRIALYARD_ARTIFACTS", str(home / "shared"))
        of_the_command.setattr(functions, "__path__", [*functions.__path__])
        stored = functions.of(build)
        assert isinstance(stored, functions.StoredFunction)
        stored.write()
        settings = settings_module.load(storage=sqlite_url)
    text = SMALL.format(trials=1, epochs=1).replace("mnist_cnn", stored.name).replace("width = 0.1\n", "")
    definition = parse(text)
    storage = database.connect(sqlite_url)
    loaded = data.load(definition.dataset, definition.data, settings.data_folders)
    registry.create(definition, storage, loaded.summary())

    end = RaySlot(replace(plan, names=("small",), settings=for_nodes(settings)), 0, []).run()
    assert end == End(kind="done")
    (trial,) = registry.open("small", storage).trials
    assert trial.state == TrialState.COMPLETE
    storage.engine.dispose()


# --- the cluster ------------------------------------------------------------------------------------------


def _node(cpus: float = 8.0, gpus: float = 0.0, memory: float = 64 * GIB) -> ClusterNode:
    return ClusterNode(id="a", host="n1", cpus=cpus, gpus=gpus, memory=memory)


@pytest.mark.parametrize(
    ("node", "gpus", "slots"),
    [
        (_node(), 0, 8),
        (_node(memory=5 * GIB), 0, 2),
        (_node(memory=1 * GIB), 0, 1),
        (_node(memory=0.0), 0, 1),
        (_node(cpus=0.0), 0, 0),
        (_node(gpus=2.0, memory=1 * GIB), 1, 2),
        (_node(gpus=2.0, memory=1 * GIB), 0.5, 4),
    ],
)
def test_a_node_has_room_for_as_many_slots_as_its_cores_gpus_and_memory_allow(
    node: ClusterNode, gpus: float, slots: int
) -> None:
    assert node.room(gpus) == slots


@pytest.mark.parametrize(
    ("memory", "gpus", "asked"),
    [
        ((64 * GIB, 8 * GIB), 0, MEMORY_PER_SLOT),
        ((64 * GIB, 1 * GIB), 0, 0),  # it would never get the one slot that it has room for
        ((64 * GIB,), 0.5, 0),
        ((), 0, 0),
    ],
)
def test_a_slot_asks_for_memory_that_every_node_has(memory: tuple[float, ...], gpus: float, asked: int) -> None:
    assert memory_of_slot([_node(memory=each) for each in memory], gpus) == asked


def test_the_memory_of_a_node_is_what_ray_says_of_it() -> None:
    alive = {"NodeID": "a", "NodeManagerHostname": "n1", "Alive": True}
    nodes = [alive | {"Resources": {"CPU": 2.0, "memory": 5.0 * GIB}}, alive | {"Resources": {"CPU": 2.0}}]
    pretended = SimpleNamespace(nodes=lambda: [*nodes, nodes[0] | {"Alive": False}])
    assert [node.memory for node in living_nodes(pretended)] == [5.0 * GIB, 0.0]


class Asked:
    """Ray, as far as actors are asked of it; keeps the options."""

    def __init__(self) -> None:
        self.options_of: list[dict[str, Any]] = []

    def remote(self, *given: Any, **_: Any) -> Any:
        return self if given else lambda _: self

    def options(self, **options: Any) -> Any:
        self.options_of.append(options)
        return self


def test_an_actor_asks_for_memory_under_a_name_of_its_own(plan: Plan) -> None:
    """A second command in the same namespace, as from a notebook, may come before the first one's actors are gone."""
    pretended: Any = Asked()
    for _ in range(2):
        Remote(pretended, "/").actor(plan, 0, None, MEMORY_PER_SLOT)
    first, second = pretended.options_of
    assert first["memory"] == second["memory"] == MEMORY_PER_SLOT
    assert first["name"] != second["name"]


# --- the command ------------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """One run of a slot's loop."""

    seconds: float
    end: End | str  # as an actor's `run` returns it
    trains: bool = False


@dataclass(eq=False)
class Answer:
    """What a call of an actor will return, and when."""

    at: float
    value: Callable[[], Any]


@dataclass(frozen=True)
class Method:
    """An actor's method, as Ray has it called."""

    call: Callable[[], Answer]

    def options(self, **_: Any) -> "Method":
        return self

    def remote(self, *_: Any) -> Answer:
        return self.call()


class Actor:
    """A slot that Ray has placed. It runs one loop after another, the last one again and again, and obeys no stop."""

    def __init__(self, clock: Clock, loops: Sequence[Loop]) -> None:
        self._clock, self._loops, self._events = clock, [*loops], list[Event]()
        self.run, self.events = Method(self._start), Method(lambda: Answer(clock.now, self._take))
        self.stop = Method(lambda: Answer(clock.now, lambda: None))

    def _start(self) -> Answer:
        loop = self._loops.pop(0) if len(self._loops) > 1 else self._loops[0]
        if isinstance(loop.end, End):
            self._events.append(Event(kind="placed", values=("n1", "cpu:0", "a processor")))
        if loop.trains:
            self._events.append(Event(kind="epoch", values=("a claim", None)))
        return Answer(self._clock.now + loop.seconds, lambda: pickle.dumps(loop.end))

    def _take(self) -> bytes:
        events, self._events = self._events, []
        return pickle.dumps(events)


class Never(Exception):  # noqa: N818 - it stands for any
    """An error of Ray's that does not come."""


class Ray:
    """As much of Ray as the command uses once the actors are there. SIGINT comes at the times `interrupts`."""

    exceptions = SimpleNamespace(RayTaskError=Never, RayActorError=Never)

    def __init__(self, clock: Clock, interrupts: Collection[float]) -> None:
        self._clock, self._interrupts = clock, interrupts

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="127.0.0.1:6379")

    def wait(self, calls: Sequence[Answer], **_: Any) -> tuple[list[Answer], list[Answer]]:
        self._clock.now += 1.0
        assert self._clock.now < 20_000.0, "the command does not end"
        if self._clock.now in self._interrupts:
            signal.raise_signal(signal.SIGINT)
        return [call for call in calls if call.at <= self._clock.now], []

    def get(self, call: Answer) -> Any:
        return call.value()

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        """Its next loop begins in another process, which makes no difference here."""


Watch = Callable[..., tuple[bool, float]]


@pytest.fixture
def watch(plan: Plan, storage: PatientStorage, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Runs a command with `--forever` over slots with these loops to its end.

    Returns what it returns, and how many seconds it took by its clock.
    """
    clock = Clock()
    monkeypatch.setattr(ray_engine, "time", clock)
    monkeypatch.setattr(_Driver, "head_answers", lambda _: True)
    monkeypatch.setattr(interruption, "is_command", False)  # in a command a second signal ends the process

    def run(
        *slots: Sequence[Loop], limits: Limits | None = None, interrupts: Sequence[float] = ()
    ) -> tuple[bool, float]:
        start = clock.now
        ray = Ray(clock, [start + seconds for seconds in interrupts])
        made = [_Slot(number, Actor(clock, loops), began=start, answered=start) for number, loops in enumerate(slots)]
        forever = replace(plan, names=None, share=True, limits=limits)
        return _Driver(ray, made, storage, Settings(), [], forever).run(), clock.now - start

    return run


BROKEN = Loop(5.0, End(kind="failed", error=DeviceError("the device does not compute")))
NOT_INSTALLED = Loop(5.0, "the node n1 has Trialyard 0.0.1, and the command has 1.0: install the same version")
LONG = 4000.0
LEAVES = Loop(LONG, End(kind="left"))
AGAIN = RETRY_SECONDS


@pytest.mark.parametrize(
    ("slots", "idle_minutes", "seconds", "is_given_up"),
    [
        pytest.param([[BROKEN]], 10, 600, True, id="it always fails"),
        pytest.param([[BROKEN], [BROKEN]], 10, 600, True, id="both always fail"),
        pytest.param([[NOT_INSTALLED]], 10, 600, True, id="its node cannot run it"),
        pytest.param([[BROKEN], [LEAVES]], 10, LONG, False, id="another one goes on"),
        pytest.param([[LEAVES]], 1, LONG, False, id="it has just begun"),
        pytest.param([[BROKEN, LEAVES]], 8, AGAIN + LONG, False, id="it failed once"),
        pytest.param([[BROKEN, LEAVES._replace(trains=True)]], 6, AGAIN + LONG, False, id="it failed once and trains"),
    ],
)
def test_a_command_that_waits_for_studies_ends_when_no_slot_could_train_for_its_idle_minutes(
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
    slots: list[list[Loop]],
    idle_minutes: float,
    seconds: float,
    is_given_up: bool,
) -> None:
    done, took = watch(*slots, limits=Limits(idle_minutes=idle_minutes))
    assert done
    assert seconds <= took < seconds + 20
    text = f"no slot could train for the {idle_minutes} minutes of --idle-minutes: this command ends"
    assert (text in caplog.text) is is_given_up


def test_a_second_interrupt_ends_a_command_at_once(watch: Watch, storage: PatientStorage) -> None:
    done, took = watch([LEAVES], interrupts=[3.0, 5.0])
    assert (done, took) == (False, 5.0)
    assert storage.shutting_down.is_set(), "its trial is not back in the queue"
