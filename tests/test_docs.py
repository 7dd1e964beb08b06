"""The documentation is true: its commands exist, its definitions are right, its links lead somewhere, and nothing is
missing.
"""

import ast
import doctest
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from search.cli import app
from storage.settings import Settings
from studies import definition as definitions
from studies import notebook, space

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
}
README, COMMANDS_PAGE = PAGES["README.md"], PAGES["docs/commands.md"]
README_LINES = 150  # what a newcomer reads in three minutes
PICTURE_BYTES = 200_000


def _blocks(language: str) -> list[Any]:
    """The code blocks in `language` of all pages, each as a parameter that is named after its page."""
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    ]


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


# --- commands ---------------------------------------------------------------------------------------------


def _commands(group: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    commands: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            commands |= _commands(command, (*prefix, name))
        else:
            commands[(*prefix, name)] = command
    return commands


PROGRAM = typer.main.get_command(app)
COMMANDS = _commands(PROGRAM)


def _section(name: tuple[str, ...]) -> str:
    """The section of docs/commands.md about a command."""
    heading = rf"^### `trialyard {' '.join(name)}[ `].*?$(.*?)(?=^##|\Z)"
    section = re.search(heading, COMMANDS_PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/commands.md has no section `trialyard {' '.join(name)}`"
    return section[1]


def _shared_options() -> dict[str, str]:
    """The table of shared options: option -> the commands that have it."""
    table = COMMANDS_PAGE.partition("### Shared options")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines() if line.startswith("| `--")]
    return {cells[1].split()[0].strip("`"): cells[2].strip() for cells in rows}


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help_and_is_documented(name: tuple[str, ...]) -> None:
    command, section, shared = COMMANDS[name], _section(name), _shared_options()
    assert command.help
    for parameter in command.params:
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), parameter.name
        for option in parameter.opts:
            if not option.startswith("--") or option in section:
                continue
            commands = shared.get(option, "")
            assert f"`{' '.join(name)}`" in commands or commands.startswith("all but"), option


def test_the_program_s_own_options_are_documented() -> None:
    for parameter in PROGRAM.params:
        for option in parameter.opts:
            assert f"`trialyard {option}" in COMMANDS_PAGE or f"`{option}`" in COMMANDS_PAGE, option


def test_no_section_describes_a_command_that_does_not_exist() -> None:
    for title in re.findall(r"^### `trialyard (.*?)`$", COMMANDS_PAGE, re.MULTILINE):
        words = tuple(title.split())
        assert words[:2] in COMMANDS or words[:1] in COMMANDS, title


def _shown_commands() -> list[Any]:
    return [
        pytest.param(line, id=re.sub(r"\s+", " ", line.partition("#")[0]).strip())
        for block in _blocks("sh")
        for line in block.values[0].splitlines()
        if re.match(r"([A-Z_]+=\S+ )*trialyard ", line)
    ]


@pytest.mark.parametrize("line", _shown_commands())
def test_every_command_that_is_shown_can_be_given(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    assert words.pop(0) == "trialyard"
    name = tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])
    # Parsing alone: nothing is run.
    COMMANDS[name].make_context(" ".join(name), words[len(name) :])


def test_the_readme_shows_the_commands_of_a_first_hour() -> None:
    assert len(_shown_commands()) > 20
    for command in ("make demo", "make test", "trialyard run", "trialyard best", "trialyard dashboard"):
        assert command in README


# --- definitions, Python, settings, packages --------------------------------------------------------------


@pytest.mark.parametrize("text", _blocks("toml"))
def test_every_definition_that_is_shown_is_right(text: str) -> None:
    assert definitions.parse(text).space


