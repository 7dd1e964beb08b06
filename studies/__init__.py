"""What is searched for, and what came out. Importing it never imports Keras.

>>> import studies
>>> studies.names()                                   # doctest: +SKIP
['digits']
>>> studies.best_trial("digits").params               # doctest: +SKIP
{'depth': 3, 'dropout': 0.25}
"""

from studies.queries import Row, Status, best_trial, leaderboard, status, workers
from studies.registry import names, open, pause, resume, stop

__all__ = [
    "Row",
    "Status",
    "best_trial",
    "leaderboard",
    "names",
    "open",
    "pause",
    "resume",
    "status",
    "stop",
    "workers",
]
