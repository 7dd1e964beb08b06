"""What `trialyard work --slurm N` does."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from search.options import invocation
from storage.errors import many


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of `work` for Slurm."""

    jobs: int | None  # --slurm
    gpus: float | None
    sbatch: Sequence[str]
    only_print: bool


def submit(*studies: str, asked: Asked, **options: Any) -> bool:
    """Submits the workers to Slurm, or prints their script; False if `--slurm` is not given: then nothing is done.

    `options` are those of `search.service.submit_to_slurm`.
    """
    if asked.jobs is None:
        if asked.sbatch or asked.only_print:
            raise typer.BadParameter("--sbatch and --print are for jobs of Slurm: give --slurm N, too")
        return False
    from search import service
    from search.terminal import say

    submitted = service.submit_to_slurm(
        *studies,
        jobs=asked.jobs,
        gpus=asked.gpus or 0,
        sbatch=asked.sbatch,
        submit=not asked.only_print,
        **options,
    )
    if submitted.job is None:
        sys.stdout.write(submitted.script)
    else:
        say(
            f"Slurm has the job {submitted.job} with {many(asked.jobs, 'worker')}: `squeue --job {submitted.job}` "
            f"shows it, `scancel {submitted.job}` ends it, {invocation('status', options['storage'])} shows its trials"
        )
    return True
