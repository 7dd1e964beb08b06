"""The result of a search: its best trial and model, and what a notebook shows of it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from studies import content, findings, results, text, trial_records
from studies.rows import Leaderboard, html

if TYPE_CHECKING:
    import keras
    import pandas

SECTIONS = ("found", "difference", "cautions", "failures")  # of the report, that a notebook shows
ROWS = 10  # of the leaderboard


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a study, read from the database whenever it is asked for. A notebook draws it."""

    name: str  # of the study
    # The database's URL; None: that of the settings. It may have a password, so `repr` leaves it out.
    storage: str | None = field(default=None, repr=False)

    @property
    def best_trial(self) -> FrozenTrial:
        """The complete trial with the highest accuracy. Raises StudyError if no trial is complete."""
        return results.best_trial(self.name, self.storage)

    def best_model(self) -> "keras.Model":
        """The trained model of the best trial, compiled. Raises StudyError if this machine does not have its file."""
        return results.best_model(self.name, self.storage)

    def leaderboard(self, top: int | None = None) -> Leaderboard:
        """The complete trials, the best first; only `top` of them, if given. Raises StudyError if the study is gone."""
        return results.leaderboard(self.name, self.storage, top)

    def dataframe(self) -> "pandas.DataFrame":
        """All trials as a table of pandas, a row each. Raises StudyError, also if pandas is not installed."""
        return trial_records.dataframe(self.name, self.storage)

    def __str__(self) -> str:
        best, status = self.best_trial, results.status(self.name, self.storage)
        return (
            f"{self.name}: {status.finished} of {status.budget} trials, the best is trial {best.number} with the "
            f"{status.protocol} accuracy {best.values[0]:.4f}: {findings.params_text(best.params)}"
        )

    def _repr_html_(self) -> str:
        report = content.collect(self.name, self.storage)
        parts = [f"### {text.escaped(self.name)}", text.head(report), text.leaderboard(report.rows[:ROWS])]
        if len(report.rows) > ROWS:
            parts.append(f"{len(report.rows) - ROWS:,} more are in `leaderboard()`.")
        for section in text.sections(report):
            if section.name in SECTIONS:
                parts += [f"#### {section.title}", section.body]
        return html("\n\n".join(parts))
