"""The commands for a first study: the ready definitions."""

from typing import Annotated

import typer

from search.options import JsonOption


def catalog(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one, to start from.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the ready definitions, one line each; or print one of them."""
    import sys

    from search.terminal import print_json, say
    from studies import definition as definitions

    if name is not None:
        text = definitions.catalog_text(name)
        if as_json:
            print_json(definitions.parse(text).to_json())
        else:
            sys.stdout.write(text)
        return
    ready = definitions.catalog()
    if as_json:
        print_json([{"name": each, "description": ready[each].description} for each in ready])
        return
    width = max(map(len, ready))
    for each, definition in ready.items():
        say(f"{each:<{width}}  {definition.description}")
