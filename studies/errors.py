"""Errors about definitions and studies; `storage.errors` shows the whole tree."""

from numbers import Integral

from storage.errors import TrialyardError


class DefinitionError(TrialyardError):
    """A definition breaks a rule: the message names the key, the value, the rule and what to do."""


class PackageError(TrialyardError):
    """A package that Trialyard itself needs cannot be imported."""


class StudyError(TrialyardError):
    """There is no such study, or it exists with another definition."""


def require_whole(key: str, value: object) -> None:
    """Raises StudyError unless `value` is a whole number. Type checkers see it before, notebooks do not."""
    if not isinstance(value, Integral):
        raise StudyError(f"{key} = {value!r} must be a whole number, such as 1: correct it")
