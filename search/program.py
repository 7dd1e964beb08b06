"""The program's start and end, with a patient garbage collector.

The imports of a command make objects that live as long as the process. Python looks through young objects after each
700 new ones; looking through those again and again took a tenth of a query's time. Another tenth was the last look,
through all objects when the process ends, for memory that the system takes back a moment later anyway.
"""

import atexit
import gc

NEW_OBJECTS = 100_000  # between two looks


def main() -> None:
    """Runs the ``trialyard`` command."""
    gc.set_threshold(NEW_OBJECTS)
    atexit.register(gc.freeze)
    from search import cli

    cli.main()


if __name__ == "__main__":
    main()
