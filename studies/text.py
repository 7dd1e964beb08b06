"""A study in Markdown: the one text of its report, its page, its note in the dashboard and its report in the terminal.

All text that a user wrote is escaped.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from storage import attributes
from storage.artifacts import inside
from storage.errors import many, trials_text
from storage.ledger import left_waiting_text
from storage.metric import epochs_judged_on
from studies import advice, findings
from studies.definition import Definition, to_toml
from studies.statistics import Interval, holm, seeds_needed

if TYPE_CHECKING:
    from studies.comparison import NotebookRow, StudyComparison
    from studies.confirmation import Comparison, Confirmed
    from studies.content import Content
    from studies.results import Curve, Row

SHOWN_ROWS = 50  # of the leaderboard
LAYERS = 40  # lines of a model's summary that a note has, at most
IN_NOTE = (
    "found",
    "confirmed",
    "difference",
    "cautions",
    "searched",
    "definition",
)  # the sections that a note has, too


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the text under one title."""

    name: str
    title: str
    body: str  # Markdown


def report(content: "Content") -> str:
    """The whole report."""
    parts = [f"# {escaped(content.definition.name)}", head(content)]
    for section in sections(content):
        parts += [f"## {section.title}", section.body]
    return paragraphs(parts) + "\n"


def note(content: "Content") -> str:
    """The report without what the dashboard shows itself."""
    parts = [f"## {escaped(content.definition.name)}", head(content)]
    for section in sections(content):
        parts += [f"### {section.title}", section.body] if section.name in IN_NOTE else []
    return paragraphs(parts)


def head(content: "Content") -> str:
    """The first paragraphs: what the study is, and how far it is."""
    counts = content.counts
    by_state = ", ".join(
        f"{number} {state}"
        for state, number in (
            ("complete", counts.complete),
            ("pruned", counts.pruned),
            ("failed", counts.failed),
            ("running", counts.running),
            ("waiting", counts.waiting),
        )
    )
    is_spent = counts.finished >= content.budget
    is_out_of_time = content.has_ended and content.state == "open"
    progress = "has ended" if is_spent or is_out_of_time else f"is {content.state}"
    lines = [
        escaped(content.definition.description),
        f"**{counts.finished} of {many(content.budget, 'trial')}** ({by_state}); the study {progress}.",
    ]
    if is_spent and counts.waiting:
        lines.append(f"{left_waiting_text(counts.waiting)}.")
    return paragraphs(lines)


def sections(content: "Content") -> list[Section]:
    """What follows the head, in its order."""
    definition, found = content.definition, content.findings
    left_out = len(content.rows) - SHOWN_ROWS
    ranking = [leaderboard(content.rows[:SHOWN_ROWS])]
    ranking += [f"{left_out:,} more are in `trialyard leaderboard`."] if left_out > 0 else []
    searched = [[name, text] for name, text in advice.space_text(definition).items()]
    searched += [[name, f"fixed: {findings.value_text(value)}"] for name, value in definition.fixed.items()]
    environment = [[key, value] for key, value in content.environment.items()]
    made = f"Made {content.made:%Y-%m-%d %H:%M %z} by Trialyard {version('trialyard')}."
    every = [
        Section(name="found", title="What was found", body=bullets(found.best)),
        Section(
            name="confirmed",
            title="Confirmed on the test images",
            body="" if content.confirmed is None else confirmed(content.confirmed),
        ),
        Section(
            name="difference",
            title="What made the difference",
            body=bullets(found.influences) or "This is not known yet.",
        ),
        Section(
            name="cautions",
            title="What cannot be concluded",
            body=bullets(found.cautions) or "There are no cautions.",
        ),
        Section(name="leaderboard", title="Leaderboard", body=paragraphs(ranking)),
        Section(name="failures", title="Failures", body=bullets(content.failures)),
        Section(name="searched", title="Searched and fixed", body=rows_text(["hyperparameter", "values"], searched)),
        Section(name="definition", title="Definition", body=fenced(to_toml(definition).rstrip(), "toml")),
        Section(
            name="environment",
            title="Environment",
            body=paragraphs([rows_text(["item", "value"], environment), made]),
        ),
    ]
    return [section for section in every if section.body]


