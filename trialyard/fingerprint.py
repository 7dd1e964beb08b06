"""A fingerprint of a function: of its code, and of all that the code uses of its own session.

A pickle of a function differs between processes: it has the name of the notebook's temporary file, line numbers, and
random marks of classes. This one is the same wherever the same function was defined with the same version of Python.
Line numbers and comments do not count. What can be imported by name, such as Keras, is named and not looked into.
"""

import dis
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field
from functools import partial
from types import CellType, CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import cloudpickle

DIGITS = 12  # hexadecimal ones: of a million functions, two are alike with a chance of one in 500
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
NOT_OF_A_CLASS = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"),
    *("_abc_impl", "__abstractmethods__"),  # caches of abstract classes
)


def fingerprint(function: Any) -> str:
    """The fingerprint of `function`, with DIGITS digits.

    Raises what pickling raises if it uses an object of this session that can be neither described nor pickled.
    """
    digest = hashlib.sha256()
    for part in _parts(function, {}):
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
        yield f"module {value.__name__}"
    elif isinstance(value, (GetSetDescriptorType, MemberDescriptorType)):
        yield f"slot {value.__name__}"
    elif isinstance(value, CodeType):
        yield from _of_code(value, seen)
    elif isinstance(value, partial):
        yield from ("partial", *_parts((value.func, value.args, value.keywords), seen))
    elif isinstance(value, MethodType):
        yield from ("method", *_parts((value.__func__, value.__self__), seen))
    elif is_importable(value):
        yield f"import {value.__module__} {value.__qualname__}"
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
    elif hasattr(value, "__dict__") and not is_importable(type(value)):
        seen[id(value)] = len(seen)
        yield from ("object", *_parts(type(value), seen), *_parts(vars(value), seen))
    else:
        yield f"pickle {hashlib.sha256(cloudpickle.dumps(value)).hexdigest()}"


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
