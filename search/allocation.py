"""What a scheduler or a container has given to this process: cores, memory, GPUs.

Slurm says it in variables of the job. A control group (of a container, or of a job where Slurm uses them) limits it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # the control groups of this process, a line for each hierarchy
# One of these tells a process of a Slurm job that it has GPUs.
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
# Where the limit and the use of memory are, in control groups of version 2 and 1.
MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def slurm_cores() -> int | None:
    """How many processor cores Slurm has given to this task; None outside of a Slurm job.

    The affinity says the same only where the site has Slurm set it.
    """
    return _number("SLURM_CPUS_PER_TASK") or _number("SLURM_CPUS_ON_NODE")


def slurm_memory() -> int | None:
    """How many bytes of memory Slurm has given to the job on this machine; None if it limits none."""
    megabytes = _number("SLURM_MEM_PER_NODE") or (_number("SLURM_MEM_PER_CPU") or 0) * (
        _number("SLURM_CPUS_ON_NODE") or 1
    )
    return megabytes << 20 if megabytes else None


def has_no_gpu() -> bool:
    """Whether this is a Slurm job without a GPU, so that the machine's GPUs belong to other jobs."""
    return "SLURM_JOB_ID" in os.environ and not any(name in os.environ for name in GPU_VARIABLES)


def free_memory_in_groups(folder: Path | None = None) -> int | None:
    """How many bytes of memory the control groups of this process leave; None if they do not limit it.

    `folder` is where control groups are, by default CONTROL_GROUPS. A limit of a group holds for the groups in it.
    """
    left = [
        amount
        for group in _groups(folder or CONTROL_GROUPS)
        for names in MEMORY_FILES
        if (amount := _left(group, *names)) is not None
    ]
    return min(left, default=None)


def _groups(folder: Path) -> Iterator[Path]:
    """The folders of this process's control groups. In a container it is `folder` itself."""
    yield folder
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = folder / controllers
            group = top / path.strip("/")
            yield from (each for each in (group, *group.parents) if each.is_relative_to(top) and each != folder)


def _left(group: Path, limit_name: str, used_name: str) -> int | None:
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in (limit_name, used_name))
    except (OSError, ValueError):
        return None  # there is no such file, or it has "max"
    return limit - used


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None