def test_every_key_of_a_definition_is_shown_and_explained() -> None:
    page = PAGES["docs/definition.md"]
    (whole,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    shown = tomllib.loads(whole)
    tables = {
        "data": definitions.Data,
        "budget": definitions.Budget,
        "sampler": definitions.Sampler,
        "pruner": definitions.Pruner,
    }
    # `confirm` is written by the command of that name.
    assert definitions.Definition.model_fields.keys() - {"confirm"} <= shown.keys()
    for name, table in tables.items():
        assert table.model_fields.keys() <= shown[name].keys(), name
    used = {key for parameter in shown["space"].values() for key in parameter}
    for kind in (space.Float, space.Int, space.Choice):
        assert kind.model_fields.keys() <= used, kind.__name__


def test_every_sampler_and_pruner_is_explained() -> None:
    page = PAGES["docs/definition.md"]
    for kind in (definitions.SamplerKind, definitions.PrunerKind):
        for name in kind.__args__:
            assert f"`{name}`" in page, name


@pytest.mark.parametrize("text", _blocks("python"))
def test_python_that_is_shown_uses_what_exists(text: str) -> None:
    import studies
    import trialyard

    packages = {"studies": studies, "ty": trialyard}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            assert hasattr(packages[node.value.id], node.attr), node.attr


def test_the_search_from_python_is_explained() -> None:
    import trialyard

    for name in {"Result", "TrialyardError", "log", "search"} | {
        name for name in dir(trialyard.Result) if name[0] != "_"
    }:
        assert f"`{name}" in PAGES["docs/python.md"] or f"`ty.{name}" in PAGES["docs/python.md"], name


def test_every_function_of_the_package_is_explained() -> None:
    import studies

    for name in studies.__all__:
        if name[0].islower():
            assert f"`{name}(" in PAGES["docs/python.md"], name


def _variables() -> set[str]:
    """The variables that the program reads."""
    options = {parameter.envvar for command in COMMANDS.values() for parameter in command.params if parameter.envvar}
    return {f"TRIALYARD_{field.upper()}" for field in Settings.model_fields} | options


def test_every_setting_is_in_the_table_of_settings() -> None:
    listed = re.findall(r"^\| `(TRIALYARD_[A-Z_]+)` \|", PAGES["docs/settings.md"], re.MULTILINE)
    assert set(listed) == _variables()
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_no_setting_that_does_not_exist(page: str) -> None:
    compose = re.findall(r"TRIALYARD_[A-Z_]+[A-Z]", (ROOT / ".env.example").read_text(encoding="utf-8"))
    assert set(re.findall(r"TRIALYARD_[A-Z_]*[A-Z]", PAGES[page])) <= _variables() | set(compose)


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = [
        re.split(r"[\[<>=]", requirement)[0]
        for requirement in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    ]
    assert len(names) > 20
    for name in names:
        assert f"`{name}`" in PAGES["docs/dependencies.md"], name


# --- pages, links, pictures -------------------------------------------------------------------------------


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= README_LINES
    for page in ROOT.glob("docs/*.md"):
        assert f"](docs/{page.name})" in README, page.name


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_leads_somewhere(page: str) -> None:
    text = _without_code(PAGES[page])
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", _without_code(file.read_text(encoding="utf-8")), re.MULTILINE)
            assert fragment in map(_anchor, headings), target


def test_pictures_are_small_and_ask_no_host() -> None:
    folders = (ROOT / "docs" / "pictures", ROOT / "docs" / "img")
    pictures = [path for folder in folders for path in folder.iterdir() if path.suffix in (".png", ".svg")]
    assert len(pictures) >= 14
    everything = "".join(PAGES.values())
    for path in pictures:
        assert path.stat().st_size <= PICTURE_BYTES, path.name
        assert f"{path.parent.name}/{path.name}" in everything, f"no page shows {path.name}"
        if path.suffix == ".svg":
            hosts = set(re.findall(r"https?://([\w.]+)", path.read_text(encoding="utf-8")))
            assert hosts <= {"www.w3.org", "www.textualize.io"}, path.name  # a namespace and a comment


def test_the_demo_s_output_is_that_of_the_pictures() -> None:
    """`docs/make_pictures.py` writes both."""
    assert (ROOT / "docs" / "pictures" / "result.txt").read_text(encoding="utf-8") in README


def test_the_pictures_screen_shows_what_a_terminal_shows() -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    assert doctest.testmod(pictures).attempted == 3
    assert doctest.testmod(pictures).failed == 0


# What a code span of a page may name: a file or folder, and perhaps a function, a class or a test in it.
NAMED = re.compile(r"`((?:trialyard|search|studies|storage|tests|bench|deploy|docs|examples)/[\w./-]*)(?:::(\w+))?`")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_files_functions_and_tests_that_exist(page: str) -> None:
    for path, name in NAMED.findall(_without_code(PAGES[page])):
        file = ROOT / path
        assert file.exists(), path
        if name:
            source = file.read_text(encoding="utf-8")
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), f"{path}::{name}"


def test_the_architecture_names_the_test_of_every_promise() -> None:
    text = PAGES["docs/architecture.md"].partition("## What always holds")[2].partition("\n## ")[0]
    promises = re.split(r"^\*\*\d+\. ", text, flags=re.MULTILINE)[1:]
    numbers = [int(number) for number in re.findall(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(promises) + 1))
    for promise in promises:
        assert re.search(r"^- `tests/[\w/]+\.py::test_\w+`", promise, re.MULTILINE), promise


def test_every_function_that_runs_studies_is_explained_and_exists() -> None:
    import search

    for name in search.__all__:
        assert callable(getattr(search, name))
        if name[0].islower():
            assert f"`{name}(" in PAGES["docs/python.md"], name


def test_the_tables_of_the_notebook_page_are_those_of_its_record() -> None:
    """`docs/make_notebook.py` writes them from `docs/notebook.csv`, which has an epoch in every row."""
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "make_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    curves = pages.curves()
    assert set(curves) == {(result.source, result.label) for result in notebook.RESULTS} | {("mnist-cnn", "mnist-cnn")}
    assert {len(curve) for trainings in curves.values() for curve in trainings} == {12, 20}
    assert pages.filled(PAGES["docs/notebook.md"]) == PAGES["docs/notebook.md"]
