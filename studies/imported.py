"""Imports results of trials that were run by hand or by another program."""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from storage import ledger
from storage.errors import nearest
from storage.ledger import Imported
from studies import registry
from studies.definition import Definition, from_json
from studies.errors import StudyError
from studies.model_rules import Number, OneOf, Rule
from studies.registry import StorageLike
from studies.space import Choice, Int, Parameter, broken_rule, in_order, values_text

_SHARE = Number(low=0.0, high=1.0)

# The columns besides the hyperparameters. `accuracy` is required; the others are optional, and become user attributes.
COLUMNS: Mapping[str, Rule | None] = {
    "accuracy": _SHARE,  # on the images that the study judges by; becomes the trial's value
    "loss": Number(low=0.0),
    "train_accuracy": _SHARE,
    "seconds": Number(low=0.0),
    "parameters": Number(low=0, whole=True),
    "protocol": OneOf(values=("validation", "test")),
    "label": None,
    "source": None,
}


def import_trials(name: str, rows: Iterable[Mapping[str, Any]] | str | Path, storage: StorageLike = None) -> int:
    """Imports results obtained elsewhere into study `name`, as complete trials; returns how many were new.

    `rows` is a sequence of mappings, or the path of a CSV file. A row has the hyperparameters that the study searches
    (those that do not apply are empty or left out), ``accuracy`` from 0 to 1, and optionally more of `COLUMNS`. All
    rows are imported, or none. Samplers learn from the imported trials (but not cmaes and nsga2), the budget grows by
    their number, and they are marked ``imported`` in their user attributes. The same rows again add nothing.

    >>> studies.import_trials("digits", [{"depth": 3, "dropout": 0.2, "accuracy": 0.97}])
    1

    Raises StudyError if there is no such study, or a row does not fit its definition.
    """
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    definition = from_json(study.definition)
    if definition.confirm is not None:
        raise StudyError(f"study {name!r} is a confirmation: its result must come from its own trainings")
    labelled_rows = read_csv(Path(rows)) if isinstance(rows, (str, Path)) else _numbered(rows)
    trials = [trial_of(row, definition, label) for label, row in labelled_rows]
    if not trials:
        raise StudyError(f"there is no row to import into study {name!r}: give at least one")
    return ledger.import_trials(opened, study, trials)


def trial_of(row: Mapping[str, Any], definition: Definition, where: str) -> Imported:
    """The trial that a row describes. Raises StudyError whose message starts with `where`."""
    given = {key: value for key, value in row.items() if not _is_empty(value)}
    known = [*definition.space, *definition.fixed, *COLUMNS]
    for key in given:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise StudyError(f"{where}: study {definition.name!r} has no column {key!r}{hint}")
    for key, value in definition.fixed.items():
        if key in given and _read_as(given[key], Choice(choices=(value,))) != value:
            raise StudyError(
                f"{where}: {key} = {_shown(given[key])}, and study {definition.name!r} fixes it at "
                f"{values_text([value])}: import the row into a study that searches {key}"
            )
    point: dict[str, Any] = {}
    for key in in_order(definition.space):
        parameter = definition.space[key]
        if parameter.applies(point):
            point[key] = _hyperparameter(key, given.get(key), parameter, where)
        elif key in given:
            raise StudyError(
                f"{where}: {key} = {_shown(given[key])} does not apply, as space.{key}.when says: leave it empty"
            )
    if "accuracy" not in given:
        raise StudyError(f"{where} has no accuracy: give it as a number from 0 to 1")
    rest = {key: _fact(key, given[key], rule, where) for key, rule in COLUMNS.items() if key in given}
    accuracy = float(rest.pop("accuracy"))
    judged_on = definition.judged_on
    if rest.get("protocol", judged_on) != judged_on:
        raise StudyError(
            f"{where}: protocol = {_shown(rest['protocol'])}, and study {definition.name!r} judges its trials on "
            f"{judged_on} images, so they cannot be compared: import the row into a study that scores on these"
        )
    return Imported(
        value=accuracy,
        params={key: (definition.space[key].distribution(), value) for key, value in point.items()},
        attributes={"protocol": judged_on, **rest},
    )


def _is_empty(value: Any) -> bool:
    """Whether a cell is empty; pandas says NaN there."""
    is_nan = isinstance(value, (float, np.floating)) and math.isnan(value)
    return value is None or is_nan or str(value).strip() in ("", "<NA>", "NaT")


def _hyperparameter(key: str, raw: Any, parameter: Parameter, where: str) -> Any:
    if raw is None:
        raise StudyError(f"{where} has no {key!r}, which the study searches: give its value")
    value = _read_as(raw, parameter)
    broken = broken_rule(parameter, value)
    if broken:
        raise StudyError(f"{where}: {key} = {_shown(raw)} {broken}, as space.{key} says")
    return value


def _fact(key: str, raw: Any, rule: Rule | None, where: str) -> Any:
    if rule is None:
        return str(raw)[:1000]
    value = _number(raw, whole=isinstance(rule, Number) and rule.whole) if isinstance(rule, Number) else raw
    broken = rule.broken_by(value)
    if not broken and isinstance(value, float) and not math.isfinite(value):
        broken = "must be a finite number"
    if broken:
        hint = ": 99.3 % is 0.993" if rule is _SHARE and isinstance(value, (int, float)) and value > 1 else ""
        raise StudyError(f"{where}: {key} = {_shown(raw)} {broken}{hint}")
    return value


def _read_as(raw: Any, parameter: Parameter) -> Any:
    """The value that a cell of a table means; the cell itself if it is not a valid value."""
    if hasattr(raw, "item"):  # a NumPy number
        raw = raw.item()
    if isinstance(parameter, Choice):
        text = str(raw).strip()
        same = [c for c in parameter.choices if values_text([c]).strip('"') == text or str(c) == text]
        if same or not isinstance(raw, (str, int, float)) or isinstance(raw, bool):
            return same[0] if same else raw
        number = _number(raw, whole=False)
        numeric = (c for c in parameter.choices if isinstance(c, (int, float)) and not isinstance(c, bool))
        return next((choice for choice in numeric if choice == number), raw)
    number = _number(raw, whole=isinstance(parameter, Int))
    # `dropout = 0` means 0.0 if dropout is a float.
    return float(number) if type(number) is int and not isinstance(parameter, Int) else number


def _number(raw: Any, *, whole: bool) -> Any:
    if hasattr(raw, "item"):
        raw = raw.item()
    if not isinstance(raw, (str, float)):
        return raw
    try:
        number = float(raw)
    except ValueError:
        return raw
    # A table with empty cells has 5.0 for 5.
    return int(number) if whole and number.is_integer() else number


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:90]}..."


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for index, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise StudyError(f"row {index} is a {type(row).__name__}, and must be a mapping from columns to values")
        yield f"row {index}", row


def read_csv(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a CSV file, each with its place in the file for messages. Raises StudyError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True, restkey="(beyond the last column)")
            columns = [str(column).strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            if len(columns) == 1 and re.search(r"[;\t]", columns[0]):
                raise StudyError(f"{path} has only the column {columns[0]!r}: separate the columns by commas")
            duplicate = next((column for column in columns if columns.count(column) > 1), None)
            if duplicate is not None:
                raise StudyError(f"{path} has the column {duplicate!r} twice: keep one")
            return [(f"{path}, line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): give the path of a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise StudyError(
            f"{path} is not a CSV file in UTF-8 ({error}): write a line of column names, then one line per row"
        ) from None
