"""The mistakes that can be made with studies; `storage.errors` draws the whole tree."""

from storage.errors import TrialyardError


class DefinitionError(TrialyardError):
    """A definition breaks a rule: the message names the key, the value, the rule and the way out."""


class StudyError(TrialyardError):
    """There is no such study, or it stands with another definition."""
