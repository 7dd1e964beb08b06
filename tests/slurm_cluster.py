"""A real Slurm of one node, this machine: its daemons as processes, with a configuration in a folder of their own.

Control groups are off: where tests run in a container, nobody may make them. So Slurm finds the processes of a job by
their parents, and sends its signals to all of them.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "scontrol", "scancel", "squeue")
PARTITION = "all"
SECONDS = 60.0  # the longest wait for an answer
SBIN = "/usr/sbin"  # where Debian has the daemons; not in every PATH

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
JobRequeue=1
MpiDefault=none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName={partition} Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Those of Slurm's programs that are not installed."""
    return [name for name in PROGRAMS if _path(name) is None]


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}{SBIN}")


class SlurmCluster:
    """Slurm's daemons, which run as root; they are killed at the end of the ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}  # for all programs of Slurm

    def __enter__(self) -> "SlurmCluster":
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = [_free_port(), _free_port()]
        text = CONFIGURATION.format(
            folder=self.folder,
            host=socket.gethostname(),
            controller_port=ports[0],
            node_port=ports[1],
            partition=PARTITION,
        )
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        # A file of devices that is no GPU's: the node has something to give out.
        (self.folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/zero\n", encoding="utf-8")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", *options)
        _until(lambda: (self.folder / "munge.socket").exists(), "munged answers")
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        _until(lambda: self.tell("sinfo", "--noheader", "--format=%T").strip() == "idle", "the node is idle")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.daemon_children():
            _kill(pid)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def tell(self, program: str, *arguments: str) -> str:
        """What one of Slurm's programs prints; empty where it fails."""
        asked = subprocess.run(
            [str(_path(program)), *arguments],
            env=dict(os.environ) | self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return asked.stdout if asked.returncode == 0 else ""

    def states(self, job: str) -> dict[str, str]:
        """The states of an array job's jobs that have not ended, by their numbers in the array."""
        lines = self.tell("squeue", f"--job={job}", "--noheader", "--array", "--format=%K %T").splitlines()
        return dict(line.split() for line in lines)

    def daemon_children(self) -> list[int]:
        """The process ids of all that Slurm has started for jobs: slurmstepd, its scripts, their processes."""
        found: list[int] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return [pid for pid in found if pid not in {daemon.pid for daemon in self._daemons}]

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(_path(program)), *arguments],
                env=dict(os.environ) | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._daemons.append(process)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it never came: {what}"
        time.sleep(0.2)
