"""trialyard -> search -> studies -> storage: imports go one way, and no command imports Keras."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("trialyard", "search", "studies", "storage")  # each may import those after it
HEAVY = ("tensorflow", "keras", "jax", "torch")


def _imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, in functions too."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its package"
            packages.add((node.module or "").partition(".")[0])
    return packages


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    above = set(PACKAGES[: PACKAGES.index(package)])
    wrong = {str(path.relative_to(ROOT)): _imports(path) & above for path in files if _imports(path) & above}
    assert wrong == {}


# Each raises the cost of a new version of Optuna or its dashboard.
MAY_IMPORT_PRIVATE = {"search/dashboard.py", "storage/transactions.py", "storage/tables.py"}


def _private_imports(path: Path) -> set[str]:
    """The private modules of Optuna and its dashboard that a file imports, in functions too."""
    modules = {
        name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    return {name for name in modules if re.match(r"optuna(_dashboard)?(\.\w+)*\._", name)}


def test_three_files_import_private_modules_of_optuna_and_its_dashboard() -> None:
    files = [path for room in PACKAGES for path in (ROOT / room).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in files if _private_imports(path)} == MAY_IMPORT_PRIVATE


# `best_model` returns a Keras model. (A test below shows that importing the module does not import Keras.)
MAY_NAME_KERAS = {"studies/results.py", "studies/model_file.py", "studies/convert.py"}


def test_storage_and_studies_never_name_keras() -> None:
    for room in ("storage", "studies"):
        for path in (ROOT / room).rglob("*.py"):
            if str(path.relative_to(ROOT)) not in MAY_NAME_KERAS:
                assert not _imports(path) & set(HEAVY), path


def _loaded_by(code: str, folder: Path) -> list[str]:
    """Which of the heavy packages a fresh Python has imported after `code`."""
    tail = f"\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", code + tail], cwd=folder, capture_output=True, text=True, check=True, timeout=120
    )
    packages: list[str] = json.loads(result.stdout.splitlines()[-1])
    return packages


@pytest.mark.parametrize("module", ["studies", "trialyard"])
def test_importing_a_package_imports_no_keras(module: str, tmp_path: Path) -> None:
    assert _loaded_by(f"import {module}", tmp_path) == []


def test_a_command_without_figures_imports_no_plotly(home: Path) -> None:
    code = (
        "import sys, search.cli\n"
        "sys.argv = ['trialyard', 'create', 'digits']\n"
        "try:\n    search.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'plotly', 'optuna_dashboard', 'sklearn.ensemble'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.splitlines()[-1] == "[]"


COMMANDS = [
    ["catalog"],
    ["catalog", "digits"],
    ["init", "--data", "digits"],
    ["check", "small.toml"],
    ["create", "small.toml"],
    ["status"],
    ["status", "small", "--json"],
    ["leaderboard", "small"],
    ["enqueue", "small", "dropout=0.3"],
    ["trials", "small"],
    ["show", "small", "0"],
    ["retry", "small"],
    ["priority", "small", "2"],
    ["import", "notebook"],
    ["report", "small"],
    ["storage", "check"],
    ["storage", "prune"],
    ["delete", "small", "--yes"],
]


def test_a_command_imports_no_keras(home: Path, write_small: Callable[..., Path]) -> None:
    write_small()
    code = (
        "import sys, search.cli\n"
        f"for command in {[['create', 'small.toml'], *COMMANDS]!r}:\n"
        "    sys.argv = ['trialyard', *command]\n"
        "    try:\n"
        "        search.cli.main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, (command, end.code)\n"
        f"    assert not {set(HEAVY)!r} & set(sys.modules), command\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=home, stdout=subprocess.DEVNULL, check=True, timeout=240)


def test_the_check_for_heavy_packages_finds_one(tmp_path: Path) -> None:
    assert _loaded_by("import sys; sys.modules['keras'] = sys", tmp_path) == ["keras"]


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


def _modules_at_start(path: Path) -> set[str]:
    """Our own modules that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


def test_no_import_goes_in_a_circle() -> None:
    remaining = {name: _modules_at_start(path) for name, path in MODULES.items()}
    assert sum(map(len, remaining.values())) > 100
    while leaves := [name for name, imported in remaining.items() if not imported & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    assert remaining == {}


def test_no_two_files_differ_by_an_ending() -> None:
    stems = {path.stem for path in MODULES.values()}
    pairs = [(stem, stem + ending) for stem in stems for ending in ("s", "r", "er", "ing") if stem + ending in stems]
    assert pairs == []


def test_no_file_is_longer_than_600_lines() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 600} == {}


def test_help_imports_only_what_parses() -> None:
    text = (
        "import sys; sys.argv = ['trialyard', '--help']\nfrom search import program\n"
        "try:\n    program.main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('optuna', 'sqlalchemy', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", text], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "leaderboard" in done.stdout