def confirmed(found: "Confirmed") -> str:
    """The result of a confirmation: its estimates, its comparisons, and what follows."""
    accuracies = [
        [
            str(each.trial),
            _accuracy(each.searched),
            _accuracy(each.mean),
            _accuracy(each.deviation),
            _accuracy(min(each.accuracies, default=None)),
            _accuracy(max(each.accuracies, default=None)),
            "" if each.parameters is None else f"{each.parameters:,}",
            "" if each.seconds is None else f"{each.seconds:.1f}",
        ]
        for each in found.estimates
    ]
    titles = ["trial", "in the search", "mean", "deviation", "lowest", "highest", "weights", "seconds"]
    intervals = [
        [str(each.trial), _interval(each.of_mean), _interval(each.of_new_seed), _interval(each.of_one_model)]
        for each in found.estimates
    ]
    images = "" if found.images is None else f" on {found.images:,} test images"
    parts = [
        escaped(
            f"Accuracies{images} of {many(found.seeds, 'training')} each, with {many(found.seeds, 'seed')}; the "
            "search's own was measured on validation images:"
        ),
        rows_text(titles, accuracies, right=True),
        "The 95 % intervals:",
        rows_text(["trial", "the mean over all seeds", "a new seed", "one model's sampling error"], intervals),
        bullets(_confirmed_sentences(found)),
    ]
    return paragraphs(parts)


def _confirmed_sentences(found: "Confirmed") -> list[str]:
    sentences = []
    for each in found.estimates:
        what = f"Trial {each.trial} ({findings.params_text(each.hyperparameters)}; {many(each.epochs, 'epoch')})"
        if each.shrinkage is not None:
            more = "less" if each.shrinkage >= 0 else "more"
            sentences.append(f"{what}: {abs(each.shrinkage):.4f} {more} than the search promised.")
    sentences += [_comparison(each) for each in found.comparisons]
    sentences += [
        f"Trial {each.trial} has no result: none of its trainings is complete."
        for each in found.estimates
        if each.mean is None and found.trained
    ]
    if found.trained < found.trainings:
        sentences.append(f"{found.trained} of {found.trainings} trainings are complete.")
    sentences += _too_few_seeds(found)
    if found.winner is not None:
        with_result = " that has a result" if any(each.mean is None for each in found.estimates) else ""
        sentences.append(
            f"The winner is trial {found.winner}: it is better than each other candidate{with_result} by more than "
            "chance explains."
        )
    elif found.tied:
        trials = ", ".join(map(str, found.tied))
        smallest_one = "" if found.smallest is None else f" The smallest of them is trial {found.smallest}."
        sentences.append(f"A tie: these measurements do not tell the trials {trials} apart.{smallest_one}")
    if found.openings > 1:
        sentences.append(
            f"These test images were opened by {found.openings} confirmations: what was chosen after the first one is "
            "not independent of them."
        )
    else:
        sentences.append("No other confirmation that this database knows of opened these test images.")
    if found.chosen_by:
        sentences.append(
            f"These studies chose by the test images: {', '.join(found.chosen_by)}. What was learned from them is not "
            "independent of these images."
        )
    return sentences


def _too_few_seeds(found: "Confirmed") -> list[str]:
    """Which comparisons have too few seeds for a test, and whether all have too few for a winner.

    A training that failed is missing in the comparisons of its candidate alone.
    """
    needed = seeds_needed(len(found.estimates))
    untested = [each for each in found.comparisons if each.p is None]
    sentences = []
    for seeds in sorted({each.seeds for each in untested}):
        first, others = untested[0].first, [each.other for each in untested if each.seeds == seeds]
        which = f" of trial {first} with {trials_text(others)}" if len(others) < len(found.comparisons) else ""
        sentences.append(
            f"No test is made{which}: with {many(seeds, 'seed')} its smallest possible p is 2 / 2^{seeds} = "
            f"{2 / 2**seeds:.3g}, and not below 0.05. {needed} seeds are needed."
        )
    smallest = holm([2 / 2**each.seeds for each in found.comparisons])
    if not untested and max(smallest, default=0.0) >= 0.05:
        sentences.append(
            f"No winner is possible: with {len(found.estimates)} candidates {needed} seeds are needed for a corrected "
            "p below 0.05."
        )
    return sentences


