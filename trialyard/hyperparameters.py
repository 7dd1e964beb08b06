"""The search space in Python's own notation: each form is one of a definition.

| Python | TOML |
|---|---|
| ``[3, 5, 7]`` | ``{ choices = [3, 5, 7] }`` |
| ``(0.0, 0.7)`` | ``{ low = 0.0, high = 0.7 }`` |
| ``(0.0, 0.7, 0.1)`` | ``{ low = 0.0, high = 0.7, step = 0.1 }`` |
| ``log(1e-4, 1e-2)`` | ``{ low = 1e-4, high = 1e-2, log = true }`` |
| a dict | the same table, also with ``when`` |
"""

from collections.abc import Mapping
from typing import Any

from studies.errors import DefinitionError
from studies.wording import shown

FORMS = (
    "a list of choices, a pair (low, high), a triple (low, high, step), trialyard.log(low, high), or a dict with the "
    "keys of a definition"
)


def log(low: float, high: float) -> dict[str, Any]:
    """The range from `low` to `high`, uniform in the logarithm: of whole numbers if both are whole.

    >>> log(1e-4, 1e-2)
    {'low': 0.0001, 'high': 0.01, 'log': True}
    """
    return {"low": low, "high": high, "log": True}


def tables(space: Mapping[str, Any]) -> dict[str, Any]:
    """`space` as the tables of a definition.

    >>> tables({"depth": [3, 5], "dropout": (0.0, 0.7), "width": (1, 9, 2)})
    {'depth': {'choices': [3, 5]}, 'dropout': {'low': 0.0, 'high': 0.7}, 'width': {'low': 1, 'high': 9, 'step': 2}}

    Raises DefinitionError if a hyperparameter has none of these forms. The ranges themselves are not checked.
    """
    if not isinstance(space, Mapping):
        raise DefinitionError(
            f"space must be a dict from names to values, and is a {type(space).__name__}: see {FORMS}"
        )
    return {str(name): _table(f"space[{name!r}]", form) for name, form in space.items()}


def plain(value: Any) -> Any:
    """`value` with NumPy's numbers as Python's, in lists and dicts, too.

    >>> import numpy
    >>> plain({"dropout": numpy.float64(0.5)})
    {'dropout': 0.5}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.item() if hasattr(value, "dtype") and getattr(value, "shape", None) == () else value


def _table(key: str, form: Any) -> dict[str, Any]:
    if isinstance(form, Mapping):
        table: dict[str, Any] = plain(form)
        return table
    if isinstance(form, list):
        return {"choices": plain(form)}
    if isinstance(form, tuple) and len(form) in (2, 3):
        return dict(zip(("low", "high", "step"), plain(form), strict=False))
    raise DefinitionError(f"{key} = {shown(form)} must be {FORMS}")
