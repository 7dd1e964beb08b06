"""Workers as jobs of a Slurm cluster: the script of an array job, and what must be right before it is submitted.

Each job of the array is one `trialyard work` on one node. The database gives out the trials, so the jobs know nothing
of each other: they may start at any time, end, be requeued, or never run.
"""

import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.errors import SlurmError
from search.limits import Limits
from search.worker import EXIT_SECONDS
from storage import database
from storage.artifact_store import FolderStore
from storage.mounts import local_kind
from storage.settings import Settings

ANSWER_SECONDS = 120.0  # a busy controller may take long
# Slurm may send the signal up to a minute before it is due, and never later.
SPARE_SECONDS = 65.0
OURS = ("array", "nodes", "ntasks", "wrap")  # options of sbatch that would make it another kind of job


@dataclass(frozen=True, kw_only=True)
class ArrayJob:
    """An array job whose jobs are workers."""

    jobs: int  # how many
    gpus: int = 0  # of each, on its node
    sbatch: tuple[str, ...] = ()  # options of sbatch without their dashes: "partition=gpu"
    arguments: tuple[str, ...] = ()  # of `trialyard work`

    def option(self, name: str) -> str | None:
        """The value of an option of sbatch, the last one that is given; None if none is."""
        values = [value for each, _, value in (option.partition("=") for option in self.sbatch) if each == name]
        return values[-1] if values else None


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What was submitted, or would be."""

    script: str
    job: str | None = None  # Slurm's number of the array job


def array_job(
    jobs: int,
    gpus: float,
    sbatch: Sequence[str],
    arguments: Sequence[str],
    given: Mapping[str, Any] | None = None,
) -> ArrayJob:
    """The job, if what sbatch is to be given is right: its workers get `arguments` and the options that are `given`.

    `given` has the options' names without dashes; None and "auto" are left out. Raises SlurmError, and WorkerError if
    the minutes of a worker are not a positive number.
    """
    options_of_work = dict(given or {})
    Limits(options_of_work.get("minutes"), options_of_work.get("idle-minutes"))
    if jobs < 1:
        raise SlurmError(f"{jobs} workers cannot be submitted: give --slurm 1 or more")
    if not math.isfinite(gpus) or gpus < 0 or gpus != int(gpus):
        raise SlurmError(
            f"Slurm gives whole GPUs to a job, and --gpus is {gpus:g}: give --gpus 1, and --per-device 2 for two "
            "trials on it"
        )
    options = tuple(option.removeprefix("--") for option in sbatch)
    for option in options:
        name = option.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]*", name) or not option.isprintable():
            raise SlurmError(f"--sbatch {option!r} is not an option of sbatch: write it as --sbatch partition=gpu")
        if name in OURS:
            raise SlurmError(
                f"--sbatch {option} would make it another kind of job: it has --slurm N jobs of one task on one node"
            )
    words = [*arguments]
    for name, value in options_of_work.items():
        if value not in (None, "auto"):
            words += [f"--{name}", str(value)]
    return ArrayJob(jobs=jobs, gpus=int(gpus), sbatch=options, arguments=tuple(words))


def _options(job: ArrayJob, settings: Settings) -> list[str]:
    """What sbatch gets, without dashes: ours, then those that were given, which win."""
    seconds = math.ceil(settings.stop_seconds + EXIT_SECONDS + SPARE_SECONDS)
    return [
        "job-name=trialyard",
        f"array=1-{job.jobs}",
        "nodes=1",
        "ntasks=1",
        *([f"gres=gpu:{job.gpus}"] if job.gpus else []),
        "requeue",
        "open-mode=append",
        f"signal=B:TERM@{seconds}",
        *job.sbatch,
    ]


def script(job: ArrayJob, settings: Settings) -> str:
    """The text for sbatch."""
    command = shlex.join([sys.executable, "-P", "-m", "trialyard", "work", *job.arguments])
    return (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH --{_quoted(option)}\n" for option in _options(job, settings))
        + "# At TERM the worker ends its running batches, writes checkpoints and puts its trials back into the queue.\n"
        "# Slurm sends TERM before the time limit, at preemption, `scontrol requeue` and `scancel`; where it uses\n"
        "# control groups, to this process alone. So the worker takes its place.\n"
        f"exec {command}\n"
    )


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return name + equals + (shlex.quote(value) if equals else "")


def submit(job: ArrayJob, settings: Settings) -> Submitted:
    """Submits `job`. The workers get this process's environment, and its current folder.

    Raises SlurmError with nothing submitted where Slurm cannot run it, or the workers could not share the database or
    the files; StorageError where the database's URL does not parse.
    """
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        raise SlurmError(
            "there is no `sbatch` here, which submits jobs: run this on a machine of the Slurm cluster, or give "
            "--print to see the script"
        )
    nodes = _nodes(job)
    _require_gpus(job, nodes)
    _require_shared(settings, {node.host for node in nodes})
    text = script(job, settings)
    # On the command line, too: sbatch prefers its variables, such as SBATCH_PARTITION and SBATCH_SIGNAL, to the script.
    answer = _ask("sbatch", "--parsable", *(f"--{option}" for option in _options(job, settings)), text=text)
    return Submitted(script=text, job=answer.strip().partition(";")[0])


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A node, as a member of a partition."""

    partition: str
    is_default: bool  # the partition is that of jobs that name none
    host: str
    gpus: int


