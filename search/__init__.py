"""How a trial is run, and the program.

The path of a trial: definition -> claim -> suggest -> train -> record -> outcome -> result. Follow it from
`worker.work` to `attempt.Attempt.run` to `training_loop.train`. Only the trainer process (`trainer_process`) imports
Keras.

>>> import search
>>> trial = search.run("digits", trials=2, epochs=1)

The functions are those of `search.service`, and do what the commands of the same names do.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.service import (
        Interrupted,
        alive,
        backup_storage,
        catalog,
        catalog_text,
        check,
        check_storage,
        confirm,
        create,
        create_storage,
        import_notebook,
        import_results,
        init,
        leftovers,
        prune,
        replay,
        run,
        serve,
        submit_to_slurm,
        upgrade_storage,
        work,
    )

__all__ = [
    "Interrupted",
    "alive",
    "backup_storage",
    "catalog",
    "catalog_text",
    "check",
    "check_storage",
    "confirm",
    "create",
    "create_storage",
    "import_notebook",
    "import_results",
    "init",
    "leftovers",
    "prune",
    "replay",
    "run",
    "serve",
    "submit_to_slurm",
    "upgrade_storage",
    "work",
]


def __getattr__(name: str) -> Any:
    # At the first use: the trainer process imports this package, too, and needs none of them.
    if name in __all__:
        from search import service

        return getattr(service, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
