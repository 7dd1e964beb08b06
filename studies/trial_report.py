"""The report of one trial, as data and in Markdown: parameters, curve, predictions, attempts, the end of its log."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage import settings
from storage.attempt_table import Attempt
from storage.errors import many
from storage.metric import epochs_judged_on
from studies import definition as definitions
from studies import findings, predictions, registry, results, trial_records
from studies.definition import Definition
from studies.predictions import Answered, class_name, class_names
from studies.registry import StorageLike
from studies.results import Curve
from studies.text import Section, bullets, escaped, fenced, paragraphs, rows_text
from studies.trial_records import TrialDetails

MOST_EPOCHS = 200  # rows of the table of epochs: the first ones of a longer training are left out
MOST_CLASSES = 50  # rows of the table of classes
# What is said elsewhere in the report, or belongs to the whole study.
NOT_SHOWN = ("history", "model", "predictions", "protocol", "failure", "repeats", "deviation", "epochs", "seconds")


@dataclass(frozen=True, kw_only=True)
class TrialContent:
    """Everything that the report of one trial says, before it is rendered."""

    details: TrialDetails
    definition: Definition
    answered: Answered | None  # what its model answered; None if this machine does not have its file
    class_names: list[str]  # of the images; empty if the data have only numbers
    made: datetime


def collect(name: str, number: int, storage: StorageLike = None, artifacts: str | Path | None = None) -> TrialContent:
    """The content of a report of trial `number` of study `name`; files are read from `artifacts`.

    Raises StudyError if there is no such study or trial.
    """
    opened = registry.storage_of(storage)
    store = settings.load(artifacts=artifacts).artifact_store
    study = registry.find(name, opened)
    details = trial_records.trial(name, number, opened, artifacts)
    names = class_names(study.data)
    found = predictions.of_trial(results.trial_of(study, number, opened), store)
    return TrialContent(
        details=details,
        definition=definitions.from_json(study.definition),
        answered=None if found is None else Answered(trial=number, predictions=found, class_names=names),
        class_names=names,
        made=datetime.now().astimezone(),
    )


def report(content: TrialContent) -> str:
    """The whole report."""
    parts = [f"# {title(content)}", head(content)]
    for section in sections(content):
        parts += [f"## {section.title}", section.body]
    return paragraphs(parts) + "\n"


def title(content: TrialContent) -> str:
    """The title, escaped."""
    return escaped(f"Trial {content.details.record.number} of {content.details.study}")


def head(content: TrialContent) -> str:
    """The first paragraph: what became of the trial, and its score."""
    record, attrs = content.details.record, content.details.attributes
    rank = "" if record.rank is None else f", rank {record.rank}"
    is_complete, definition = record.state in ("complete", "imported"), content.definition
    images = definition.judged_on if is_complete else epochs_judged_on(definition.protocol)
    score = "" if record.score is None else f"; {images} accuracy **{record.score_text}**"
    epochs = "" if record.epochs is None else f", after {many(record.epochs, 'epoch')}"
    reason = "" if record.reason is None else f" ({escaped(record.reason)})"
    lines = [f"**{record.state}**{rank}{reason}{score}{epochs}."]
    if attrs.get("imported") is True:
        lines.append("It was imported, not run here.")
    return paragraphs(lines)


def sections(content: TrialContent) -> list[Section]:
    """What follows the head, in its order."""
    details, definition = content.details, content.definition
    parameters = [[name, findings.value_text(value)] for name, value in details.record.params.items()]
    parameters += [[name, f"fixed: {findings.value_text(value)}"] for name, value in definition.fixed.items()]
    recorded = [[name, _recorded(value)] for name, value in details.attributes.items() if name not in NOT_SHOWN]
    made = f"Made {content.made:%Y-%m-%d %H:%M %z} by Trialyard {version('trialyard')}."
    every = [
        Section(
            name="hyperparameters",
            title="Hyperparameters",
            body=rows_text(["hyperparameter", "value"], parameters) if parameters else "",
        ),
        Section(name="curve", title="Learning curve", body=_curve(details.curve, definition)),
        Section(name="predictions", title="Predictions", body=_predictions(content.answered)),
        Section(name="attempts", title="Attempts", body=_attempts(details.attempts)),
        Section(name="log", title="The end of its log", body=fenced("\n".join(details.log)) if details.log else ""),
        Section(name="files", title="Files on this machine", body=bullets(map(str, details.files))),
        Section(
            name="recorded",
            title="Recorded",
            body=paragraphs([*([rows_text(["what", "value"], recorded)] if recorded else []), made]),
        ),
    ]
    return [section for section in every if section.body]


def _curve(curve: Curve, definition: Definition) -> str:
    """A row for each epoch; for each repeat if there are several, and the history is not on this machine."""
    step = "repeat" if definition.budget.repeats > 1 and not curve.val_loss else "epoch"
    judged = epochs_judged_on(definition.protocol)
    columns = {
        "loss": curve.loss,
        "accuracy": curve.accuracy,
        f"{judged} loss": curve.val_loss,
        f"{judged} accuracy": curve.val_accuracy,
    }
    known = {name: values for name, values in columns.items() if values}
    steps = max(map(len, known.values()), default=0)
    first = max(0, steps - MOST_EPOCHS)
    rows = [[str(at + 1), *(_number(values[at]) for values in known.values())] for at in range(first, steps)]
    left_out = [f"The first {many(first, step)} are left out."] if first else []
    return paragraphs([rows_text([step, *known], rows, right=True), *left_out]) if rows else ""


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _predictions(answered: Answered | None) -> str:
    """The accuracy of each class, the worst first, and the most certain mistakes."""
    if answered is None:
        return ""
    found, names = answered.predictions, answered.class_names
    by_class = sorted(
        (accuracy, number) for number, accuracy in enumerate(found.accuracy_by_class) if accuracy is not None
    )
    rows = []
    for accuracy, number in by_class[:MOST_CLASSES]:
        wrong = found.counts[number].copy()
        wrong[number] = 0
        often = f"{class_name(int(wrong.argmax()), names)} ({wrong.max()})" if wrong.any() else ""
        images = found.counts[number].sum()
        rows.append(
            [class_name(number, names), str(images), str(found.counts[number, number]), f"{accuracy:.4f}", often]
        )
    titles = ["class", f"{found.judged_on} images", "right", "accuracy", "most often taken for"]
    parts = [rows_text(titles, rows)]
    if len(by_class) > MOST_CLASSES:
        parts.append(f"These are the worst {MOST_CLASSES} of {len(by_class)} classes.")
    mistakes = [
        [str(index), class_name(true, names), class_name(predicted, names), f"{probability:.2f}"]
        for index, true, predicted, probability in zip(
            found.index, found.true, found.predicted, found.probability, strict=True
        )
    ]
    if mistakes:
        parts.append("The most certain mistakes, by the image's number:")
        parts.append(rows_text(["image", "class", "answer", "probability"], mistakes))
    return paragraphs(parts)


def _attempts(attempts: tuple[Attempt, ...]) -> str:
    rows = [
        [
            str(attempt.attempt),
            f"{attempt.owner.slot} of {attempt.owner.host}",
            _moment(attempt.began),
            "" if attempt.resumed_after is None else str(attempt.resumed_after),
            str(attempt.epoch),
            "runs" if attempt.ended is None else _moment(attempt.ended),
            ": ".join(filter(None, (attempt.outcome, attempt.reason))),
        ]
        for attempt in attempts
    ]
    titles = ["attempt", "slot", "began", "went on after epoch", "last epoch", "ended", "outcome"]
    return rows_text(titles, rows) if rows else ""


def _moment(moment: datetime) -> str:
    return moment.replace(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _recorded(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
