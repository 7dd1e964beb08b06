"""The examples in the docstrings of `studies` are correct: each runs with a study that was really trained."""

import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import studies

FUNCTIONS = [name for name in studies.__all__ if callable(getattr(studies, name)) and name[0].islower()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the yard of a study `digits`: two trials of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIALYARD_")}
    command = [sys.executable, "-m", "search.cli", "run", "digits", "--trials", "2", "--epochs", "1", "--limit", "300"]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=280)
    return folder


def _examples(name: str) -> list[doctest.DocTest]:
    names = {"studies": studies, "np": np, "os": os}
    target = studies if name == "studies" else getattr(studies, name)
    return doctest.DocTestFinder(recurse=False).find(target, name, module=False, globs=names)


@pytest.mark.parametrize("name", ["studies", *FUNCTIONS])
def test_the_example_gives_what_it_says(name: str, trained: Path, home: Path) -> None:
    shutil.copytree(trained / "yard", home / "yard")
    if name == "confirmed":
        command = [sys.executable, "-m", "search.cli", "confirm", "digits", "--top", "1", "--seeds", "2"]
        subprocess.run(command, cwd=home, check=True, timeout=280, stdout=subprocess.DEVNULL)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in _examples(name):
        runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)
    assert runner.tries > 0, f"the docstring of {name} has no example"
