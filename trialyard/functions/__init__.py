"""Functions of notebooks and scripts, stored so that the trainer processes of all workers can import them.

A function in an importable module is named by that module: ``models:build``. Another one is pickled with all that it
uses of its own session, into the folder FOLDER of the artifacts folder, with a small module beside it that loads it:
``trialyard.functions.build_0123456789ab:build_0123456789ab``. The digits are its `fingerprint`.
"""

import inspect
import pickle
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cloudpickle

from search.errors import ModelError
from storage import settings
from storage.artifacts import written_atomically
from storage.errors import error_text
from trialyard.fingerprint import fingerprint, is_importable

FOLDER = "functions"
LARGEST = 50 << 20  # bytes of a pickle: each trainer process reads it, so it must not contain the images
PYTHON = ".".join(platform.python_version_tuple()[:2])  # a pickled function can be loaded by no other version

MODULE = '''\
"""A function that Trialyard stored from a notebook or a script. Studies need it, and all their workers."""

from trialyard.functions import load

{name} = load(__file__)
'''


def folder() -> Path:
    """The absolute folder of the stored functions of this machine. Raises SettingsError."""
    return settings.load().artifact_folder / FOLDER


__path__ = [*__path__, str(folder())]  # where Python finds the modules of stored functions


@dataclass(frozen=True, kw_only=True)
class StoredFunction:
    """A function that is in no importable module, ready to be written."""

    module: str  # without the package
    pickled: bytes

    @property
    def name(self) -> str:
        """What a definition's `model` says."""
        return f"{__name__}.{self.module}:{self.module}"

    def write(self) -> list[Path]:
        """Writes its files, unless they exist; returns the new ones. Raises OSError and ObjectStoreError."""
        contents = {
            f"{self.module}.pickle": self.pickled,
            f"{self.module}.py": MODULE.format(name=self.module).encode(),  # last: it needs the other
        }
        new = [folder() / name for name in contents if not (folder() / name).exists()]
        for path in new:
            with written_atomically(path) as temporary:
                temporary.write_bytes(contents[path.name])
        store = settings.load().artifact_store
        for name in contents:  # also those that exist: an earlier call may have been cut off
            store.keep(PurePosixPath(FOLDER, name))
        if str(folder()) not in __path__:  # the settings are others than at the import
            __path__.append(str(folder()))
        return new


def of(build: Callable[..., Any]) -> str | StoredFunction:
    """The name of the function that builds models, or what must be stored of it.

    Raises ModelError if it does not take ``(hyperparameters, image_shape, classes)``, or cannot be stored.
    """
    name = getattr(build, "__name__", type(build).__name__)
    _check_signature(build, name)
    if is_importable(build) and "." not in build.__qualname__:
        return f"{build.__module__}:{name}"
    module = name if name.isidentifier() else "build"
    try:
        classes = _registered_classes()
        mark = fingerprint(build, classes)
        pickled = cloudpickle.dumps({"python": PYTHON, "function": build, "classes": classes})
    except Exception as error:  # an object of the user's may raise anything
        raise ModelError(
            f"the function {name} cannot be stored for the trainer processes, because it uses an object that exists in "
            f"this session only ({error_text(error)}): make that object inside the function, or write "
            "the function into a module of its own and import it from there"
        ) from error
    if len(pickled) > LARGEST:
        raise ModelError(
            f"the function {name} uses {len(pickled) >> 20} MB of objects of this session, and may use "
            f"{LARGEST >> 20} MB: let it use no images, but only its arguments"
        )
    return StoredFunction(module=f"{module}_{mark}", pickled=pickled)


def load(module_file: str) -> Any:
    """The function that was stored beside this module. Registers with Keras the classes that were when it was stored.

    Raises ImportError if another version of Python stored it.
    """
    stored = pickle.loads(Path(module_file).with_suffix(".pickle").read_bytes())
    if stored["python"] != PYTHON:
        raise ImportError(f"it was stored by Python {stored['python']}, and this is {PYTHON}: use the same version")
    _register(stored["classes"])
    return stored["function"]


def _check_signature(build: Callable[..., Any], name: str) -> None:
    if not callable(build):
        raise ModelError(
            f"the model must be a function, the name of a built-in model or 'package.module:function', and is a "
            f"{type(build).__name__}: give a function build(hyperparameters, image_shape, classes)"
        )
    try:
        inspect.signature(build).bind({}, (28, 28, 1), 10)
    except TypeError as error:
        raise ModelError(
            f"the function {name} must take three arguments, and does not ({error}): write "
            f"def {name}(hyperparameters, image_shape, classes)"
        ) from None
    except ValueError:
        return  # Python does not know the arguments of every built-in function


def _registered_classes() -> dict[str, Any]:
    """The classes of this session that ``keras.saving.register_keras_serializable`` has registered, by their names."""
    keras = sys.modules.get("keras")
    if keras is None:
        return {}
    registered: dict[str, Any] = keras.saving.get_custom_objects()
    return {name: value for name, value in registered.items() if not is_importable(value)}


def _register(classes: dict[str, Any]) -> None:
    if not classes:
        return
    import keras

    for name, value in classes.items():
        package, _, short_name = name.rpartition(">")
        keras.saving.register_keras_serializable(package, short_name)(value)
