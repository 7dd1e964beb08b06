"""Errors about definitions and studies; `storage.errors` shows the whole tree."""

from storage.errors import TrialyardError


class DefinitionError(TrialyardError):
    """A definition breaks a rule: the message names the key, the value, the rule and what to do."""


class PackageError(TrialyardError):
    """A package that Trialyard itself needs cannot be imported."""


class StudyError(TrialyardError):
    """There is no such study, or it exists with another definition."""
