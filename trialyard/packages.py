"""Imports the packages `storage`, `studies` and `search` from the folder that Trialyard is installed in.

Python looks first in the folder of the script, where a user may have a ``search.py`` or a folder ``studies`` of their
own. Those must not be imported in place of ours.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("storage", "studies", "search")


def load() -> None:
    """Imports our packages, each once. Raises ImportError if another module has the name of one already."""
    for name in NAMES:
        loaded = sys.modules.get(name)
        if loaded is None:
            _load(name)
        elif (file := getattr(loaded, "__file__", None)) is None or Path(file).parent != ROOT / name:
            raise ImportError(
                f"Trialyard needs its own package {name!r}, and this program has imported {file or 'a folder'} under "
                "that name: rename it, or import trialyard first"
            )


def _load(name: str) -> None:
    spec = PathFinder.find_spec(name, [str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no package {name!r} in {ROOT}: install Trialyard again")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
