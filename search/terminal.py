"""What commands print: results on standard output, questions and progress on standard error."""

import csv
import math
import sys
from collections.abc import Container, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from search.options import invocation
from search.plain_text import plain
from search.sparkline import sparkline
from search.standard_error import StandardError
from search.summary import duration, not_shown, progress_line, shown
from storage import artifacts, attributes
from storage.errors import many, trials_text
from storage.metric import judged_on
from studies.wording import names_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from search.retraining import Replayed, ReplayedEpoch
    from search.service import Checked
    from storage.attempt_table import Attempt
    from storage.settings import Settings
    from storage.slots import SlotStatus
    from studies.comparison import NotebookRow, StudyComparison
    from studies.confirmation import Confirmed
    from studies.results import Row, Status
    from studies.trial_records import TrialDetails, TrialRecord

REASON_COLUMNS = 80  # of a trial's reason in a table; `show` has all of it
WIDE = 160  # columns of a report that goes to a file or a pipe

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = StandardError()


def say(line: str) -> None:
    """Prints a line of the result."""
    out.print(line, markup=False)


def warn(line: str) -> None:
    """Prints a line on standard error."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def print_check(checked: "Checked") -> None:
    """Prints what `check` found out: the space, the data, the models, the time and what one may not expect."""
    definition, data = checked.definition, checked.data
    say(f"{definition.name} is valid: {many(definition.trials, 'trial')} of {many(definition.budget.epochs, 'epoch')}")
    for name, text in checked.space.items():
        say(f"  {name}: {text}")
    judged, shape = definition.judged_on, "x".join(map(str, data["image_shape"]))
    say(f"images: {data['train']} to train with, {data[judged]} {judged} images; {shape} in {data['classes']} classes")
    if data.get("class_names"):
        say(f"classes: {names_text(data['class_names'])}")
    if checked.parameters is not None:
        smallest, largest = checked.parameters
        say(f"model: {smallest:,} weights" if smallest == largest else f"models: {smallest:,} to {largest:,} weights")
    if checked.seconds is not None:
        at_once = f", {checked.slots} trials at once" if checked.slots > 1 else ""
        say(f"time: about {duration(checked.seconds)} on this machine{at_once}, if no trial is pruned")
    for note in checked.notes:
        say(f"note: {note}")


def record(study: str, trial: "FrozenTrial", settings: "Settings") -> dict[str, Any]:
    from studies import results

    return {
        "study": study,
        "class_names": results.class_names(study, settings.url),
        "number": trial.number,
        "value": trial.values[0],
        "params": trial.params,
        "user_attrs": trial.user_attrs,
        "imported": trial.user_attrs.get("imported") is True,
        # A model may be on another machine.
        "model": _path(trial, "model", settings) if _has_model(trial, settings) else None,
        "history": _path(trial, "history", settings),
        "began": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
    }


def _path(trial: "FrozenTrial", artifact: str, settings: "Settings") -> str | None:
    path = artifacts.inside(Path(), trial.user_attrs.get(artifact))
    return None if path is None else settings.artifact_store.name(PurePosixPath(path))


def _has_model(trial: "FrozenTrial", settings: "Settings") -> bool:
    path = artifacts.inside(Path(), trial.user_attrs.get("model"))
    return path is not None and bool(settings.artifact_store.existing([PurePosixPath(path)]))


def _time(moment: datetime | None) -> str | None:
    # Optuna gives naive local time; a reader elsewhere needs the offset.
    return None if moment is None else moment.astimezone().isoformat(timespec="seconds")


def print_json(value: Any) -> None:
    """Prints a value as JSON, whatever other programs stored: a number that is not finite is null."""
    sys.stdout.write(attributes.encoded(value, indent=2) + "\n")


def print_end(study: str, url: str, *, storage: str | None, can_confirm: bool) -> None:
    """Prints how the best score grew over a finished search, and what to do next. `storage` is the option's value."""
    from studies import trial_records

    best_so_far = trial_records.best_so_far(study, url)
    if len(best_so_far) > 1:
        growth = f"{best_so_far[0]:.4f} to {best_so_far[-1]:.4f}, in {len(best_so_far)} complete trials"
        say(f"  best so far      {sparkline(best_so_far, out.encoding)}  {growth}")
    confirm = [f"confirm {study}"] if can_confirm else []
    commands = [f"report {study}", *confirm, f"export {study} {study}-model"]
    warn(f"next: {', '.join(invocation(text, storage) for text in commands)}")


