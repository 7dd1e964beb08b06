"""The names of studies for the shell's completion: quick, and silent whatever happens."""

import logging
import threading

import typer

SECONDS = 3.0  # that a person waits for names at most


def study_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The studies of the database whose names start with `incomplete`; none if the database does not answer in time."""
    logging.disable()  # a shell would show it in the middle of the line
    names: list[str] = []
    thread = threading.Thread(target=_read, args=(ctx.params.get("storage"), names), daemon=True)
    thread.start()
    thread.join(SECONDS)
    return [name for name in names if name.startswith(incomplete)]


def _read(storage: str | None, names: list[str]) -> None:
    from studies import registry

    try:
        names += registry.names(storage)
    except Exception:  # noqa: BLE001 - a completion has nobody to tell, and the command itself will say what is wrong
        names.clear()