def _comparison(found: "Comparison") -> str:
    tested = ""
    if found.p is not None and found.p_holm is not None:
        tested = f"; sign-flip test: p {found.p:.3g}, {found.p_holm:.3g} with Holm's correction"
    return (
        f"Trial {found.first} minus trial {found.other}: {found.difference:+.4f}, 95 % interval over seeds and images "
        f"{_interval(found.interval, '+.4f')}; better with {found.better:.0%} of the seeds{tested}."
    )


def compared(found: "StudyComparison") -> str:
    """Two studies side by side."""
    cells = [
        [
            side.study,
            f"{side.value:.4f}",
            _interval(side.interval),
            f"{side.judged_on}, {side.images or 'an unknown number'}",
            str(side.trial),
            findings.params_text(side.params),
            str(side.finished),
            f"{side.epochs:,}",
            f"{side.seconds:,.0f}",
        ]
        for side in (found.first, found.second)
    ]
    titles = [
        "study",
        "best",
        "95 % sampling error",
        "images",
        "trial",
        "hyperparameters",
        "trials",
        "epochs",
        "seconds",
    ]
    sentences = [
        f"The best of {found.first.study} minus that of {found.second.study}: {found.difference:+.4f}, 95 % sampling "
        f"error {_interval(found.interval, '+.4f')}."
    ]
    if found.p is not None:
        sentences.append(f"McNemar's test on the same images: p {found.p:.3g}.")
    if found.first.judged_on != found.second.judged_on:
        sentences.append("They were judged by different images: validation and test accuracies are not comparable.")
    sentences.append(
        "A sampling error is what other images would change. But both models were chosen as the best of many, and "
        "another seed gives other models: `trialyard confirm` measures that."
    )
    return paragraphs([rows_text(titles, cells), bullets(sentences)])


def compared_with_notebook(rows: "Sequence[NotebookRow]") -> str:
    """A study beside the notebook's results that it repeats."""
    cells = [
        [
            row.label,
            "none" if row.rate is None else f"{row.rate:.2f}",
            f"{row.notebook:.4f}",
            _accuracy(row.ours),
            "" if row.difference is None else f"{row.difference:+.4f}",
            "" if row.interval is None else _interval(row.interval, "+.4f"),
            "not run yet" if row.agrees is None else "yes" if row.agrees else "no",
        ]
        for row in rows
    ]
    titles = ["label", "rate as run", "notebook", "ours", "difference", "95 % interval", "agrees"]
    conclusion = rows[0].source == "conclusion"
    sentences = [
        f"Accuracies on MNIST's 10,000 test images, {'after the last epoch' if conclusion else 'of the best epoch'}, "
        "as the notebook measured them. Each was measured once.",
        "The interval is the sampling error of the difference alone. Another seed changes an accuracy, too: by 0.0003 "
        "to 0.002 in the five rows that were trained from two seeds (docs/notebook.md).",
    ]
    epochs = sorted({row.epochs for row in rows if row.epochs is not None} - {20})
    if epochs:
        noun = "epoch" if epochs == [1] else "epochs"
        sentences.append(f"Trials with {' or '.join(map(str, epochs))} {noun}: the notebook trained for 20.")
    if rows[0].limit is not None and rows[0].limit < 60_000:
        sentences.append(f"The study trains with {rows[0].limit:,} images: the notebook trained with 60,000.")
    return paragraphs([rows_text(titles, cells), bullets(sentences)])


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(interval: Interval | None, form: str = ".4f") -> str:
    return "not known" if interval is None else f"{interval.low:{form}} to {interval.high:{form}}"


