"""The examples in the docstrings of `studies` and `trialyard` are correct: each runs with a study that was trained."""

import doctest
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

import studies
import trialyard

FUNCTIONS = [name for name in studies.__all__ if callable(getattr(studies, name)) and name[0].islower()]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A folder with the yard of a study `digits`: two trials of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    command("run", "digits", "--trials", "2", "--epochs", "1", "--limit", "300", folder=folder)
    return folder


def _examples(name: str) -> list[doctest.DocTest]:
    names = {"studies": studies, "ty": trialyard, "np": np, "os": os}
    packages = {"studies": studies, "trialyard": trialyard}
    target = packages[name] if name in packages else getattr(trialyard, name)
    return doctest.DocTestFinder(recurse=False).find(target, name, module=False, globs=names)


@pytest.mark.parametrize("name", ["studies", "trialyard", "search", *FUNCTIONS])
def test_the_example_gives_what_it_says(name: str, trained: Path, home: Path, command: Command) -> None:
    shutil.copytree(trained / "yard", home / "yard")
    if name == "confirmed":
        command("confirm", "digits", "--top", "1", "--seeds", "2", folder=home)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in _examples(name):
        runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)
    assert runner.tries > 0, f"the docstring of {name} has no example"
