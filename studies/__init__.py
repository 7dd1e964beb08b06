"""Definitions, studies and their results. Importing this package never imports Keras.

>>> import studies
>>> studies.names()
['digits']
>>> studies.best_trial("digits").params
{'depth': ..., 'dropout': ...}

The examples in these docstrings are tests. They run on a study `digits` with two trials.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studies.additions import enqueue, retry
    from studies.comparison import NotebookRow, StudyComparison, compare, compare_notebook
    from studies.confirmation import Comparison, Confirmed, Estimate, confirmed
    from studies.exports import export
    from studies.figures import figure
    from studies.imported import import_trials
    from studies.registry import delete, names, open, pause, resume, set_priority, stop
    from studies.rendering import report
    from studies.results import (
        Curve,
        Row,
        Status,
        attempts,
        best_model,
        best_trial,
        class_names,
        curves,
        leaderboard,
        status,
        statuses,
        workers,
    )
    from studies.trial_records import TrialDetails, TrialRecord, dataframe, trial, trials

__all__ = [
    "Comparison",
    "Confirmed",
    "Curve",
    "Estimate",
    "NotebookRow",
    "Row",
    "Status",
    "StudyComparison",
    "TrialDetails",
    "TrialRecord",
    "attempts",
    "best_model",
    "best_trial",
    "class_names",
    "compare",
    "compare_notebook",
    "confirmed",
    "curves",
    "dataframe",
    "delete",
    "enqueue",
    "export",
    "figure",
    "import_trials",
    "leaderboard",
    "names",
    "open",
    "pause",
    "report",
    "resume",
    "retry",
    "set_priority",
    "status",
    "statuses",
    "stop",
    "trial",
    "trials",
    "workers",
]

# At the first use, from these modules: most commands need one of them.
_MODULES = {
    "studies.additions": ("enqueue", "retry"),
    "studies.comparison": (
        "NotebookRow",
        "StudyComparison",
        "compare",
        "compare_notebook",
    ),
    "studies.confirmation": (
        "Comparison",
        "Confirmed",
        "Estimate",
        "confirmed",
    ),
    "studies.exports": ("export",),
    "studies.figures": ("figure",),
    "studies.imported": ("import_trials",),
    "studies.registry": (
        "delete",
        "names",
        "open",
        "pause",
        "resume",
        "set_priority",
        "stop",
    ),
    "studies.rendering": ("report",),
    "studies.results": (
        "Curve",
        "Row",
        "Status",
        "attempts",
        "best_model",
        "best_trial",
        "class_names",
        "curves",
        "leaderboard",
        "status",
        "statuses",
        "workers",
    ),
    "studies.trial_records": (
        "TrialDetails",
        "TrialRecord",
        "dataframe",
        "trial",
        "trials",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
