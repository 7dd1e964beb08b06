"""Workers in Slurm's jobs: the script, what is refused before anything is submitted, and a study on a real Slurm."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Call, ended, until
from object_server import Server, free_port
from slurm_cluster import PARTITION, SlurmCluster

import search
import studies
from search import slurm
from search.errors import SlurmError
from storage import database, mounts, promises
from storage.errors import ObjectStoreError, SettingsError, StorageError
from storage.settings import Settings

RECORDED = Path(__file__).parent / "recorded" / "slurm-job.sh"
NODES = "gpu*|n1|gpu:a100:4(S:0-1)\ngpu*|n2|gpu:2,gpu:v100:1\ncpu|n3|(null)\n"  # as `sinfo` prints them


def test_the_script_is_the_recorded_one(trialyard: Call) -> None:
    options = ["--sbatch", "partition=gpu", "--sbatch", "--cpus-per-task=4", "--sbatch", "constraint=a100|h100"]
    code, out, _ = trialyard(
        *("work", "digits", "mine", "--per-device", "2", "--slurm", "8", "--gpus", "1", *options, "--print")
    )
    assert code == 0
    assert out == RECORDED.read_text(encoding="utf-8").replace("PYTHON", shlex.quote(sys.executable))
    text = search.submit_to_slurm(
        *("digits", "mine"),
        jobs=8,
        gpus=1,
        per_device=2,
        sbatch=["partition=gpu", "cpus-per-task=4", "constraint=a100|h100"],
        submit=False,
    ).script
    assert text == out


def test_the_limits_of_a_worker_are_those_of_each_job(trialyard: Call) -> None:
    code, out, _ = trialyard("work", "digits", "--slurm", "2", "--minutes", "230", "--idle-minutes", "5", "--print")
    assert code == 0
    assert out.splitlines()[-1].endswith(" work digits --minutes 230.0 --idle-minutes 5.0")
    code, out, err = trialyard("work", "digits", "--slurm", "2", "--minutes", "0", "--print")
    assert (code, out) == (1, "")
    assert err.startswith("error: --minutes = 0 must be a finite number greater than 0")


def test_the_signal_comes_early_enough_for_the_checkpoints() -> None:
    job = slurm.ArrayJob(jobs=1)
    assert "--signal=B:TERM@90\n" in slurm.script(job, Settings())
    assert "--signal=B:TERM@370\n" in slurm.script(job, Settings(stop_seconds=300))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "0.5"], ["whole GPUs", "0.5", "--per-device"]),
        (["--gpus", "inf"], ["whole GPUs", "inf"]),
        (["--sbatch", "array=1-9"], ["array=1-9", "--slurm N"]),
        (["--sbatch", "partition gpu"], ["partition gpu", "partition=gpu"]),
        (["--sbatch", "comment=a\n#SBATCH --wrap=b"], ["not an option"]),
    ],
)
def test_an_option_that_cannot_be_is_refused(trialyard: Call, options: list[str], words: list[str]) -> None:
    code, out, err = trialyard("work", "--slurm", "2", *options, "--print")
    assert (code, out, err.count("\n")) == (1, "", 1)
    for word in words:
        assert word in err


def test_a_number_of_gpus_that_is_no_number_is_refused_in_python_too(home: Path) -> None:
    for gpus in (float("nan"), float("inf"), -1):
        with pytest.raises(SlurmError, match=r"Slurm gives whole GPUs to a job, and --gpus is (nan|inf|-1)"):
            search.submit_to_slurm(jobs=1, gpus=gpus, submit=False)


def test_the_script_never_has_a_password(home: Path) -> None:
    with pytest.raises(SettingsError, match="TRIALYARD_STORAGE_FILE"):
        search.submit_to_slurm(jobs=1, storage="postgresql://me:secret@server/db", submit=False)


@pytest.fixture
def pretended_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs `sinfo` and `sbatch` of a cluster with the NODES; what is submitted is in the file that is returned.

    A second file, with the suffix .arguments, has the arguments of `sbatch`, a line each.
    """
    folder, submitted = tmp_path / "programs", tmp_path / "submitted"
    folder.mkdir()
    sbatch = f"""cat > {submitted}; printf '%s\\n' "$@" > {submitted}.arguments; echo 12"""
    for name, text in {"sinfo": f"printf %s {shlex.quote(NODES)}", "sbatch": sbatch}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return submitted


