"""What is wrong with a definition, in one sentence: from pydantic's errors."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from storage.errors import nearest

# What to do where a user's own function is not the one that a study began with.
SAME_SOURCE = "bring the same file to this machine, or start another study with `trialyard create` and --name"

_TAGS = {"Float", "Int", "Choice"}


def sentence(error: ValidationError, known_keys: Callable[[Iterable[Any]], list[str]]) -> str:
    """What is wrong, in one sentence. `known_keys` gives the keys of the table at a path of the definition."""
    problems = error.errors(include_url=False)
    # An unknown key often causes the other errors: a misspelled key is also missing.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    # The last part of a location may name a member of a union (`float`, `bool`), which means nothing to a user.
    # Below `space` the third part is the tag of the parameter's kind. A parameter itself may also be named "Float".
    in_space = first["loc"][:1] == ("space",)
    parts = [part for at, part in enumerate(first["loc"]) if not (in_space and at == 2 and part in _TAGS)]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        known = known_keys(first["loc"][:-1])
        return f"unknown key {key_text(parts)!r}: the known ones are {', '.join(known)}{nearest(str(parts[-1]), known)}"
    if kind == "missing":
        return f"{key_text(parts)} is missing: add it"
    if kind == "union_tag_invalid":
        return f"{key_text(parts)} = {shown(value)} must be true or false, a number or a string"
    if kind == "union_tag_not_found":
        return (
            f"{key_text(parts)} = {shown(value)} must be a table such as {{ low = 0.0, high = 0.7 }} or "
            "{ choices = [3, 5, 7] }"
        )
    if parts and parts[-1] == "[key]":
        return f"{key_text(parts[:-1])}: a hyperparameter's name must be letters, digits and _, and start with a letter"
    if kind == "value_error":
        return f"{key_text(parts)}: {first['ctx']['error']}"
    same = [p for p in problems if p["loc"][: len(first["loc"]) - 1] == first["loc"][:-1] and p["input"] == value]
    if "pattern" in kind:
        return (
            f"{key_text(parts)} = {shown(value)} must be letters, digits and . _ - (at most 100), and start with a "
            "letter or digit"
        )
    if parts and (parts[-1] in ("bool", "int", "float", "str") or _is_union_part(parts[-1])) and len(parts) > 1:
        parts = parts[:-1]
    rule = " or ".join(dict.fromkeys(_rule(p) for p in same)) or _rule(first)
    return f"{key_text(parts)} = {shown(value)} {rule}"


def _is_union_part(part: object) -> bool:
    return isinstance(part, str) and (part.startswith(("constrained-", "literal[")) or "[" in part)


def _rule(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    rules = {
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "string_type": "must be a string",
        "finite_number": "must be finite",
        "dict_type": "must be a table",
        "model_type": "must be a table",
        "tuple_type": "must be a list",
        "list_type": "must be a list",
        "too_short": "must not be empty",
        "string_too_short": "must not be empty",
        "too_long": "is too long",
        "string_too_long": "is too long",
    }
    if kind in rules:
        return rules[kind]
    if kind == "literal_error":
        return f"must be {context['expected']}".replace("'", '"')
    comparisons = {
        "greater_than": "gt",
        "greater_than_equal": "ge",
        "less_than": "lt",
        "less_than_equal": "le",
    }
    if kind in comparisons:
        bound = context[comparisons[kind]]
        return f"must be {kind.replace('_', ' ').replace('than equal', 'than or equal to')} {bound:g}"
    return f"is not valid: {problem['msg'].lower()}"


def key_text(parts: Iterable[Any]) -> str:
    """A location in a definition, as `points[2].dropout`."""
    text = ""
    for part in parts:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{one_line(part)}" if text else one_line(part)
    return text or "the definition"


def names_text(names: Sequence[str], limit: int = 20) -> str:
    """The first `limit` names on one line, with the number of the others."""
    rest = len(names) - limit
    return ", ".join(map(one_line, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def one_line(name: object, limit: int = 80) -> str:
    """A key or a path, shortened, on one line."""
    text = str(name) if str(name).isprintable() else ascii(str(name))[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: object) -> str:
    """`value` on one line, shortened."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # an integer of thousands of digits, lists nested without end
            text = f"(a {type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:77]}..."
