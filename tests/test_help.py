"""Help in groups that fits into a terminal, options that work everywhere, and completion of studies."""

import logging
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Call
from typer.main import get_command

from search import completion
from search.cli import app
from search.help import GROUPS
from studies import registry

COLUMNS = 80


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


@pytest.fixture
def quiet() -> Iterator[None]:
    """Leaves the logging as it was."""
    level, disabled = logging.getLogger().level, logging.root.manager.disable
    yield
    logging.getLogger().setLevel(level)
    logging.disable(disabled)


@pytest.mark.usefixtures("wide")
def test_every_command_is_in_a_group_with_one_whole_line(trialyard: Call) -> None:
    code, out, _ = trialyard("-h")
    assert code == 0
    sections = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options", *GROUPS]
    listed = [line.split()[0] for line in out.partition("\nStart:\n")[2].splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]
    _, storage, _ = trialyard("storage", "-h")
    for line in (out + storage).replace("[ARGS]...", "[ARGS]").splitlines():
        assert len(line) <= COLUMNS, line
        assert not line.endswith("..."), line


@pytest.mark.parametrize("arguments", [["status", "-h"], ["storage", "check", "-h"], ["trials", "--help"]])
def test_help_is_given_everywhere(trialyard: Call, arguments: list[str]) -> None:
    code, out, err = trialyard(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: trialyard {' '.join(arguments[:-1])} ")
    assert "-v, --verbose" in out


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "arguments",
    [["-v", "status"], ["status", "-v"], ["storage", "check", "--verbose"], ["storage", "-v", "check"], ["status"]],
)
def test_verbose_is_understood_before_and_after_the_command(trialyard: Call, arguments: list[str]) -> None:
    trialyard("storage", "create")
    logging.getLogger().setLevel(logging.WARNING)
    assert trialyard(*arguments)[0] == 0
    wanted = logging.DEBUG if arguments != ["status"] else logging.WARNING
    assert logging.getLogger().level == wanted


def _completed(line: str, trialyard: Call, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setenv("_TRIALYARD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    code, out, err = trialyard()
    assert code == 0
    return out, err


@pytest.mark.usefixtures("quiet")
def test_the_names_of_studies_are_completed(trialyard: Call, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    trialyard("create", "digits")
    trialyard("create", "digits", "--name", "mine")
    assert _completed("trialyard show ", trialyard, monkeypatch) == ("digits\nmine\n", "")
    assert _completed("trialyard import ", trialyard, monkeypatch) == ("digits\nmine\n", "")
    assert _completed("trialyard show di", trialyard, monkeypatch) == ("digits\n", "")
    assert _completed(f"trialyard best --storage sqlite:///{home}/none.db ", trialyard, monkeypatch)[1] == ""


@pytest.mark.usefixtures("quiet")
def test_completion_is_silent_where_no_database_answers(
    trialyard: Call, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    assert _completed("trialyard show ", trialyard, monkeypatch) == ("\n", "")
    assert not (home / "yard").exists(), "to look for names creates no database"
    asked, over = threading.Event(), threading.Event()

    def slow(storage: str | None) -> list[str]:
        asked.set()
        over.wait(60)
        return ["late"]

    monkeypatch.setattr(registry, "names", slow)
    monkeypatch.setattr(completion, "SECONDS", 0.5)
    assert _completed("trialyard show ", trialyard, monkeypatch) == ("\n", "")
    assert asked.is_set()
    over.set()


def test_completion_can_be_installed(tmp_path: Path) -> None:
    # A test has no shell that could be asked for its name.
    variables = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "search.program", "--install-completion", "bash"]
    subprocess.run(command, env=variables, check=True, capture_output=True, timeout=120)
    script = (tmp_path / ".bash_completions" / "trialyard.sh").read_text(encoding="utf-8")
    assert "_TRIALYARD_COMPLETE=complete_bash" in script


def _processor_seconds(*arguments: str) -> float:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=120)
    return used() - before


def test_help_takes_hardly_longer_than_its_libraries() -> None:
    libraries = min(_processor_seconds("-c", "import typer, rich") for _ in range(5))
    own = min(_processor_seconds("-m", "search.program", "--help") for _ in range(5))
    assert own <= 1.5 * libraries
