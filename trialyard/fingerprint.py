"""A fingerprint of a function: of its code, and of all that the code uses of its own session.

A pickle of a function differs between processes: it has the name of the notebook's temporary file, line numbers, and
random marks of classes. This one is the same wherever the same function was defined with the same version of Python.
Line numbers and comments do not count. What can be imported by name, such as Keras, is named and not looked into; of a
module of the user's own, its file counts. An object of Keras is its configuration and its weights.
"""

import dis
import hashlib
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field
from functools import cache, partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import cloudpickle

DIGITS = 12  # hexadecimal ones: of a million functions, two are alike with a chance of one in 500
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
NOT_OF_A_CLASS = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"),
    *("_abc_impl", "__abstractmethods__"),  # caches of abstract classes
)


OURS = ("search", "studies", "storage", "trialyard")


def fingerprint(function: Any, registered: Mapping[str, Any] | None = None) -> str:
    """The fingerprint of `function`, with DIGITS digits.

    `registered` are the objects that its code may use by a name in a text, such as ``activation="mine>swish"``: those
    that it names count.

    Raises what pickling raises if it uses an object of this session that can be neither described nor pickled.
    """
    digest = hashlib.sha256()
    code = getattr(function, "__code__", None)
    texts = _texts(code) if isinstance(code, CodeType) and registered else set()
    named = {name: each for name, each in (registered or {}).items() if {name, name.rpartition(">")[2]} & texts}
    for part in _parts((function, named) if named else function, {}):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:DIGITS]


def is_importable(value: Any) -> bool:
    """Whether another process can import the function or class `value` by its module and name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module in (None, "__main__") or name is None:
        return False
    imported: Any = sys.modules.get(module)
    for part in name.split("."):
        imported = getattr(imported, part, None)
    return imported is value


def _parts(value: Any, seen: dict[int, int]) -> Iterator[str]:
    """The text that describes `value`.

    `seen` numbers the functions, classes and other objects before it, by their `id`: they may refer to each other.
    """
    if isinstance(value, PLAIN):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)}"
        for each in value:
            yield from _parts(each, seen)
    elif isinstance(value, (set, frozenset)):
        yield from (type(value).__name__, *sorted("\0".join(_parts(each, dict(seen))) for each in value))
    elif isinstance(value, Mapping):
        yield f"{type(value).__name__} {len(value)}"
        for key, each in value.items():
            yield from _parts(key, seen)
            yield from _parts(each, seen)
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}{_source(value.__name__)}"
    elif isinstance(value, (GetSetDescriptorType, MemberDescriptorType)):
        yield f"slot {value.__name__}"
    elif isinstance(value, CodeType):
        yield from _of_code(value, seen)
    elif isinstance(value, partial):
        yield from ("partial", *_parts((value.func, value.args, value.keywords), seen))
    elif isinstance(value, MethodType):
        yield from ("method", *_parts((value.__func__, value.__self__), seen))
    elif is_importable(value):
        yield f"import {value.__module__} {value.__qualname__}{_source(value.__module__)}"
    elif id(value) in seen:
        yield f"again {seen[id(value)]}"
    elif isinstance(value, FunctionType):
        seen[id(value)] = len(seen)
        yield from _of_function(value, seen)
    elif isinstance(value, type):
        seen[id(value)] = len(seen)
        yield from _of_class(value, seen)
    elif isinstance(value, Field):  # of a dataclass; a pickle would name its type at random
        yield from ("field", *_parts((value.name, value.type, value.default, value.default_factory), seen))
    elif (config := _config(value)) is not None:  # its pickle has the time, and names that count the session's layers
        seen[id(value)] = len(seen)
        yield from _of_keras(value, config, seen)
    elif not is_importable(type(value)) and (hasattr(value, "__dict__") or _slots(value)):
        seen[id(value)] = len(seen)
        state = getattr(value, "__dict__", {}) | {name: getattr(value, name) for name in _slots(value)}
        yield from ("object", *_parts(type(value), seen), *_parts(state, seen))
    else:
        yield f"pickle {hashlib.sha256(cloudpickle.dumps(value)).hexdigest()}"


def _of_keras(value: Any, config: Any, seen: dict[int, int]) -> Iterator[str]:
    yield "configured"
    # The configuration names classes and functions, and does not have their code.
    for layer in value._flatten_layers() if hasattr(value, "_flatten_layers") else [value]:
        yield from _parts(type(layer), seen)
        for name, each in sorted(vars(layer).items()):
            if isinstance(each, FunctionType) and not str(each.__module__).startswith("keras"):
                yield from (f"function {name}", *_parts(each, seen))
    yield from _parts(config, seen)
    for array in value.get_weights() if hasattr(value, "get_weights") else ():
        yield hashlib.sha256(array.tobytes()).hexdigest()


def _config(value: Any) -> Any:
    """The configuration of an object of Keras, with numbers in place of its layers' names; None if it has none."""
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(value, (keras.Layer, keras.Initializer, keras.Regularizer, keras.Loss)):
        return None
    try:
        config = value.get_config()
    except Exception:  # noqa: BLE001 - a user's own class may raise anything; then it is pickled
        return None
    names: dict[str, str] = {}
    _number_names(config, names)
    return _with_numbers(config, names)