def print_best(study: str, trial: "FrozenTrial", settings: "Settings", others: Sequence[int] = ()) -> None:
    """Prints the best trial. The trials `others` have the same score."""
    attrs = trial.user_attrs
    protocol = attrs.get("protocol")
    judged = "test (the notebook's protocol)" if protocol == "test" else judged_on(protocol)
    out.print(f"best of {study}: trial {trial.number}, {judged} accuracy {trial.values[0]:.4f}", markup=False)
    if others:
        out.print(f"  the same score   {trials_text(others)}", markup=False)
    out.print(f"  hyperparameters  {shown(trial.params)}", markup=False)
    repeats = attributes.numbers(attrs.get("repeats"))
    if repeats:
        out.print(f"  repeats          {', '.join(f'{value:.4f}' for value in repeats)}; the mean counts", markup=False)
    best_epoch, epochs, parameters, seconds, speed = numbers = [
        attributes.number(attrs.get(key))
        for key in ("best_epoch", "epochs", "parameters", "seconds", "images_per_second")
    ]
    # With repeats, the best epoch is one of a repeat, and the epochs are those of all.
    which = f"best epoch {best_epoch} of {epochs}"
    which = f"{epochs} epochs in {many(len(repeats), 'repeat')}" if repeats else which
    if None not in numbers:  # else others added it
        out.print(
            f"  training         {which}, {parameters:,} weights, "
            f"{seconds:.1f} s, {speed:,.0f} images/s in {attrs.get('precision')}",
            markup=False,
        )
    if attrs.get("imported") is True:
        out.print("  model            none: the trial was imported, not run here", markup=False)
    model = _path(trial, "model", settings)
    if model is not None:
        missing = " (removed)" if settings.artifact_store.is_far else " (not on this machine)"
        where = "" if _has_model(trial, settings) else missing
        out.print(f"  model            {model}{where}", markup=False)


def print_rows(rows: "list[Row]") -> None:
    from studies import text

    if not rows:
        out.print("no trial is complete yet", markup=False)
        return
    titles, cells = text.table(rows)
    _print_table(titles, cells)


def _print_table(titles: list[str], cells: list[list[str]], left: Container[str] = ()) -> None:
    """Prints columns that are aligned on the right, or on the left for the titles `left`."""
    cells = [[plain(cell, out.encoding) for cell in line] for line in cells]
    aligned = [str.ljust if title in left else str.rjust for title in titles]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    head, *lines = (
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True)).rstrip()
        for line in (titles, *cells)
    )
    out.print(head, style="bold", markup=False)
    # Not as a table of rich's, which takes a millisecond a row.
    out.file.writelines(f"{line}\n" for line in lines)


def print_not_shown(status: "Status", shown_rows: int, storage: str | None) -> None:
    line = not_shown(status, shown_rows)
    if line is not None:
        warn(f"{line}; {invocation(f'trials {status.study}', storage)} has every trial")


def print_trials(records: "list[TrialRecord]", state: str | None) -> None:
    from studies.findings import value_text
    from studies.wording import one_line

    if not records:
        say("there is no trial yet" if state is None else f"no trial is {state}")
        return
    names = list(dict.fromkeys(name for record in records for name in record.params))
    titles = ["trial", "state", "score", "epochs", "seconds", *names, "reason"]
    cells = [
        [
            str(record.number),
            record.state,
            record.score_text,
            "" if record.epochs is None else str(record.epochs),
            "" if record.seconds is None else f"{record.seconds:.1f}",
            *(value_text(record.params[name]) if name in record.params else "" for name in names),
            one_line(record.reason or "", REASON_COLUMNS),
        ]
        for record in records
    ]
    known = [column for column in range(len(titles)) if any(row[column] for row in cells)]
    cells = [[row[column] for column in known] for row in cells]
    _print_table([titles[column] for column in known], cells, left=("state", "reason"))


