"""What is searched for, and what came out. Importing it never imports Keras.

>>> import studies
>>> studies.names()
['digits']
>>> studies.best_trial("digits").params
{'depth': ..., 'dropout': ...}

The examples of these docstrings are run as tests, on a study `digits` of two trials.
"""

from studies.exports import export
from studies.queries import Row, Status, best_model, best_trial, leaderboard, status, workers
from studies.registry import delete, names, open, pause, resume, stop

__all__ = [
    "Row",
    "Status",
    "best_model",
    "best_trial",
    "delete",
    "export",
    "leaderboard",
    "names",
    "open",
    "pause",
    "resume",
    "status",
    "stop",
    "workers",
]
