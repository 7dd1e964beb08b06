"""The commands that pause or end a study, give it more to do, or let it go first."""

import tomllib
from typing import Annotated, Any

import typer

from search.options import StorageOption, StudyArgument, invocation, settings_of


def pause(study: StudyArgument, storage: StorageOption = None) -> None:
    """Put a study's trials back into the queue, and start no more."""
    from search.terminal import say
    from studies import registry

    registry.pause(study, settings_of(storage).url)
    say(f"study {study} is paused: {invocation(f'resume {study}', storage)} lets its workers go on")


def resume(study: StudyArgument, storage: StorageOption = None) -> None:
    """Go on with a study that was paused or stopped."""
    from search.terminal import say
    from studies import registry

    registry.resume(study, settings_of(storage).url)
    work = invocation(f"work {study}", storage)
    say(f"study {study} is open: waiting workers continue it; if there are none, run {work}")


def stop(study: StudyArgument, storage: StorageOption = None) -> None:
    """End a study with the trials that it has.

    Those that run go back to the queue and stay there.
    """
    from search.terminal import say
    from studies import registry

    registry.stop(study, settings_of(storage).url)
    say(f"study {study} is stopped: {invocation(f'leaderboard {study}', storage)} shows its results")


def enqueue(
    study: StudyArgument,
    values: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Such as depth=5 dropout=0.1")],
    storage: StorageOption = None,
) -> None:
    """Add a trial with these hyperparameters.

    The sampler gives those that are left out.
    """
    from search.terminal import say
    from studies import additions

    number = additions.enqueue(study, dict(map(_pair, values)), settings_of(storage).url)
    work = invocation(f"work {study}", storage)
    say(f"trial {number} of {study} is in the queue; if no worker is waiting, run {work}")


def retry(study: StudyArgument, storage: StorageOption = None) -> None:
    """Repeat each failed trial with the same hyperparameters.

    The budget grows by them.
    """
    from search.terminal import say
    from storage.errors import trials_text
    from studies import additions

    numbers = additions.retry(study, settings_of(storage).url)
    if numbers:
        are, work = "is" if len(numbers) == 1 else "are", invocation(f"work {study}", storage)
        say(f"{trials_text(numbers)} of {study} {are} in the queue; if no worker is waiting, run {work}")
    else:
        say(f"no failed trial of {study} is left to repeat")


def priority(
    study: StudyArgument,
    number: Annotated[
        int, typer.Argument(metavar="N", help="A whole number. The default is 0, and higher ones go first.")
    ],
    storage: StorageOption = None,
) -> None:
    """Let a study go before others, or after them.

    It applies to workers that were started without study names.
    """
    from search.terminal import say
    from studies import registry

    registry.set_priority(study, number, settings_of(storage).url)
    say(
        f"study {study} has priority {number}: workers that were started without study names serve the highest "
        "priority first"
    )


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE: write it as depth=5")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a string without its quotes, such as optimizer=adam