def test_without_slurm_it_says_what_to_do(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match=r"no `sbatch` here.*--print"):
        search.submit_to_slurm(jobs=1, storage=sqlite_url)


@pytest.mark.parametrize(
    ("gpus", "sbatch", "words"),
    [
        (0, ["partition=nope"], "no partition 'nope': it has cpu, gpu"),
        (5, [], r"no node has 5 GPUs .*partition gpu: at most 4.*--gpus 4"),
        (1, ["partition=cpu"], r"no node has 1 GPUs .*leave --gpus out"),
        (1, [], r"SQLite file .* may run on 2 nodes: use PostgreSQL"),
        (0, ["partition=cpu"], r"SQLite file .* the node n3"),
    ],
)
def test_what_a_cluster_cannot_run_is_not_submitted(
    pretended_slurm: Path, sqlite_url: str, gpus: int, sbatch: list[str], words: str
) -> None:
    with pytest.raises(SlurmError, match=words):
        search.submit_to_slurm(jobs=2, gpus=gpus, sbatch=sbatch, storage=sqlite_url)
    assert not pretended_slurm.exists()


def test_several_nodes_need_artifacts_that_all_see(
    pretended_slurm: Path, home: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_STORAGE", postgresql_url)
    monkeypatch.setattr(mounts, "MOUNTS", home / "mounts")
    (home / "mounts").write_text("/dev/sda1 / ext4 rw 0 0\n", encoding="utf-8")
    with pytest.raises(SlurmError, match=r"artifacts folder .*\(ext4\).*2 nodes: set TRIALYARD_ARTIFACTS"):
        search.submit_to_slurm(jobs=2)
    assert not pretended_slurm.exists()
    (home / "mounts").write_text("/dev/sda1 / ext4 rw 0 0\nserver@tcp:/x /shared lustre rw 0 0\n", encoding="utf-8")
    monkeypatch.setenv("TRIALYARD_ARTIFACTS", "/shared/artifacts")
    assert search.submit_to_slurm(jobs=2).job == "12"
    assert "#SBATCH --array=1-2\n" in pretended_slurm.read_text(encoding="utf-8")


def test_sbatch_gets_the_options_of_the_script_on_its_command_line_too(pretended_slurm: Path) -> None:
    """Its variables, such as SBATCH_PARTITION, win over the script, and its command line wins over both."""
    job = slurm.ArrayJob(jobs=3, gpus=1, sbatch=("partition=gpu", "comment=two words"))
    settings = Settings(storage="postgresql://me@server/db", artifacts="s3://bucket/trialyard")
    submitted = slurm.submit(job, settings)
    assert submitted.script == pretended_slurm.read_text(encoding="utf-8")
    in_script = [shlex.split(line)[1] for line in submitted.script.splitlines() if line.startswith("#SBATCH")]
    assert {"--partition=gpu", "--comment=two words", "--requeue", "--array=1-3"} <= {*in_script}
    given = pretended_slurm.with_suffix(".arguments").read_text(encoding="utf-8").splitlines()
    assert given == ["--parsable", *in_script]


def test_a_database_that_does_not_answer_is_found_out_before_anything_is_submitted(
    pretended_slurm: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_ARTIFACTS", "s3://bucket/trialyard")
    monkeypatch.setenv("TRIALYARD_STORAGE", f"postgresql://me@127.0.0.1:{free_port()}/db")
    with pytest.raises(StorageError, match="the database postgresql"):
        search.submit_to_slurm(jobs=2, forever=True)
    assert not pretended_slurm.exists()


@pytest.mark.long
def test_a_store_that_cannot_be_used_is_found_out_before_anything_is_submitted(
    pretended_slurm: Path, home: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    try:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TRIALYARD_STORAGE", postgresql_url)
        monkeypatch.setenv("TRIALYARD_ARTIFACTS", "s3://bucket/trialyard")
        with pytest.raises(ObjectStoreError, match="the bucket of s3://bucket/trialyard does not exist"):
            search.submit_to_slurm(jobs=2)
        assert not pretended_slurm.exists()
        server.create_bucket("bucket")
        assert search.submit_to_slurm(jobs=2).job == "12"
    finally:
        server.close()


# --- a real Slurm -----------------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], Any], what: str, seconds: float = 240.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it never came: {what}"
        time.sleep(0.3)
    return value


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_study_on_slurm_survives_requeue_scancel_and_a_killed_slurmstepd(
    slurm_cluster: SlurmCluster,
    write_small: Callable[..., Path],
    start: Callable[..., Any],
    trialyard: Call,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun by a plain worker, finished by Slurm's: the budget is exact, and no attempt is lost."""
    monkeypatch.setenv("TRIALYARD_CHECKPOINT_SECONDS", "0.2")
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    write_small(trials=3, epochs=40)
    plain = start("run", "small.toml")
    until(plain, "epoch")
    plain.send_signal(signal.SIGTERM)
    ended(plain, 130)

    for options, words in (
        (["--sbatch", "partition=nope"], ["no partition 'nope'", PARTITION]),
        (["--gpus", "2"], ["no node has 2 GPUs", "at most 1"]),
        (["--sbatch", "time=soon"], ["sbatch", "time"]),
    ):
        code, out, err = trialyard("work", "small", "--slurm", "2", *options)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert all(word in err for word in words), err
    assert slurm_cluster.tell("squeue", "--noheader") == ""

    # What a profile may have set for the user's own scripts.
    for name, value in {"NO_REQUEUE": "1", "ARRAY_INX": "5-9", "SIGNAL": "INT@1", "PARTITION": "nope"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    options = [f"partition={PARTITION}", "cpus-per-task=1", "time=10"]
    code, out, err = trialyard(
        "work", "small", "--slurm", "2", *(word for each in options for word in ("--sbatch", each))
    )
    assert code == 0, err
    job = out.split()[4]
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")

    def running() -> set[int]:
        """The workers that are in the middle of a training."""
        return {slot.pid for slot in studies.workers(storage) if slot.epoch and psutil.pid_exists(slot.pid)}

    pids = _wait_for(lambda: two if len(two := running()) == 2 else None, "both jobs train")
    # Each fills what Slurm gave it: one core of two.
    assert len(studies.workers(storage)) == 2
    slurm_cluster.tell("scancel", f"{job}_2")
    slurm_cluster.tell("scontrol", "requeue", f"{job}_1")
    _wait_for(lambda: not any(map(psutil.pid_exists, pids)), "both workers have stopped")
    assert _outcomes(storage).count("interrupted") == 3

    third = next(iter(_wait_for(running, "the requeued job trains")))
    assert slurm_cluster.states(job) == {"1": "RUNNING"}
    stepd = psutil.Process(third).parent()
    assert stepd is not None
    assert stepd.name().startswith("slurmstepd"), "the worker is in the place of the script"
    stepd.kill()
    _wait_for(lambda: studies.status("small", storage).finished == 3, "the study's end")
    assert "lost" not in _outcomes(storage)
    assert promises.check(storage) == []
    best = studies.best_trial("small", storage)
    assert best.value is not None
    log = (home / f"slurm-{job}_1.out").read_text(encoding="utf-8")
    assert "Traceback" not in log
    storage.engine.dispose()


def _outcomes(storage: Any) -> list[str | None]:
    return [
        attempt.outcome
        for trial in studies.trials("small", storage)
        for attempt in studies.attempts("small", trial.number, storage)
    ]
