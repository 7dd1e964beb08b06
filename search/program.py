"""The program's start: `search.cli` is imported with the garbage collector at rest.

Imports make objects that live as long as the process; looking through them again and again took a tenth of a query's
time.
"""

import gc


def main() -> None:
    """Runs the ``trialyard`` command."""
    gc.disable()
    from search import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
