"""One trial walks through all that can start a worker: by hand, Slurm, Ray and Docker Compose, and back."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import containers
import psutil
import pytest
import ray_nodes
from conftest import COMMAND, Command, ended
from containers import ROOT, InstalledHere, Stack
from slurm_cluster import SlurmCluster

import studies
from storage import database, promises, slots
from storage.transactions import PatientStorage, read

ray = pytest.importorskip("ray", reason="needs Ray: `pip install '.[ray]'`")

EPOCHS = 40
PASSWORD = "a-password"


@pytest.fixture
def stack(tmp_path: Path, docker_compose: str) -> Iterator[Stack]:
    """The services of docker-compose.yml, of which the database runs and has its tables."""
    project = tmp_path / "project"
    (project / "secrets").mkdir(parents=True)
    for name in ("database_password", "dashboard_password"):
        (project / "secrets" / name).write_text(PASSWORD, encoding="utf-8")
    (project / "docker-compose.yml").write_bytes((ROOT / "docker-compose.yml").read_bytes())
    (project / ".env").write_text("TRIALYARD_WORKERS=1\nTRIALYARD_CHECKPOINT_SECONDS=0\n", encoding="utf-8")
    composed = containers.resolved(project, docker_compose)
    services = containers.services(project, composed)
    image = InstalledHere("cpu", tmp_path / "image")
    with Stack(project, services, image, containers.built_image(composed, "cpu"), "database") as stack:
        running = stack.start(services["database"])
        stack.running.append(running)
        containers.until(lambda: stack.healthy(running), "the database is healthy")
        stack.run("storage", *services["storage"].command)
        yield stack


@pytest.fixture
def ray_address(
    tmp_path_factory: pytest.TempPathFactory, ray_folder: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A Ray cluster of this machine, without a token."""
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    port = containers.free_port()
    options = (f"--port={port}", "--num-gpus=0", "--num-cpus=2", "--include-dashboard=false")
    with ray_nodes.node("ray start --head", *options):
        yield f"127.0.0.1:{port}"


# Each starts a worker, gives what tells it to stop, and waits for its end.


@contextmanager
def _command(start: Command, *arguments: str) -> Iterator[Callable[[], object]]:
    process = start(*arguments, program=COMMAND)  # its trainer processes are no forks
    yield lambda: process.send_signal(signal.SIGTERM)
    ended(process, 130)


@contextmanager
def _slurm_job(cluster: SlurmCluster, start: Command) -> Iterator[Callable[[], object]]:
    out, _ = ended(start("work", "small", "--slurm", "1", "--workers", "1"))
    job = out.split()[4]
    yield lambda: cluster.tell("scancel", job)
    containers.until(lambda: not cluster.states(job), "the job has ended")


@contextmanager
def _compose(stack: Stack) -> Iterator[Callable[[], object]]:
    worker = stack.start(stack.services["worker"])
    stack.running.append(worker)
    yield lambda: worker.process.send_signal(getattr(signal, worker.service.stop_signal))
    assert worker.process.wait(worker.service.grace) == 130, worker.log.read_text(encoding="utf-8")


def _held_after(storage: PatientStorage, epoch: int) -> psutil.Process:
    """Suspends the trainer process in the trial, once it has reported an epoch after this one."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for slot in read(storage, slots.present):
            if (slot.epoch or 0) > epoch and psutil.pid_exists(slot.pid):
                for child in psutil.Process(slot.pid).children():
                    if "search.trainer_process" in child.cmdline():
                        child.suspend()
                        return child
        time.sleep(0.05)
    raise AssertionError(f"no worker has reported an epoch after {epoch}")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_trial_walks_through_all_engines_and_back(
    home: Path,
    write_small: Callable[..., Path],
    stack: Stack,
    slurm_cluster: SlurmCluster,
    ray_address: str,
    start: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"postgresql://trialyard:{PASSWORD}@127.0.0.1:{stack.database_port}/trialyard"
    for name, value in {
        "TRIALYARD_STORAGE": url,
        "TRIALYARD_ARTIFACTS": str(stack.project / "volumes" / "artifacts"),
        "TRIALYARD_CHECKPOINT_SECONDS": "0",
        "TRIALYARD_WORKERS": "1",
        "SLURM_CONF": slurm_cluster.environment["SLURM_CONF"],
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(name, value)
    ended(start("create", str(write_small(trials=2, epochs=EPOCHS))))
    storage = database.connect(url)

    def by_hand() -> Any:
        return _command(start, "work", "small")

    def on_slurm() -> Any:
        return _slurm_job(slurm_cluster, start)

    def on_ray() -> Any:
        return _command(start, "work", "small", "--ray", ray_address, "--workers", "1")

    def in_compose() -> Any:
        return _compose(stack)

    walk = [by_hand, on_slurm, on_ray, in_compose, on_ray, on_slurm, by_hand]
    last = 0
    for engine in walk:
        with engine() as stop:
            trainer = _held_after(storage, last)
            stop()
            trainer.resume()
        last = studies.attempts("small", 0, storage)[-1].epoch
    ended(start("work", "small"))

    attempts = studies.attempts("small", 0, storage)
    assert [attempt.outcome for attempt in attempts] == ["interrupted"] * len(walk) + ["finished"]
    # Each went on exactly where the one before had stopped.
    assert [attempt.resumed_after for attempt in attempts[1:]] == [attempt.epoch for attempt in attempts[:-1]]
    found = studies.registry.open("small", storage).trials
    assert [trial.number for trial in found] == [0, 1]
    assert [sorted(trial.intermediate_values) for trial in found] == [list(range(1, EPOCHS + 1))] * 2
    assert promises.check(storage) == []
    storage.engine.dispose()