def _number_names(config: Any, names: dict[str, str]) -> None:
    """Numbers the names of layers in the order in which they come: Keras counts those of the whole session."""
    for each in config.values() if isinstance(config, Mapping) else config if isinstance(config, (list, tuple)) else ():
        _number_names(each, names)
    if isinstance(config, Mapping) and isinstance(config.get("name"), str) and not _is_policy(config):
        names.setdefault(config["name"], f"layer {len(names)}")


def _is_policy(config: Mapping[str, Any]) -> bool:
    """Whether it is the configuration of a dtype policy, whose name says what it is."""
    return config.keys() == {"name"}


def _with_numbers(config: Any, names: Mapping[str, str]) -> Any:
    if isinstance(config, Mapping):
        if config.get("class_name") == "__lambda__":
            return "lambda"  # its code has the names of files; it is described with its layer
        if _is_policy(config):
            return config
        return {key: _with_numbers(each, names) for key, each in config.items() if key != "build_config"}
    if isinstance(config, (list, tuple)):
        return [_with_numbers(each, names) for each in config]
    return names.get(config, config) if isinstance(config, str) else config


def _slots(value: Any) -> Collection[str]:
    """The attributes of an object that are in no dictionary, and have a value."""
    names = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    found = [name for each in names for name in ((each,) if isinstance(each, str) else each)]
    return [name for name in found if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def _source(module: str) -> str:
    """A digest of the file of a module of the user's own; nothing for one that is installed."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.partition(".")[0] in OURS:
        return ""
    path = os.path.realpath(file)
    if path.startswith(_installed()) or not path.endswith(".py"):
        return ""
    try:
        return f" {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
    except OSError:
        return ""


@cache
def _installed() -> tuple[str, ...]:
    """The folders of Python's own modules and of installed packages."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in (*folders, site.getusersitepackages()))


def _texts(code: CodeType) -> set[str]:
    """The texts in the code, also in functions and classes inside it."""
    texts = {each for each in code.co_consts if isinstance(each, str)}
    return texts.union(*(_texts(each) for each in code.co_consts if isinstance(each, CodeType)))


def _of_function(function: FunctionType, seen: dict[int, int]) -> Iterator[str]:
    yield f"function {function.__name__}"
    yield from _of_code(function.__code__, seen)
    yield from _parts((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        is_empty = cell == CellType()  # nothing was assigned to the name
        yield from ("empty",) if is_empty else _parts(cell.cell_contents, seen)
    for name in sorted(_globals(function.__code__)):
        if name in function.__globals__:
            yield f"global {name}"
            yield from _parts(function.__globals__[name], seen)


def _of_code(code: CodeType, seen: dict[int, int]) -> Iterator[str]:
    yield f"code {code.co_name} {code.co_flags} {code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}"
    yield f"{code.co_code.hex()} {code.co_exceptiontable.hex()}"
    yield " ".join((*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars))
    yield from _parts(code.co_consts, seen)


def _globals(code: CodeType) -> set[str]:
    """The names of globals that the code uses, also in functions and classes inside it."""
    names = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_globals(each) for each in code.co_consts if isinstance(each, CodeType)))


def _of_class(kind: type, seen: dict[int, int]) -> Iterator[str]:
    yield f"class {kind.__qualname__}"
    yield from _parts(kind.__bases__, seen)
    for name, value in sorted(vars(kind).items()):
        if name not in NOT_OF_A_CLASS:
            yield f"attribute {name}"
            # A property or a class method holds functions.
            functions = [getattr(value, part, None) for part in ("__func__", "fget", "fset", "fdel")]
            yield from _parts(value if functions == [None] * 4 else functions, seen)