def print_csv(columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Prints rows as comma-separated values, with a line of titles."""
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def print_trial(details: "TrialDetails") -> None:
    record, attrs = details.record, details.attributes
    reason = f" ({record.reason})" if record.reason else ""
    score = f", score {record.score_text}" if record.score is not None else ""
    say(f"trial {record.number} of {details.study}: {record.state}{reason}{score}")
    say(f"  hyperparameters  {shown(record.params) or 'none'}")
    parameters, speed = (attributes.number(attrs.get(key)) for key in ("parameters", "images_per_second"))
    if None not in (record.seconds, parameters, speed):
        say(
            f"  training         {many(record.epochs or 0, 'epoch')}, {parameters:,} weights, {record.seconds:.1f} s, "
            f"{speed:,.0f} images/s in {attrs.get('precision')} on {attrs.get('device')}"
        )
    for title, values, best in (
        ("accuracy", details.curve.val_accuracy, max),
        ("loss", details.curve.val_loss, min),
    ):
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            say(
                f"  {title:<15}  {sparkline(values, out.encoding)}  {values[0]:.4f} to {values[-1]:.4f}, the best "
                f"{best(finite):.4f} in {_step(details)} {values.index(best(finite)) + 1}"
            )
    for attempt in details.attempts:
        say(f"  {f'attempt {attempt.attempt}':<15}  {_attempt_text(attempt)}")
    for path in details.files:
        say(f"  {'file':<15}  {path}, {size_text(path.stat().st_size if isinstance(path, Path) else path.size)}")
    for at, line in enumerate(details.log):
        say(f"  {'' if at else 'end of its log':<15}  {line}")


def _step(details: "TrialDetails") -> str:
    return "repeat" if "repeats" in details.attributes and not details.curve.val_loss else "epoch"


def _attempt_text(attempt: "Attempt") -> str:
    owner = attempt.owner
    began, ended = (
        moment and moment.replace(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        for moment in (attempt.began, attempt.ended)
    )
    resumed = "" if attempt.resumed_after is None else f", went on after epoch {attempt.resumed_after}"
    reason = f" ({' '.join(attempt.reason.split())})" if attempt.reason else ""
    end = "runs" if attempt.outcome is None else f"{attempt.outcome} at {ended}{reason}"
    return f"{owner.slot} of {owner.host}, from {began}{resumed}, epoch {attempt.epoch}, {end}"


def print_workers(workers: "list[SlotStatus]") -> None:
    for one in workers:
        doing = "waits" if one.study is None else f"{one.study} trial {one.trial}, epoch {one.epoch}"
        doing = doing if one.closed is None else f"closed ({one.closed})"
        out.print(
            f"{one.slot} of {one.host} (process {one.pid}, {one.device}): {doing}, last heartbeat "
            f"{one.silent_seconds:.0f} s ago",
            markup=False,
        )


def print_status(found: "Status", storage: str | None) -> None:
    from storage import ledger

    if found.state != "open":
        line = f"{found.study}: {found.state}"
    else:
        line = f"{found.study}: ended" if found.ended else progress_line(found)
    out.print(line, style="bold", markup=False)
    if found.pause_reason is not None:
        out.print(f"  {pause_text(found, storage)}", markup=False)
    if found.protocol == "test":
        out.print("  judged on the test set: the notebook's protocol, for comparison only", markup=False)
    out.print(
        f"  {found.complete} complete, {found.pruned} pruned, {found.failed} failed, {found.running} running, "
        f"{found.waiting} waiting, budget {found.budget}",
        markup=False,
    )
    if found.priority:
        out.print(f"  priority {found.priority}", markup=False)
    if found.finished >= found.budget and found.waiting:
        out.print(f"  {ledger.left_waiting_text(found.waiting)}", markup=False)
    if (found.ended or found.state != "open") and found.best is not None and found.protocol != "confirmation":
        out.print(f"  best {found.best:.4f} (trial {found.best_number})", markup=False)
    if found.failures:
        out.print(f"  {failures_text(found)}", markup=False)
    if found.outside:
        out.print(f"  {ledger.started_outside_text(found.outside)}", markup=False)
    for one in found.workers:
        out.print(
            f"  trial {one.number} on {one.slot} of {one.host} (process {one.pid}), attempt {one.attempt}, "
            f"epoch {one.epoch}, last heartbeat "
            f"{one.silent_seconds:.0f} s ago",
            markup=False,
        )


def pause_text(found: "Status", storage: str | None) -> str:
    resume, retry = (invocation(f"{name} {found.study}", storage) for name in ("resume", "retry"))
    return (
        f"paused because {found.pause_reason}; once that is corrected, {resume} lets it go on, and {retry} repeats the "
        "trials that failed"
    )


def failures_text(found: "Status") -> str:
    return f"{found.failed} of {found.study}'s trials failed ({'; '.join(found.failures)})"


def print_report(markdown: str) -> None:
    """Prints a report in Markdown as tables and paragraphs."""
    _print_markdown(markdown)


def print_confirmed(found: "Confirmed") -> None:
    from studies import text

    _print_markdown(f"# {text.escaped(found.study)}, confirmed\n\n{text.confirmed(found)}\n")


def print_compared(found: "StudyComparison") -> None:
    from studies import text

    _print_markdown(text.compared(found))


def print_notebook_rows(rows: "list[NotebookRow]") -> None:
    from studies import text

    _print_markdown(text.compared_with_notebook(rows))


def replayed_epoch_text(epoch: "ReplayedEpoch") -> str:
    recorded = "not recorded" if epoch.recorded is None else f"{epoch.recorded:.4f} recorded"
    equal = ", the same" if epoch.is_equal else ""
    return f"epoch {epoch.epoch}: accuracy {epoch.replayed:.4f}, {recorded}{equal}"


def print_replayed(found: "Replayed") -> None:
    what = f"trial {found.trial} of {found.study}: {found.replayed_value:.4f}, and {found.recorded_value:.4f} recorded"
    again = "" if found.attempts <= 1 else f", though the recorded training took {found.attempts} attempts"
    if found.is_exact:
        verdict = f"the same in {_compared(found)}, to the last bit{again}"
    elif found.tolerance == 0.0:
        first = found.first_different
        where = f"from epoch {first} on" if first is not None else f"in {_compared(found)}"
        verdict = f"not the same {where}, and it should be"
    else:
        verdict = f"{'within' if found.holds else 'not within'} the tolerance of {found.tolerance:.4f}"
    out.print(f"{what}: {verdict}", markup=False)


def _compared(found: "Replayed") -> str:
    """What of the two trainings was compared: the epochs, or what the database has where they are not recorded."""
    if all(epoch.recorded is not None for epoch in found.epochs):
        return "its epoch" if len(found.epochs) == 1 else f"all {len(found.epochs)} epochs"
    what = f"all {len(found.recorded_repeats)} repeats" if found.recorded_repeats else "its value"
    return f"{what} (not every epoch is recorded on this machine)"


def _print_markdown(markdown: str) -> None:
    from rich.markdown import Markdown

    # Outside a terminal the table may be wider.
    width = None if out.is_terminal else WIDE
    Console(width=width, highlight=False, emoji=False).print(Markdown(markdown))


def ask(question: str, yes: bool) -> None:
    """Exits with 1 unless the answer is yes."""
    if yes:
        return
    # On standard error, unlike typer's own prompt: standard output is for results.
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        sys.stderr.write("nothing was removed\n")
        raise typer.Exit(1)


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
