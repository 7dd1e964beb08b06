"""What is searched for, and what came out. Importing it never imports Keras.

>>> import studies
>>> studies.names()                                   # doctest: +SKIP
['digits']
>>> studies.best_trial("digits").params               # doctest: +SKIP
{'depth': 3, 'dropout': 0.25}
"""

from studies.imported import import_trials
from studies.queries import Curve, Row, Status, best_trial, curves, leaderboard, status, workers
from studies.registry import names, open, pause, resume, stop
from studies.report import report

__all__ = [
    "Curve",
    "Row",
    "Status",
    "best_trial",
    "curves",
    "import_trials",
    "leaderboard",
    "names",
    "open",
    "pause",
    "report",
    "resume",
    "status",
    "stop",
    "workers",
]
