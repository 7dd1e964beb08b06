"""The README is true: its commands exist, its definitions are right, and nothing is left out of it."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from search.cli import app
from storage.settings import Settings
from studies import definition as definitions

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROOT = typer.main.get_command(app)


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _commands(group: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= _commands(command, (*prefix, name))
        else:
            found[(*prefix, name)] = command
    return found


COMMANDS = _commands(ROOT)


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help_and_the_readme_names_it(name: tuple[str, ...]) -> None:
    command = COMMANDS[name]
    assert command.help
    assert f"trialyard {' '.join(name)}" in README
    for parameter in command.params:
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), parameter.name
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in README, option


def _lines() -> list[str]:
    shell = "".join(_blocks("sh"))
    return [line for line in shell.splitlines() if re.match(r"([A-Z_]+=\S+ )*trialyard ", line)]


@pytest.mark.parametrize("line", _lines())
def test_every_command_that_the_readme_shows_can_be_given(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if "=" not in word]
    assert words.pop(0) == "trialyard"
    name = tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])
    # Parsing alone: nothing is run.
    COMMANDS[name].make_context(" ".join(name), words[len(name) :])


def test_the_readme_shows_commands_at_all() -> None:
    assert len(_lines()) > 5
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.parametrize("text", _blocks("toml"))
def test_every_definition_that_the_readme_shows_is_right(text: str) -> None:
    assert definitions.parse(text).space


def test_every_key_of_a_definition_is_explained() -> None:
    (text,) = _blocks("toml")
    for table in (
        definitions.Definition,
        definitions.Data,
        definitions.Budget,
        definitions.Sampler,
        definitions.Pruner,
    ):
        for key in table.model_fields:
            assert re.search(rf"\b{key}\b", text), f"{table.__name__}.{key}"


@pytest.mark.parametrize("text", _blocks("python"))
def test_the_readme_s_python_uses_what_is_there(text: str) -> None:
    import studies

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "studies":
            assert hasattr(studies, node.attr), node.attr


def test_every_setting_is_explained() -> None:
    for field in Settings.model_fields:
        assert f"TRIALYARD_{field.upper()}" in README


def test_every_dependency_is_explained() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.partition("dependencies = [")[2].partition("]\n")[0]
    names = re.findall(r'"([a-z0-9-]+)', listed)
    assert len(names) > 10
    for name in names:
        assert f"`{name}`" in README, name
