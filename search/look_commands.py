"""The commands that show what a study has: its trials, one of them, the best, the progress."""

import dataclasses
from typing import Annotated, get_args

import typer

from search.completion import study_names
from search.options import JsonOption, StorageOption, StudyArgument, invocation, settings_of


def status(
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="Default: all of them.", autocompletion=study_names)
    ] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Counts, best so far, who is running what, time left."""
    from search.terminal import print_json, print_status, print_workers, say
    from studies import results

    url = settings_of(storage).url
    statuses = [results.status(study, url)] if study else results.statuses(url)
    workers = [] if study else results.workers(url)
    if as_json:
        records = [dataclasses.asdict(each) for each in statuses]
        everything = {"studies": records, "workers": [dataclasses.asdict(slot) for slot in workers]}
        print_json(records[0] if study else everything)
        return
    for each in statuses:
        print_status(each, storage)
    if not statuses:
        say(f"there is no study yet: {invocation('create digits', storage)} makes one")
    print_workers(workers)


def best(study: StudyArgument, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """The best trial: its value, hyperparameters and model."""
    from search.terminal import print_best, print_json, record
    from studies import results

    here = settings_of(storage)
    trial = results.best_trial(study, here.url)
    if as_json:
        print_json(record(study, trial, here))
    else:
        print_best(study, trial, here, results.as_good_as_best(study, here.url))


def leaderboard(
    study: StudyArgument,
    storage: StorageOption = None,
    top: Annotated[int | None, typer.Option("--top", metavar="N", min=1, help="Show only the best N.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Trials as a table, best first."""
    from search.terminal import print_json, print_not_shown, print_rows
    from studies import results

    url = settings_of(storage).url
    rows = results.leaderboard(study, url, top)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_rows(rows)
        print_not_shown(results.status(study, url), len(rows), storage)


def trials(
    study: StudyArgument,
    storage: StorageOption = None,
    state: Annotated[str | None, typer.Option("--state", help="Only those in this state, such as failed.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Show only the last N.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values on standard output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every trial, also those that were pruned or failed."""
    from search.terminal import print_csv, print_json, print_trials
    from studies import trial_records

    known = get_args(trial_records.State)
    if state is not None and state not in known:
        raise typer.BadParameter(f"--state {state} must be one of {', '.join(known)}")
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other: give one of them")
    records = trial_records.trials(study, settings_of(storage).url, state=state, limit=limit)  # type: ignore[arg-type]
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
    elif as_csv:
        print_csv(trial_records.columns(records), trial_records.flat(records))
    else:
        print_trials(records, state)


def show(
    study: StudyArgument,
    number: Annotated[int, typer.Argument(metavar="NUMBER", min=0, help="A trial, in whatever state.")],
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """One trial: hyperparameters, curve, attempts, log, files."""
    from search.terminal import print_json, print_trial
    from studies import trial_records

    details = trial_records.trial(study, number, settings_of(storage).url)
    if as_json:
        print_json(details.to_json())
    else:
        print_trial(details)


COMMANDS = (status, best, leaderboard, trials, show)
