"""Nodes of a Ray cluster as processes of this machine, started by the commands that docs/deployment.md tells."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from containers import ROOT


def documented(start: str) -> list[str]:
    """The words of the command in the section on Ray that starts so."""
    section = (
        (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").partition("\n## Ray\n")[2].partition("\n## ")[0]
    )
    (line,) = re.findall(rf"^{re.escape(start)}.*$", section, re.MULTILINE)
    return [*line.partition("#")[0].split()]


def command(start: str, *more: str) -> list[str]:
    """The words of that documented command of Ray, whose options `more` replaces."""
    replaced = tuple(option.partition("=")[0] + "=" for option in more) or ("none",)
    program, *words = [word for word in documented(start) if not word.startswith(replaced)]
    return [str(Path(sys.executable).with_name(program)), *words, *more]


@contextmanager
def node(start: str, *more: str) -> Iterator[None]:
    """A node, whose output is in Ray's own log files; it is killed with all that it has started at the end."""
    process = subprocess.Popen(command(start, *more, "--block"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family[1:], timeout=10)
    process.wait(timeout=10)