def table(rows: "Sequence[Row]") -> tuple[list[str], list[list[str]]]:
    """The leaderboard's titles and cells, without empty columns."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    titles = ["rank", "trial", "accuracy", "deviation", *names, "epochs", "weights", "seconds", "imported"]
    cells = [
        [
            str(row.rank),
            str(row.number),
            f"{row.value:.4f}",
            _accuracy(row.deviation),
            *(findings.value_text(row.params[name]) if name in row.params else "" for name in names),
            "" if row.epochs is None else str(row.epochs),
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "yes" if row.imported else "",
        ]
        for row in rows
    ]
    known = [column for column in range(len(titles)) if any(row[column] for row in cells)]
    return [titles[column] for column in known], [[row[column] for column in known] for row in cells]


def leaderboard(rows: "Sequence[Row]") -> str:
    """The leaderboard as a Markdown table, or a sentence if it is empty."""
    titles, cells = table(rows)
    return rows_text(titles, cells, right=True) if cells else "No trial is complete."


def trial_note(
    trial: FrozenTrial, definition: Definition, curves: "Sequence[Curve]", summary: Sequence[str] = ()
) -> str:
    """A trial's note in Markdown: the last epoch, the model and its `summary`, device and speed; or why it failed."""
    attrs = trial.user_attrs
    lines = [f"**Trial {trial.number}**: {escaped(findings.params_text(trial.params)) or 'no hyperparameters'}"]
    if trial.state == TrialState.FAIL:
        failure = attributes.failure(attrs.get("failure"))
        lines += [f"Failed ({escaped(failure['kind'])}):", fenced(failure["message"])]
        return paragraphs(lines)
    judged, by_epoch = definition.judged_on, epochs_judged_on(definition.protocol)
    if trial.state == TrialState.PRUNED:
        mean = attributes.mean_of_repeats(trial)
        with_mean = "" if mean is None else f", with a mean {judged} accuracy of {mean:.4f}"
        lines.append(f"Pruned after {attributes.last_step_text(trial)}{with_mean}.")
    elif trial.values is not None:
        best_epoch, epochs = attributes.number(attrs.get("best_epoch")), attributes.number(attrs.get("epochs"))
        which_epoch = "" if best_epoch is None or epochs is None else f" (epoch {best_epoch} of {epochs})"
        repeats = attributes.numbers(attrs.get("repeats"))
        if repeats:
            values = ", ".join(f"{value:.4f}" for value in repeats)
            which_epoch = f", the mean of {len(repeats)} trainings: {values}"
        lines.append(f"Complete: {judged} accuracy **{trial.values[0]:.4f}**{which_epoch}.")
    if attrs.get("imported"):
        source = ": " + ", ".join(str(attrs[key]) for key in ("label", "source") if key in attrs)
        lines.append(escaped(f"Imported, not run here{source.rstrip(': ')}."))
    curve = curves[0] if curves else None
    if curve is not None and curve.loss:
        lines.append(
            f"- last epoch, {len(curve.loss)}: loss {curve.loss[-1]:.4f}, accuracy {curve.accuracy[-1]:.4f}; "
            f"{by_epoch} loss {curve.val_loss[-1]:.4f}, accuracy {curve.val_accuracy[-1]:.4f}"
        )
    elif trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
        lines.append(f"- last, {attributes.last_step_text(trial)}: {by_epoch} accuracy {value:.4f}")
    if isinstance(attrs.get("parameters"), int):
        lines.append(f"- model: {escaped(definition.model)} with {attrs['parameters']:,} weights")
        if len(summary) > LAYERS:
            summary = [*summary[: LAYERS - 1], "...", summary[-1]]
        lines += [fenced("\n".join(summary))] if summary else []
    if "device" in attrs:
        lines.append(
            "- "
            + escaped(
                f"trained on {attrs['device']} ({attrs.get('slot')}) in {attrs.get('precision')}, "
                f"{attributes.number(attrs.get('images_per_second')) or 0:,.0f} images/s, "
                f"{attributes.number(attrs.get('seconds')) or 0:,.1f} s"
            )
        )
    if inside(Path(), attrs.get("model")) is not None:
        kept = f"`{attrs['model']}` while it is among the best"
        lines.append(f"- files, in the artifacts folder: `{attrs.get('history')}`, and the model {kept}")
    return paragraphs(lines)


def escaped(text: str) -> str:
    """`text` on one line, without anything that Markdown would read as markup."""
    flat = " ".join(text.split())
    # At its start a line may look like a list or a heading.
    text = "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~&" else letter for letter in flat)
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", text)


def fenced(text: str, language: str = "") -> str:
    """`text` as a code block, with a fence that the text does not contain."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def paragraphs(lines: Iterable[str]) -> str:
    return "\n\n".join(lines)


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)


def rows_text(titles: Sequence[str], cells: Sequence[Sequence[str]], *, right: bool = False) -> str:
    lines = [[escaped(cell) for cell in line] for line in (titles, *cells)]
    lines.insert(1, ["---:" if right else "---"] * len(titles))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