def _nodes(job: ArrayJob) -> list[_Node]:
    """The nodes that the jobs may run on. Raises SlurmError if there is none."""
    listed = job.option("nodelist")
    only = [f"--nodes={listed}"] if listed else []
    lines = _ask("sinfo", "--noheader", "--Node", "--format=%P|%n|%G", *only).splitlines()
    nodes = [_node(line) for line in lines if line.count("|") == 2]
    wanted = job.option("partition") or os.environ.get("SBATCH_PARTITION")
    existing = {node.partition for node in nodes}
    for name in wanted.split(",") if wanted else ():
        if name not in existing:
            names = ", ".join(sorted(existing)) or "none"
            where = f" with the nodes {listed}" if listed else ""
            raise SlurmError(
                f"Slurm has no partition {name!r}{where}: it has {names}; give one with --sbatch partition=NAME"
            )
    chosen = [node for node in nodes if (node.partition in wanted.split(",") if wanted else node.is_default)]
    if not chosen:
        raise SlurmError("Slurm has no default partition with nodes: give one with --sbatch partition=NAME")
    return chosen


def _node(line: str) -> _Node:
    partition, host, resources = line.split("|")
    counts = re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources)  # gpu:2, gpu:a100:4(S:0-1)
    return _Node(
        partition=partition.rstrip("*"),
        is_default=partition.endswith("*"),
        host=host,
        gpus=sum(map(int, counts)),
    )


def _require_gpus(job: ArrayJob, nodes: Sequence[_Node]) -> None:
    most = max(node.gpus for node in nodes)
    if job.gpus > most:
        partitions = ", ".join(sorted({node.partition for node in nodes}))
        advice = f"give --gpus {most} or fewer" if most else "leave --gpus out"
        raise SlurmError(
            f"no node has {job.gpus} GPUs for one worker (partition {partitions}: at most {most}): {advice}, or "
            "another partition with --sbatch partition=NAME"
        )


def _require_shared(settings: Settings, hosts: set[str]) -> None:
    """Raises SlurmError if workers on `hosts` could not use the same database and files as this machine."""
    here = socket.gethostname().partition(".")[0]
    if {host.partition(".")[0] for host in hosts} == {here}:
        return
    where = f"{len(hosts)} nodes" if len(hosts) > 1 else f"the node {min(hosts)}"
    path = database.file_at(settings.url)
    if path is not None:
        raise SlurmError(
            f"the database is the SQLite file {path}, which processes of one machine alone can share, and the "
            f"workers may run on {where}: use PostgreSQL (TRIALYARD_STORAGE), or this machine alone with "
            f"--sbatch nodelist={here}"
        )
    in_folder = isinstance(settings.artifact_store, FolderStore)
    kind = local_kind(settings.artifact_folder) if in_folder else None
    if kind is not None:
        raise SlurmError(
            f"the artifacts folder {settings.artifact_folder} is on a disk of this machine alone ({kind}), and the "
            f"workers may run on {where}: set TRIALYARD_ARTIFACTS to a folder that all nodes share, or to an "
            "object store"
        )


def _ask(program: str, *arguments: str, text: str = "") -> str:
    """What one of Slurm's programs prints, with `text` as its standard input. Raises SlurmError where it fails."""
    try:
        ended = subprocess.run(
            [program, *arguments], input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"`{program}` did not answer ({error}): try again when Slurm does") from error
    if ended.returncode != 0:
        # The reason is in the last line, after the program's name: "sbatch: error: Batch job submission failed: ..."
        reason = re.sub(r"^\S+ (error: )?", "", ended.stderr.strip().splitlines()[-1]) if ended.stderr.strip() else ""
        raise SlurmError(
            f"`{program}` failed ({reason or f'exit code {ended.returncode}'}): correct what --sbatch gives, or try "
            "again when Slurm answers"
        )
    return ended.stdout
