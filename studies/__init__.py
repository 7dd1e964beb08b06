"""What is searched for, and what came out. Importing it never imports Keras.

>>> import studies
>>> studies.names()
['digits']
>>> studies.best_trial("digits").params
{'depth': ..., 'dropout': ...}

The examples of these docstrings are run as tests, on a study `digits` of two trials.
"""

from studies.exports import export
from studies.imported import import_trials
from studies.registry import delete, names, open, pause, resume, stop
from studies.report import report
from studies.results import (
    Curve,
    Row,
    Status,
    attempts,
    best_model,
    best_trial,
    curves,
    leaderboard,
    status,
    statuses,
    workers,
)

__all__ = [
    "Curve",
    "Row",
    "Status",
    "attempts",
    "best_model",
    "best_trial",
    "curves",
    "delete",
    "export",
    "import_trials",
    "leaderboard",
    "names",
    "open",
    "pause",
    "report",
    "resume",
    "status",
    "statuses",
    "stop",
    "workers",
]
