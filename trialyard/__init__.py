"""Trialyard from Python: ``import trialyard as ty``. Importing it imports no Keras.

>>> import trialyard as ty
>>> ty.best_trial("digits").params
{'depth': ..., 'dropout': ...}

It has `search`, for a function and arrays in hand, and all functions of the packages `search` (to run studies) and
`studies` (to read and control them). Each mistake raises a `TrialyardError` with one sentence that says what to do.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trialyard import packages

packages.load()  # before anything else is imported: a user's folder may have modules of these names

import search as _search  # noqa: E402
import studies as _studies  # noqa: E402

if TYPE_CHECKING:
    from search import *  # noqa: F403
    from storage.errors import TrialyardError
    from studies import *  # noqa: F403
    from trialyard.hyperparameters import log
    from trialyard.search_result import Result
    from trialyard.searching import search

# At the first use, from these modules.
_MODULES = {
    "Result": "trialyard.search_result",
    "TrialyardError": "storage.errors",
    "log": "trialyard.hyperparameters",
    "search": "trialyard.searching",
}

__all__ = ["Result", "TrialyardError", "log", "search"]
__all__ += _search.__all__
__all__ += _studies.__all__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in _search.__all__:
        value = getattr(_search, name)
    elif name in _studies.__all__:
        value = getattr(_studies, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
