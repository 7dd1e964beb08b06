"""Reads the function `build` of a user's Keras script, without running it: its parameters become hyperparameters."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import model_rules
from studies.errors import DefinitionError

FUNCTION = "build"
NOT_SEARCHED = ("seed", "random_state", "verbose", "epochs")  # they keep the script's values
SHAPE, CLASSES = ("image_shape", "input_shape", "shape"), ("classes", "num_classes", "n_classes")


@dataclass(frozen=True, kw_only=True)
class Script:
    """The function `build` of a script."""

    module: str  # as it is imported
    hyperparameters: Mapping[str, Any]  # each with its default
    # How the function is called with the shape of the images and the number of classes: by these parameters. None: it
    # is called as Trialyard calls a user's own model, and needs nothing between.
    adapter: Mapping[str, str] | None


def read(file: Path) -> Script:
    """The function `build` of the script `file`. Raises DefinitionError if there is none, or it cannot be used."""
    tree = _parsed(file)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    function = functions.get(FUNCTION)
    if function is None:
        known = f"only {', '.join(functions)}" if functions else "no function at all"
        raise DefinitionError(
            f"{file} has no function `{FUNCTION}`, {known}: put the lines that make the model into `def {FUNCTION}` "
            "with a parameter for each hyperparameter, such as dropout=0.3, and return the model"
        )
    line = next(_trainings(tree), None)
    if line is not None:
        raise DefinitionError(
            f'{file} trains when it is imported (line {line}): put that under `if __name__ == "__main__":`'
        )
    required, defaults = _parameters(function)
    if len(required) == 3 and required[1] in SHAPE and required[2] in CLASSES:
        found = dict(_read_from(function, required[0]))
        without = next((name for name in _indices(function, required[0]) if name not in found), None)
        if without is not None or not found:
            example = f'{required[0]}.get("{without or "units"}", 64)'
            what = "no hyperparameter" if without is None else f"the hyperparameter {without} without a default"
            raise DefinitionError(
                f"{FUNCTION} in {file} reads {what}, so nothing is known to search around: write {example}"
            )
        adapter = None
    else:
        if function.args.posonlyargs:
            raise DefinitionError(
                f"the parameter {function.args.posonlyargs[0].arg} of {FUNCTION} in {file} can be given by position "
                "only, and parameters are given by name: remove the `/`"
            )
        adapter = {name: "image_shape" for name in (*required, *defaults) if name in SHAPE}
        adapter |= {name: "classes" for name in (*required, *defaults) if name in CLASSES}
        unknown = [name for name in required if name not in adapter]
        if unknown:
            raise DefinitionError(
                f"the parameter {unknown[0]} of {FUNCTION} in {file} has no default, so no value of it is known: give "
                f"it one, such as {unknown[0]}=32"
            )
        found = {name: value for name, value in defaults.items() if name not in adapter}
    usable = {name: value for name, value in found.items() if _is_usable(name, value)}
    if not any(isinstance(value, (int, float)) for value in usable.values()):
        raise DefinitionError(
            f"{FUNCTION} in {file} has no hyperparameter to search: give it parameters with numbers or true and false "
            "as defaults, such as dropout=0.3"
        )
    return Script(module=file.stem, hyperparameters=usable, adapter=adapter)


def _parsed(file: Path) -> ast.Module:
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise DefinitionError(f"{file} must be a Python file whose name can be imported, such as train.py: rename it")
    try:
        return ast.parse(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DefinitionError(f"{file} cannot be read ({reason}): give the path of a Keras script") from None
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DefinitionError(f"{file} is not valid Python ({error}): correct it") from None


def _trainings(tree: ast.Module) -> Iterator[int]:
    """The lines of calls of ``.fit(...)`` that an import runs."""
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fit":
                yield node.lineno


def _parameters(function: ast.FunctionDef) -> tuple[list[str], dict[str, Any]]:
    """The names of the parameters without a default, and the others with theirs."""
    arguments = function.args
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    defaults = dict(zip(with_default, map(_literal, arguments.defaults), strict=True))
    required = [name for name in positional if name not in defaults]
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None:
            required.append(each.arg)
        else:
            defaults[each.arg] = _literal(default)
    return required, defaults


def _read_from(function: ast.FunctionDef, mapping: str) -> Iterator[tuple[str, Any]]:
    """What the function reads from its parameter `mapping` with a default: ``mapping.get("units", 64)``."""
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == mapping
            and len(node.args) == 2
            and isinstance(name := _literal(node.args[0]), str)
        ):
            yield name, _literal(node.args[1])


def _indices(function: ast.FunctionDef, mapping: str) -> Iterator[str]:
    """The names that the function reads from `mapping` without a default: ``mapping["units"]``."""
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name)
            and node.value.id == mapping
            and isinstance(name := _literal(node.slice), str)
        ):
            yield name


def _literal(node: ast.expr) -> Any:
    """The value that is written there; None if it must be computed."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_usable(name: str, value: Any) -> bool:
    """Whether a definition may have this hyperparameter: a number or a text that keeps the rules of the training."""
    rule = model_rules.TRAINING.get(name)
    if name in NOT_SEARCHED or not name.isascii():
        return False
    return isinstance(value, (bool, int, float, str)) and not (rule and rule.broken_by(value))
